"""Converted checkpoints against the recorded outputs of the official implementations, at every recorded size."""

import dataclasses

import pytest
import timm
import torch
from checkpoints import convert
from golden_cases import ARGUMENTS, NORMED, bundle, differences, images, native, outputs, source, too_large
from timm.models import VisionTransformer
from transformers import AutoModel, AutoModelForImageClassification

from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.formats import detect as all_formats
from vitreg_hub.errors import ConversionError

pytestmark = pytest.mark.usefixtures("warm")

CASES = sorted(ARGUMENTS)
SIZES = [(case, size) for case in CASES for size in images(case)]
FORMATS = {
    "deit3": "deit3",
    "deit": "deit",
    "dinov2": "dinov2",
    "hf_clip": "hf-clip",
    "hf_deit": "hf-deit",
    "hf_dinov2_reg": "hf-dinov2-with-registers",
    "hf_dinov2": "hf-dinov2",
    "hf_vit": "hf-vit",
    "openclip_timm": "openclip-timm",
    "openclip": "openclip",
    "phreg": "ph-reg",
    "ttr_clip": "openclip",
    "ttr_dinov2": "dinov2",
}


@pytest.mark.parametrize("case", CASES)
def test_the_format_is_recognised(case):
    expected = next(fmt for prefix, fmt in FORMATS.items() if case.startswith(prefix))
    assert bundle(case).provenance.conversion.format == expected


@pytest.mark.parametrize(("case", "size"), SIZES)
def test_recorded_outputs(case, size):
    found = differences(case, size, outputs(bundle(case).build(dynamic_img_size=True), images(case)[size]))
    assert len(found) >= 1
    assert any(name in found for name in ("tokens", "patches", "output"))
    assert not too_large(found)


@pytest.mark.parametrize(("case", "size"), [pair for pair in SIZES if pair[1] != native(pair[0])])
def test_a_baked_size_is_exact_in_plain_timm(case, size, folder):
    convert(source(case), folder, img_size=size, **ARGUMENTS[case])
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert type(model).__module__.startswith("timm.")  # no rule of ours
    found = differences(case, size, outputs(model, images(case)[size]))
    scaled = {k: v for k, v in found.items() if bundle(case).residual_scale == 1 or not k.startswith("block.")}
    assert scaled
    assert not too_large(scaled)


@pytest.mark.parametrize("case", CASES)
def test_saved_bundle_by_timm_name_and_auto_model(case, folder):
    bundle(case).save(folder)
    loaded, converted = ModelBundle.load(folder), bundle(case)
    assert (loaded.arch, loaded.positions, loaded.preprocess) == (
        converted.arch,
        converted.positions,
        converted.preprocess,
    )

    by_name = timm.create_model(loaded.arch, num_classes=loaded.num_classes, **loaded.model_args).eval()
    by_name.load_state_dict(loaded.state_dict)
    auto = AutoModel.from_pretrained(folder).eval()
    classifier = AutoModelForImageClassification.from_pretrained(folder).eval() if loaded.num_classes else None
    for size, x in images(case).items():
        if size == native(case):
            ours = outputs(by_name, x)
            ours = {k: v for k, v in ours.items() if loaded.residual_scale == 1 or not k.startswith("block.")}
            assert not too_large(differences(case, size, ours))
        with torch.no_grad():
            encoded = auto(x, output_hidden_states=True)
            ours = {
                "tokens": encoded.last_hidden_state,
                "class token": encoded.last_hidden_state[:, 0],
                "registers": encoded.register_tokens,
                "patches": encoded.patch_tokens,
                "output": classifier(x).logits if classifier else encoded.pooler_output,
                **{f"block.{i}": state for i, state in enumerate(encoded.hidden_states[1:])},
            }
        found = differences(case, size, ours)
        assert found
        assert not too_large(found)


@pytest.mark.parametrize(
    "case", ["dinov2_swiglu_reg4", "deit_distilled", "hf_vit_eps_probe", "openclip_vision_quickgelu"]
)
def test_all_doors_open_alike(case, folder):
    convert(source(case), folder, **ARGUMENTS[case])
    assert set(verify(folder).values()) == {0.0}


def worst(case: str, converted: ModelBundle, change=lambda model: None) -> float:
    """How many times the tolerance outputs miss the recorded ones, over all sizes."""
    model = converted.build(dynamic_img_size=True)
    change(model)
    found = (differences(case, size, outputs(model, x)) for size, x in images(case).items())
    return max(v / NORMED for sizes in found for k, v in sizes.items() if not k.startswith("block."))


def with_weights(converted: ModelBundle, change) -> ModelBundle:
    """The bundle with every tensor passed through `change(name, tensor)`."""
    weights = {name: change(name, tensor.clone()) for name, tensor in converted.state_dict.items()}
    return dataclasses.replace(converted, state_dict=weights)


def set_eps(eps: float):
    def change(model: VisionTransformer) -> None:
        for module in model.modules():
            if isinstance(module, torch.nn.LayerNorm):
                module.eps = eps

    return change


@pytest.mark.parametrize(
    ("case", "name", "order"),
    [
        ("dinov2_swiglu_reg4", "mlp.fc1", (1, 0)),
        ("dinov2_vit_mlp_hub", "attn.qkv", (1, 0, 2)),
        ("openclip_vision_gelu", "attn.qkv", (0, 2, 1)),
    ],
)
def test_sabotage_permuted_parts_are_seen(case, name, order):
    def permute(key, tensor):
        parts = tensor.chunk(len(order))
        return torch.cat([parts[i] for i in order]) if name in key else tensor

    assert worst(case, bundle(case)) <= 1
    assert worst(case, with_weights(bundle(case), permute)) > 100


@pytest.mark.parametrize("case", ["hf_dinov2", "hf_vit", "hf_clip_vision", "hf_deit"])
def test_sabotage_rules_with_query_and_key_swapped_are_seen(case, monkeypatch):
    fmt = all_formats.FORMATS[FORMATS[next(p for p in FORMATS if case.startswith(p))]]
    other = {(0, 3): (1, 3), (1, 3): (0, 3)}
    rules = tuple(dataclasses.replace(rule, part=other.get(rule.part, rule.part)) for rule in fmt.rules)
    monkeypatch.setitem(all_formats.FORMATS, fmt.name, dataclasses.replace(fmt, rules=rules))
    assert worst(case, convert(source(case))) > 100


@pytest.mark.parametrize("case", ["dinov2_reg4", "deit_base", "openclip_full_plain", "hf_dinov2_reg", "phreg_student"])
def test_sabotage_a_missing_fold_is_seen(case):
    folded = bundle(case)
    table = {"openclip_full_plain": "visual.positional_embedding"}.get(case)
    raw = convert_without_fold(case)
    assert table is None or not torch.equal(raw.state_dict["cls_token"], folded.state_dict["cls_token"])
    assert worst(case, raw) > 100


def convert_without_fold(case: str) -> ModelBundle:
    """The class token without the position of row 0."""
    from vitreg_hub.conversion.planning.plan import Plan

    with pytest.MonkeyPatch.context() as patch:
        make = Plan._make
        patch.setattr(
            Plan, "_make", lambda self, name: self.tensors.read(name) if name == "cls_token" else make(self, name)
        )
        return convert(source(case), **ARGUMENTS[case])


@pytest.mark.parametrize(
    ("case", "eps"),
    [
        ("dinov2_eps_probe", 1e-5),
        ("dinov2_eps_probe", 1e-12),
        ("deit3_eps_probe", 1e-5),
        ("deit3_eps_probe", 1e-12),
        ("openclip_eps_probe", 1e-6),
        ("hf_vit_eps_probe", 1e-6),
    ],
)
def test_sabotage_a_wrong_epsilon_is_seen(case, eps):
    assert worst(case, bundle(case)) <= 1
    assert worst(case, bundle(case), set_eps(eps)) > 100


@pytest.mark.parametrize("case", ["openclip_vision_gelu", "openclip_vision_quickgelu", "openclip_full_plain"])
def test_sabotage_the_other_gelu_is_seen(case):
    other = {"gelu": "quick_gelu", "quick_gelu": "gelu"}[ARGUMENTS[case]["act"]]
    assert worst(case, convert(source(case), **ARGUMENTS[case] | {"act": other})) > 100


def test_sabotage_tanh_gelu_is_seen():
    def change(model: VisionTransformer) -> None:
        for block in model.blocks:
            block.mlp.act = torch.nn.GELU(approximate="tanh")

    assert worst("dinov2_reg4", bundle("dinov2_reg4"), change) > 5


def test_sabotage_an_untransposed_projection_is_seen(monkeypatch):
    fmt = all_formats.FORMATS["openclip"]
    rules = tuple(
        dataclasses.replace(rule, reshape=type(rule.reshape).SAME) if rule.take == "proj" else rule
        for rule in fmt.rules
    )
    monkeypatch.setitem(all_formats.FORMATS, "openclip", dataclasses.replace(fmt, rules=rules))
    with pytest.raises(ConversionError, match="proj has shape"):
        convert(source("openclip_vision_gelu"), **ARGUMENTS["openclip_vision_gelu"])


@pytest.mark.parametrize("case", ["dinov2_vit_mlp_hub", "deit_base", "openclip_vision_quickgelu", "hf_dinov2"])
def test_sabotage_timms_position_rule_is_seen(case):
    from vitreg_hub.network.positions import TIMM_RULE

    assert worst(case, dataclasses.replace(bundle(case), positions=TIMM_RULE)) > 100


@pytest.mark.parametrize("num_heads", [1, 2, 8, 16])
def test_sabotage_a_wrong_number_of_heads_is_seen(num_heads):
    assert worst("dinov2_reg4", convert(source("dinov2_reg4"), num_heads=num_heads)) > 100
