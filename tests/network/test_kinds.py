"""Network kinds: what the records say is what timm builds."""

import pytest
import timm
import torch
from models import ONE_OF_EACH_KIND
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from vitreg_hub.arch import get_arch
from vitreg_hub.errors import DataError
from vitreg_hub.network.kinds import KINDS, STEM, is_registers, kind_of
from vitreg_hub.network.positions import PositionRule, follow


@pytest.mark.parametrize("arch", ONE_OF_EACH_KIND)
def test_record_names_what_timm_builds(arch):
    spec = get_arch(arch)
    network = timm.create_model(arch, device="meta", num_classes=3, **ONE_OF_EACH_KIND[arch])
    kind, tensors = kind_of(spec), network.state_dict()
    assert kind is kind_of(network)
    assert type(network) is kind.timm_class
    wanted = {name for name in kind.embeddings if name != kind.registers or spec.num_registers}
    assert {name for name in tensors if "token" in name or "pos" in name} == wanted
    assert {name.partition(".")[0] for name in tensors if kind.is_of_head(name)} == set(kind.heads)
    assert {name for name, _, _ in kind.drawn} == set(kind.embeddings) - {kind.positions}
    assert f"{STEM}.weight" in tensors
    assert kind.num_registers(network) == spec.num_registers
    assert kind.num_class_tokens(network) == len(kind.class_tokens)
    assert spec.model_args()[kind.registers_argument] == spec.num_registers
    assert spec.model_args().keys() <= kind.arguments
    assert [name for name in tensors if is_registers(f"vision.{name}")] == [kind.registers][: spec.num_registers]


def test_a_network_that_follows_a_rule_is_of_the_same_kind():
    network = timm.create_model("vit_tiny_reg0_deit_distilled", device="meta")
    follow(network, PositionRule(antialias=False))
    assert kind_of(network) is KINDS["VisionTransformerDistilled"]


def test_other_networks_are_refused():
    class Other(nn.Module):
        pass

    Other.__name__ = VisionTransformer.__name__  # as open_clip's is called
    for network in Other(), timm.create_model("resnet10t", device="meta"):
        with pytest.raises(DataError, match="is not a network of any architecture: those are VisionTransformer, "):
            kind_of(network)


def test_no_argument_leads_to_other_weights():
    for kind in KINDS.values():
        assert not kind.arguments & {"pretrained", "checkpoint_path", "pretrained_cfg", "features_only", "device"}
        assert {"img_size", "depth", "block_fn", "reg_tokens"} <= kind.arguments


def test_weights_are_adapted_to_another_grid():
    for arch in "vit_nano_reg4", "vit_tiny_reg0_deit_distilled":
        small, large = (timm.create_model(arch, img_size=side, patch_size=8, depth=1) for side in (32, 48))
        weights = kind_of(small).adapt(small.state_dict(), large)
        assert weights["pos_embed"].shape == large.pos_embed.shape
        large.load_state_dict(weights)
        assert torch.equal(large.cls_token, small.cls_token)
