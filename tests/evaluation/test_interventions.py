"""What stands in the place of registers, read through the token view and at the model's output."""

import pytest
import timm
import torch
import transformers
from models import TINY, random_bundle, randomised

from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.interventions import INTERVENTIONS, RegisterBank, intervened
from vitreg_hub.images.source import open_images
from vitreg_hub.tokens import observe


def networks():
    yield "ours", random_bundle("vit_nano_reg4").build(), 32
    yield "timm's Eva", randomised(timm.create_model("vit_small_patch16_dinov3", **TINY, img_size=64)), 64
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=64, patch_size=16, num_register_tokens=3
    )
    yield "transformers'", randomised(transformers.Dinov2WithRegistersModel(config)), 64


@pytest.fixture(scope="module", params=networks(), ids=lambda param: param[0])
def vit(request):
    _, model, side = request.param
    return model, torch.randn(6, 3, side, side, generator=torch.Generator().manual_seed(1))


def bank_of(model, images, **options):
    return RegisterBank.of(model, open_images(images).batches(None, batch_size=4), **options)


def registers_and_patches(model, images):
    seen = observe(model, images, blocks=(0, -1))
    return seen.tokens[0].registers, seen.tokens[-1].registers, seen.tokens[-1].patches


def test_registers_are_what_takes_their_place(vit):
    model, images = vit
    bank = bank_of(model, images[:3])
    assert bank.states.shape[1] == 3
    before = registers_and_patches(model, images)
    found = {}
    for kind in INTERVENTIONS:
        with intervened(model, kind, bank):
            found[kind] = registers_and_patches(model, images)
        assert not torch.allclose(found[kind][2], before[2], atol=1e-3)  # patches read them
    for place, block in ((0, 0), (1, -1)):
        assert found["zeroed"][place].abs().max() == 0
        mean = bank.states[block].mean(dim=0)
        assert torch.allclose(found["mean"][place], mean.expand_as(found["mean"][place]), atol=1e-5)
        for registers in found["shuffled"][place]:
            assert min((registers - state).abs().max() for state in bank.states[block]) < 1e-5
    assert torch.equal(registers_and_patches(model, images)[2], before[2])


def test_registers_that_an_image_has_anyway_change_nothing(vit):
    model, images = vit
    bank = bank_of(model, images[:1])
    with intervened(model, "shuffled", bank):
        same = registers_and_patches(model, images[:1])[2]
    assert torch.allclose(same, registers_and_patches(model, images[:1])[2], atol=1e-5)


def test_batches_do_not_decide_whose_registers_are_taken(vit):
    model, images = vit
    bank = bank_of(model, images)
    with intervened(model, "shuffled", bank):
        together = registers_and_patches(model, images)[2]
        alone = torch.cat([registers_and_patches(model, image[None])[2] for image in images])
    assert torch.allclose(together, alone, atol=1e-4)


def test_a_model_without_registers_is_refused():
    with pytest.raises(DataError, match="no registers"):
        bank_of(random_bundle("vit_nano_reg0").build(), torch.randn(2, 3, 32, 32))
