"""The token view against timm's own outputs and unfused attention."""

import pytest
import timm
import torch
from models import ONE_OF_EACH_KIND, randomised

from vitreg_hub.tokens import attention_maps, block_tokens


@pytest.fixture(params=ONE_OF_EACH_KIND)
def vit(request):
    return randomised(timm.create_model(request.param, num_classes=0, **ONE_OF_EACH_KIND[request.param]))


def images_for(vit):
    return torch.randn(2, 3, *vit.patch_embed.img_size)


def test_block_tokens_are_timms_intermediates(vit):
    images = images_for(vit)
    seen = block_tokens(vit, images, blocks=(0, -1))
    last = len(vit.blocks) - 1
    (first, last) = vit.forward_intermediates(
        images, indices=[0, last], return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True
    )
    for ours, (patches, prefix) in ((seen[0], first), (seen[-1], last)):
        assert torch.equal(ours.patches, patches)
        assert torch.equal(torch.cat([ours.cls, ours.registers], dim=1), prefix)
        assert ours.registers.shape[1] == vit.num_reg_tokens


def test_attention_maps_are_what_unfused_timm_computes(vit):
    images = images_for(vit)
    ours = attention_maps(vit, images, blocks=(1, -1))
    unfused = {}
    for index in (1, -1):
        layer = vit.blocks[index].attn
        layer.fused_attn = False
        layer.attn_drop.register_forward_hook(lambda m, args, output, index=index: unfused.update({index: args[0]}))
    vit(images)
    for index, maps in ours.items():
        assert (maps - unfused[index]).abs().max() < 1e-6
        assert torch.allclose(maps.sum(-1), torch.ones(()))


def test_nothing_is_left_on_the_model(vit):
    images = images_for(vit)
    before = vit(images)
    attention_maps(vit, images)
    block_tokens(vit, images)
    assert torch.equal(vit(images), before)
    assert not any(module._forward_hooks for module in vit.modules())
