"""Our transformers classes: what they return, what they write, and the tools that users run them with.

The oracle is timm's own model with the same weights; under sdpa the difference must be exactly 0.
"""

import copy
import json
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import transformers
from models import randomised
from optional import usable
from PIL import Image
from timm.models import VisionTransformer
from torch import Tensor, nn
from transformers import (
    AutoBackbone,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    TimmWrapperConfig,
    TimmWrapperImageProcessor,
    TimmWrapperModel,
    Trainer,
    TrainingArguments,
    UperNetConfig,
    UperNetForSemanticSegmentation,
    ViTConfig,
    ViTForImageClassification,
    pipeline,
)

from vitreg_hub.bundle.config import Preprocess
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError, DataError, UnknownArchError
from vitreg_hub.hf_models import VitRegBackbone, VitRegConfig, VitRegForImageClassification, VitRegModel

SHAPE = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4)
PATCH = 4
SIZES = {"native": (32, 32), "larger": (40, 40), "rectangle": (24, 48)}
LABELS = torch.tensor([1, 3])


def make_config(arch: str = "vit_nano_reg4", **kwargs: Any) -> VitRegConfig:
    return VitRegConfig(arch=arch, **dict(image_size=32, patch_size=PATCH, num_labels=5) | SHAPE | kwargs)


def make(model_class: type, config: VitRegConfig | None = None):
    """A model with weights under which nothing can hide."""
    model = model_class(config or make_config()).eval()
    randomised(model.timm_model)
    return model


def timm_twin(model: VitRegModel) -> VisionTransformer:
    """timm's own model with the same weights."""
    config = model.config
    num_classes = model.timm_model.num_classes
    twin = timm.create_model(config.architecture, num_classes=num_classes, dynamic_img_size=True, **config.model_args)
    twin.load_state_dict(model.timm_model.state_dict())
    return twin.eval()


def images(size: tuple[int, int] = (32, 32), *, batch: int = 2, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, *size)


@pytest.fixture(params=SIZES.values(), ids=SIZES.keys())
def pixels(request: pytest.FixtureRequest) -> Tensor:
    return images(request.param)


@pytest.fixture
def saved(folder: Path) -> tuple[VitRegForImageClassification, Path]:
    """A classifier, and the folder that it was saved to."""
    model = make(VitRegForImageClassification)
    model.save_pretrained(folder)
    return model, folder


# Outputs


def test_outputs_by_name(pixels):
    patches = pixels.shape[-2] * pixels.shape[-1] // PATCH**2
    outputs = make(VitRegModel)(pixels, output_hidden_states=True, output_attentions=True)
    tokens = outputs.last_hidden_state
    assert tokens.shape == (2, 1 + 4 + patches, 32)
    assert torch.equal(outputs.pooler_output, tokens[:, 0])
    assert torch.equal(outputs.register_tokens, tokens[:, 1:5])
    assert torch.equal(outputs.patch_tokens, tokens[:, 5:])
    assert [tuple(state.shape) for state in outputs.hidden_states] == [tuple(tokens.shape)] * 4
    assert [tuple(weights.shape) for weights in outputs.attentions] == [(2, 4, 5 + patches, 5 + patches)] * 3


@pytest.mark.parametrize("model_class", [VitRegModel, VitRegForImageClassification, VitRegBackbone])
def test_tuples_on_request(model_class):
    model = make(model_class)
    named = model(images())
    torch.manual_seed(1)
    by_call = model(images(), return_dict=False)
    torch.manual_seed(1)
    model.config.return_dict = False
    by_config = model(images())
    assert isinstance(by_call, tuple)
    assert len(by_call) == len(by_config) == len(named.to_tuple())
    assert all(map(torch.equal, _tensors(by_call), _tensors(by_config)))


def _tensors(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for output in outputs for t in _tensors(output)]


@torch.no_grad()
@pytest.mark.parametrize(
    ("arch", "args"),
    [
        ("vit_nano_reg4", {}),
        ("vit_small_reg0", {}),
        ("vit_giant_reg4", {}),
        ("vit_base_reg4_deit3", {}),
        ("vit_base_reg4_clip", {}),
        ("vit_base_reg8_clip_quickgelu", {}),
        ("vit_base_reg4_plain", {}),
        ("vit_base_reg0_deit_distilled", {}),
        ("vit_nano_reg4", {"qk_norm": True, "scale_attn_norm": True}),
        ("vit_nano_reg4", {"class_token": False, "global_pool": "avg"}),
    ],
)
def test_tokens_are_exactly_timms(arch, args, pixels):
    model = make(VitRegModel, make_config(arch, model_args=args))
    outputs, twin = model(pixels), timm_twin(model)
    assert torch.equal(outputs.last_hidden_state, twin.forward_features(pixels))
    assert torch.equal(outputs.pooler_output, twin(pixels))
    assert outputs.register_tokens.shape[1] == model.config.num_register_tokens
    assert outputs.patch_tokens.shape[1] == pixels.shape[-2] * pixels.shape[-1] // PATCH**2


@torch.no_grad()
def test_hidden_states_are_timms(pixels):
    model = make(VitRegModel)
    twin, inputs = timm_twin(model), []
    twin.blocks[0].register_forward_pre_hook(lambda block, args: inputs.append(args[0]))
    after = twin.forward_intermediates(
        pixels, return_prefix_tokens=True, output_fmt="NLC", norm=False, intermediates_only=True
    )
    expected = [inputs[0], *(torch.cat([prefix, patches], dim=1) for patches, prefix in after)]
    states = model(pixels, output_hidden_states=True).hidden_states
    assert len(states) == 4
    assert all(map(torch.equal, states, expected))
    chosen = model(pixels, output_hidden_states=[0, -1]).hidden_states
    assert [state is not None for state in chosen] == [True, False, False, True]
    assert torch.equal(chosen[0], expected[0])
    assert torch.equal(chosen[-1], expected[-1])


KERNELS = ["eager", "sdpa", pytest.param("flex_attention", marks=pytest.mark.slow)]


@torch.no_grad()
@pytest.mark.parametrize("kernel", KERNELS)
def test_attentions_are_timms_unfused_weights(kernel, pixels):
    model = make(VitRegModel)
    twin, expected = timm_twin(model), []
    for block in twin.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_pre_hook(lambda layer, args: expected.append(args[0]))
    tokens = twin.forward_features(pixels)
    model.set_attn_implementation(kernel)
    outputs = model(pixels, output_attentions=True)
    assert len(outputs.attentions) == len(expected) == 3
    for weights, timms in zip(outputs.attentions, expected, strict=True):
        assert (weights - timms).abs().max() < 1e-6
        assert (weights.sum(dim=-1) - 1).abs().max() < 1e-6
    assert (outputs.last_hidden_state - tokens).abs().max() < 1e-4
    assert "attentions" not in model(pixels)


@torch.no_grad()
def test_average_pooling_is_over_patches_only(pixels):
    model = make(VitRegForImageClassification, make_config(model_args={"global_pool": "avg"}))
    network = model.timm_model
    patches = network.forward_features(pixels)[:, 5:]
    expected = network.head(network.fc_norm(patches.mean(dim=1)))
    logits = model(pixels).logits
    assert (logits - expected).abs().max() < 1e-5
    assert torch.equal(logits, timm_twin(model)(pixels))


@torch.no_grad()
@pytest.mark.parametrize("choice", [{"out_indices": [1, 3]}, {"out_features": ["stage1", "stage3"]}])
def test_feature_maps_are_timms(choice, pixels):
    config = make_config(**choice)
    model = AutoBackbone.from_config(config).eval()
    assert type(model) is VitRegBackbone
    randomised(model.timm_model)
    height, width = pixels.shape[-2] // PATCH, pixels.shape[-1] // PATCH
    maps = model(pixels).feature_maps
    expected = timm_twin(model).forward_intermediates(pixels, indices=[0, 2], norm=True, intermediates_only=True)
    assert [tuple(feature_map.shape) for feature_map in maps] == [(2, 32, height, width)] * 2
    assert all(map(torch.equal, maps, expected))
    assert model.channels == [32, 32]


@torch.no_grad()
def test_backbone_from_a_folder(folder):
    model = make(VitRegModel)
    model.save_pretrained(folder)
    backbone = VitRegBackbone.from_pretrained(folder, out_features=["stem", "stage2"])
    pixels = images((24, 40))
    states = model(pixels, output_hidden_states=True).hidden_states
    expected = [model.timm_model.norm(states[i])[:, 5:].transpose(1, 2).unflatten(2, (6, 10)) for i in (0, 2)]
    assert all(map(torch.equal, backbone(pixels).feature_maps, expected))


@torch.no_grad()
def test_bfloat16(saved):
    _, folder = saved
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16)
    outputs = model(images())  # float32, as an image processor gives them
    assert outputs.last_hidden_state.dtype == torch.bfloat16
    assert outputs.last_hidden_state.isfinite().all()


@pytest.mark.parametrize("model_class", [VitRegModel, VitRegForImageClassification, VitRegBackbone])
def test_image_that_the_patch_does_not_divide(model_class):
    with pytest.raises(DataError, match=r"^an image of 32x30 pixels .* patches of 4x4: resize or pad [^.]*\.$"):
        make(model_class)(images((32, 30)))


# Configuration and files


def test_configuration_names():
    config = make_config(image_size=[24, 40], num_channels=1, num_register_tokens=8)
    assert config.model_args["img_size"] == [24, 40] == config.image_size
    assert config.pretrained_cfg["input_size"] == [1, 24, 40]
    assert config.spec.name == "vit_nano_reg8"
    config.num_register_tokens = 6
    assert (config.spec.name, config.model_args["reg_tokens"]) == ("vit_nano_reg4", 6)
    config.hidden_size = 64
    assert config.model_args["embed_dim"] == 64
    assert config.to_diff_dict()["num_features"] == 64
    assert VitRegConfig(arch="vit_nano_reg4", model_args={"img_size": 64}).image_size == 64
    assert VitRegConfig(output_attentions=True).output_attentions
    with pytest.raises(UnknownArchError):
        VitRegConfig(arch="vit_nano_reg3")


@torch.no_grad()
@pytest.mark.parametrize("channels", [1, 3])
def test_model_that_was_never_saved_becomes_a_bundle(folder, channels):
    model = make(VitRegForImageClassification, make_config(num_channels=channels, image_size=24))
    pixels = images((24, 24), channels=channels)
    logits = model(pixels).logits
    model.save_pretrained(folder)
    bundle = ModelBundle.load(folder)
    assert bundle.num_classes == 5
    assert bundle.label_names is None
    assert bundle.preprocess.input_size == (channels, 24, 24)
    assert json.loads(json.dumps(bundle.to_json())) == json.loads((folder / "config.json").read_text())
    assert torch.equal(bundle.build()(pixels), logits)
    assert torch.equal(timm.create_model(f"local-dir:{folder}", pretrained=True).eval()(pixels), logits)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(pixels).logits, logits)


@torch.no_grad()
def test_distillation_token(folder):
    model = VitRegForImageClassification(make_config("vit_base_reg0_deit_distilled")).eval()
    network = model.timm_model
    assert network.dist_token.std().item() == pytest.approx(0.02, rel=0.5)
    randomised(network)
    pixels = images()
    logits = model(pixels).logits
    assert torch.equal(logits, network(pixels))
    model.save_pretrained(folder)
    features = AutoModel.from_pretrained(folder)(pixels)
    assert features.last_hidden_state.shape == (2, 2 + 64, 32)
    assert torch.equal(features.pooler_output, features.last_hidden_state[:, :2].sum(dim=1) / 2)
    assert features.register_tokens.shape == (2, 0, 32)
    assert features.patch_tokens.shape == (2, 64, 32)
    assert torch.equal(AutoModelForImageClassification.from_pretrained(folder)(pixels).logits, logits)
    assert torch.equal(ModelBundle.load(folder).build()(pixels), logits)


def assert_same_bundle(second: Path, first: Path) -> None:
    """Equal files, but for the time."""
    assert (second / "model.safetensors").read_bytes() == (first / "model.safetensors").read_bytes()
    texts = [(path / "config.json").read_text() for path in (second, first)]
    created = [json.loads(text)["vitreg"]["provenance"]["created"] for text in texts]
    assert texts[0].replace(created[0], created[1]) == texts[1]


def test_second_save_is_identical(saved, tmp_path):
    _, folder = saved
    AutoModelForImageClassification.from_pretrained(folder).save_pretrained(tmp_path / "second")
    assert_same_bundle(tmp_path / "second", folder)


def test_what_a_saved_model_says_of_itself(folder, tmp_path):
    provenance = Provenance(origin="a converter", license="mit", metrics={"top1": 0.5})
    network = timm.create_model("vit_nano_reg4", num_classes=2)
    names = ("cat", "dog")
    ModelBundle.from_timm(network, arch="vit_nano_reg4", provenance=provenance, label_names=names).save(folder)
    model = AutoModelForImageClassification.from_pretrained(folder)
    assert model.config.id2label == {0: "cat", 1: "dog"}
    for second in tmp_path / "second", tmp_path / "third":
        model.save_pretrained(second)
        bundle = ModelBundle.load(second)
        assert bundle.provenance.origin == "saved by transformers, started from: a converter"
        assert bundle.provenance.license == "mit"
        assert not bundle.provenance.metrics
        assert bundle.provenance.versions["transformers"] == transformers.__version__
        assert datetime.fromisoformat(bundle.provenance.created).tzinfo is not None
        assert bundle.label_names == names
        model = AutoModelForImageClassification.from_pretrained(second)
    model.config.save_pretrained(tmp_path / "config")
    written, kept = AutoConfig.from_pretrained(tmp_path / "config").to_dict(), model.config.to_dict()
    assert {key for key in kept if written[key] != kept[key]} == {"_name_or_path", "dtype"}


def test_features_only_model_writes_no_head(folder):
    make(VitRegModel).save_pretrained(folder)
    assert ModelBundle.load(folder).num_classes == 0


def test_new_head(saved):
    model, folder = saved
    tuned = AutoModelForImageClassification.from_pretrained(folder, num_labels=3, ignore_mismatched_sizes=True)
    assert tuned(images()).logits.shape == (2, 3)
    assert torch.equal(tuned.timm_model.pos_embed, model.timm_model.pos_embed)
    assert not tuned.timm_model.head.weight.isnan().any()


LETTERS = {0: "a", 1: "b", 2: "c"}
LABEL_MAPS = {
    "a number": dict(num_labels=3),
    "no head": dict(num_labels=0),
    "names": dict(id2label=LETTERS),
    "names and their inverse": dict(id2label=LETTERS, label2id={"a": 0, "b": 1, "c": 2}),
    "text keys": dict(num_labels=3, id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": "0", "b": "1", "c": "2"}),
    "text keys alone": dict(id2label={str(i): f"name {i}" for i in range(11)}),
    "keys from 1": dict(num_labels=2, id2label={1: "a", 2: "b"}, label2id={"a": 1, "b": 2}),
    "text keys from 1": dict(id2label={"1": "a", "2": "b"}),
    "keys with a gap": dict(id2label={0: "a", 5: "b"}),
    "keys out of order": dict(id2label={2: "c", 0: "a", 1: "b"}),
    "equal names": dict(id2label={0: "a", 1: "a"}),
    "several names of a class": dict(id2label={0: "cat", 1: "dog"}, label2id={"cat": 0, "kitty": 0, "dog": 1}),
    "only an inverse": dict(label2id={"x": 0, "y": 1}),
    "two names by default": dict(id2label={0: "LABEL_0", 1: "LABEL_1"}),
    "an inverse by default": dict(id2label={0: "a", 1: "b"}, label2id={"LABEL_0": 0, "LABEL_1": 1}),
    "a contradiction": dict(num_labels=5, id2label=LETTERS),
    "nothing": dict(id2label={}),
}


@pytest.fixture(scope="module")
def vit_and_ours(tmp_path_factory) -> tuple[Path, Path]:
    """transformers' own ViT and ours, saved with the same four names of classes."""
    names = dict(enumerate("wxyz"))
    labels = dict(id2label=names, label2id={name: i for i, name in names.items()})
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    theirs, ours = (tmp_path_factory.mktemp("labels") / name for name in ("vit", "ours"))
    ViTForImageClassification(ViTConfig(**shape, intermediate_size=64, **labels)).save_pretrained(theirs)
    VitRegForImageClassification(VitRegConfig(arch="vit_nano_reg4", **shape, **labels)).save_pretrained(ours)
    return theirs, ours


@pytest.mark.parametrize("labels", LABEL_MAPS.values(), ids=LABEL_MAPS.keys())
def test_label_maps_are_those_of_transformers_own_vit(vit_and_ours, tmp_path, labels):
    """Given to a model or to its configuration, or set there: in memory, and saved and loaded."""

    def maps(where: Path, name: str) -> list[Any]:
        assigned = AutoConfig.from_pretrained(where)
        for key, value in labels.items():
            setattr(assigned, key, value)
        model = AutoModelForImageClassification.from_pretrained(where, ignore_mismatched_sizes=True, **labels)
        head = model.classifier if hasattr(model, "classifier") else model.timm_model.head
        found = [getattr(head, "out_features", 0)]
        for part in (AutoConfig.from_pretrained(where, **labels), assigned, model):
            part.save_pretrained(tmp_path / name)
            for config in (getattr(part, "config", part), AutoConfig.from_pretrained(tmp_path / name)):
                found.append((config.num_labels, config.id2label, config.label2id))
        return found

    theirs, ours = vit_and_ours
    assert maps(ours, "ours") == maps(theirs, "theirs")
    bundle = ModelBundle.load(tmp_path / "ours")
    assert bundle.num_classes == bundle.to_json()["num_classes"] == bundle.build().num_classes


def test_names_of_more_classes_than_the_head_has_are_not_lost(folder):
    model = make(VitRegForImageClassification)
    model.config.id2label = LETTERS
    with pytest.raises(BundleError, match=r"^the model has 5 classes, but config\.id2label names 3: [^.]*\.$"):
        model.save_pretrained(folder)


@torch.no_grad()
def test_model_inside_another(tmp_path):
    """A detector or segmenter around the backbone, of transformers or of a user, saves and loads it with itself."""
    backbone = make_config(out_indices=[0, 1, 2, 3])
    config = UperNetConfig(backbone_config=backbone, hidden_size=16, num_labels=3, auxiliary_in_channels=32)
    model = UperNetForSemanticSegmentation(config).eval()
    model.save_pretrained(tmp_path)
    pixels = images((64, 96))
    again = UperNetForSemanticSegmentation.from_pretrained(tmp_path)
    assert type(again.backbone) is VitRegBackbone
    assert torch.equal(again(pixels).logits, model(pixels).logits)


def test_subclass_of_a_user_writes_timms_names(folder):
    class Mine(VitRegModel):
        pass

    make(Mine).save_pretrained(folder)
    assert "blocks.0.attn.qkv.weight" in ModelBundle.load(folder).state_dict


def test_image_processor(saved):
    _, folder = saved
    processor = AutoImageProcessor.from_pretrained(folder)
    assert type(processor) is TimmWrapperImageProcessor
    pixels = processor(Image.new("RGB", (50, 70))).pixel_values
    cfg = Preprocess.from_cfg(json.loads((folder / "config.json").read_text())["pretrained_cfg"])
    assert pixels.shape == (1, *cfg.input_size)
    assert torch.allclose(pixels[0, :, 0, 0], -torch.tensor(cfg.mean) / torch.tensor(cfg.std))


def test_foreign_timm_repository_is_as_without_the_plugin(tmp_path):
    timm.models.save_for_hf(timm.create_model("resnet10t", num_classes=5), tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["model_args"]["num_classes"]  # with it, transformers cannot read what timm has written
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert type(AutoConfig.from_pretrained(tmp_path)) is TimmWrapperConfig
    model = AutoModel.from_pretrained(tmp_path)
    assert type(model) is TimmWrapperModel
    assert model(images((64, 64))).last_hidden_state.shape[1] == 512


# Training


def _gradients(model: nn.Module, **kwargs: Any) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(images(), labels=LABELS, **kwargs).loss.backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    config = make_config(model_args=dict(drop_path_rate=0.2, proj_drop_rate=0.1, attn_drop_rate=0.1))
    model = make(VitRegForImageClassification, config).train()
    plain = _gradients(model)
    runs = []
    model.timm_model.blocks[1].norm1.register_forward_hook(lambda *_: runs.append(1))
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed = _gradients(model)
    assert len(runs) == 2  # once more in the backward pass
    assert all(gradient is not None for gradient in checkpointed)
    assert all(map(torch.equal, plain, checkpointed))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attentions_and_hidden_states_with_gradient_checkpointing(kernel):
    model = make(VitRegForImageClassification).train()
    model.set_attn_implementation(kernel)
    plain = _gradients(model)
    model.activation_checkpointing_enable()
    assert all(map(torch.equal, plain, _gradients(model, output_attentions=True, output_hidden_states=True)))


@pytest.mark.parametrize("kernel", ["eager", "sdpa"])
def test_attentions_carry_gradients(kernel):
    model = make(VitRegModel)
    model.set_attn_implementation(kernel)
    model(images(), output_attentions=True).attentions[0][..., 1:5].sum().backward()  # attention paid to registers
    gradient = model.timm_model.blocks[0].attn.qkv.weight.grad
    assert gradient.abs().max() > 0


def test_lora(saved, tmp_path):
    peft = pytest.importorskip("peft")  # by itself: transformers' opinion of its version does not matter here
    _, folder = saved
    lora = peft.LoraConfig(target_modules=["attn.qkv", "attn.proj"], modules_to_save=["head"], r=4)
    model = peft.get_peft_model(AutoModelForImageClassification.from_pretrained(folder), lora)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(trainable) == 2 * 2 * 3 + 2  # A and B of qkv and proj in 3 blocks, and the head
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # the first step has no gradient in A, as B starts at 0
        model(pixel_values=images(), labels=LABELS).loss.backward()
        optimizer.step()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trainable
    assert all("lora_" in name or ".head." in name for name in trainable)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(folder), tmp_path / "adapter"
    )
    pixels = images()
    assert torch.equal(again.eval()(pixel_values=pixels).logits, model.eval()(pixel_values=pixels).logits)
    merged = model.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(ModelBundle.load(tmp_path / "merged").build()(pixels), merged(pixels).logits)


@torch.no_grad()
def test_adapters_of_transformers(saved, tmp_path):
    peft = usable("peft")
    _, folder = saved
    model = AutoModelForImageClassification.from_pretrained(folder)
    model.add_adapter(peft.LoraConfig(target_modules=["attn.qkv", "attn.proj"], r=4, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir() if path != folder) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    again = AutoModelForImageClassification.from_pretrained(folder)
    again.load_adapter(tmp_path)
    pixels = images()
    assert torch.equal(again.eval()(pixels).logits, model.eval()(pixels).logits)


def test_trainer_resumes(saved, tmp_path):
    _, folder = saved
    data = [{"pixel_values": images(batch=1)[0], "labels": i % 5} for i in range(8)]

    def train(**kwargs: Any) -> VitRegForImageClassification:
        model = AutoModelForImageClassification.from_pretrained(folder)
        args = TrainingArguments(
            str(tmp_path / "runs"),
            max_steps=4,
            save_steps=2,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            seed=3,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
        )
        Trainer(model, args, train_dataset=data).train(**kwargs)
        return model

    straight = train().state_dict()
    resumed = train(resume_from_checkpoint=str(tmp_path / "runs" / "checkpoint-2")).state_dict()
    start = AutoModelForImageClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)
    assert not any(torch.equal(straight[name], start[name]) for name in straight)


# Other tools

SHALLOW = dict(num_hidden_layers=2)
"""For tools that take their time for each block."""

TRACED = [VitRegModel, VitRegBackbone, pytest.param(VitRegForImageClassification, marks=pytest.mark.slow)]


def test_pipelines(saved):
    model, folder = saved
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (50, 60, 3), dtype=np.uint8))
    features = pipeline("image-feature-extraction", model=str(folder))
    assert type(features.model) is VitRegModel
    pixels = features.image_processor(picture).pixel_values
    with torch.no_grad():
        tokens, logits = features.model(pixels).last_hidden_state, model(pixels).logits
    assert torch.equal(torch.tensor(features(picture)), tokens)
    best = pipeline("image-classification", model=str(folder))(picture, top_k=1)
    assert best[0]["label"] == f"LABEL_{logits.argmax()}"
    assert best[0]["score"] == pytest.approx(logits.softmax(dim=-1).max().item())


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_device_map(saved, device_map):
    model, folder = saved
    mapped = AutoModelForImageClassification.from_pretrained(folder, device_map=device_map)
    pixels = images()
    assert torch.equal(mapped(pixels).logits, model(pixels).logits)


@torch.no_grad()
def test_blocks_on_disk(saved, tmp_path):
    model, folder = saved
    parts = {name.split(".")[1] for name in model.state_dict()} - {"blocks"}
    device_map = {f"timm_model.{part}": "cpu" for part in parts}
    device_map |= {f"timm_model.blocks.{i}": device for i, device in enumerate(["cpu", "disk", "disk"])}
    offloaded = AutoModelForImageClassification.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    pixels = images()
    assert offloaded.timm_model.blocks[1].mlp.fc1.weight.is_meta
    assert torch.equal(offloaded(pixels).logits, model(pixels).logits)
    offloaded.save_pretrained(tmp_path / "second")
    assert_same_bundle(tmp_path / "second", folder)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("model_class", TRACED)
def test_compile(model_class, backend):
    torch.compiler.reset()
    model = make(model_class, make_config(**SHALLOW))
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for pixels in images(), images((24, 40)):
        for flags in {}, dict(output_attentions=True, output_hidden_states=True):
            expected = model(pixels, **flags)  # first: here transformers places its hooks, which no compiler can follow
            outputs = compiled(pixels, **flags)
            assert outputs.keys() == expected.keys()
            for tensor, other in zip(_tensors(outputs.to_tuple()), _tensors(expected.to_tuple()), strict=True):
                assert (tensor - other).abs().max() <= (0 if backend == "eager" else 1e-4)


FREE = {"pixel_values": dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
"""Batch, height and width of the exported programs."""


def _exported(model: nn.Module) -> Callable[..., Any]:
    return torch.export.export(model, (), {"pixel_values": images()}, dynamic_shapes=FREE).module()


def _exported_by_transformers(model: nn.Module) -> Callable[..., Any]:
    exporters = pytest.importorskip("transformers.exporters.exporter_dynamo")
    config = exporters.DynamoConfig(dynamic=True, dynamic_shapes=copy.deepcopy(FREE))
    return exporters.DynamoExporter().export(model, {"pixel_values": images()}, config=config)


@torch.no_grad()
@pytest.mark.parametrize("export", [_exported, _exported_by_transformers])
@pytest.mark.parametrize("model_class", TRACED)
def test_export_with_free_sizes(model_class, export):
    model = make(model_class, make_config(**SHALLOW))
    program = export(model)
    for pixels in images(), images((24, 40), batch=3):
        expected = model(pixels)
        outputs = program(pixel_values=pixels)
        for name in expected:
            for tensor, other in zip(_tensors(outputs[name]), _tensors(expected[name]), strict=True):
                assert (tensor - other).abs().max() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("model_class", TRACED)
def test_onnx_with_free_sizes(model_class, tmp_path):
    onnxruntime = usable("onnxruntime")
    usable("onnxscript")
    model, file = make(model_class, make_config(**SHALLOW)), tmp_path / "model.onnx"
    torch.onnx.export(
        model, (), file, kwargs={"pixel_values": images()}, dynamic_shapes=FREE, dynamo=True, verbose=False
    )
    session = onnxruntime.InferenceSession(file)
    for pixels in images(), images((24, 40), batch=3):
        outputs = session.run(None, {"pixel_values": pixels.numpy()})
        for array, expected in zip(outputs, _tensors(model(pixels).to_tuple()), strict=True):
            assert np.abs(array - expected.numpy()).max() < 1e-4
