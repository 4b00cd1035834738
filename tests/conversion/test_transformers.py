"""transformers' models in both spellings of their names, against these models, at their own and at other sizes."""

import pytest
import torch
import transformers
from checkpoints import convert
from models import randomised
from transformers import (
    CLIPConfig,
    CLIPVisionConfig,
    DeiTConfig,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    PreTrainedModel,
    ViTConfig,
)

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
    "intermediate_size": 48,
}
DINOV2 = {key: value for key, value in SHAPE.items() if key != "intermediate_size"}
TEXT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 20, "intermediate_size": 16}
MODELS: dict[str, tuple[type, object]] = {
    "Dinov2Model": (Dinov2Config, DINOV2),
    "Dinov2Model, SwiGLU": (Dinov2Config, DINOV2 | {"use_swiglu_ffn": True}),
    "Dinov2ForImageClassification": (Dinov2Config, DINOV2),
    "Dinov2Model, no qkv bias": (Dinov2Config, DINOV2 | {"qkv_bias": False}),
    "Dinov2WithRegistersModel": (Dinov2WithRegistersConfig, DINOV2),
    "Dinov2WithRegistersModel, SwiGLU": (Dinov2WithRegistersConfig, DINOV2 | {"use_swiglu_ffn": True}),
    "Dinov2WithRegistersForImageClassification": (Dinov2WithRegistersConfig, DINOV2 | {"num_register_tokens": 2}),
    "ViTModel": (ViTConfig, SHAPE),
    "ViTForImageClassification": (ViTConfig, SHAPE | {"num_labels": 3}),
    "ViTModel, other activation": (ViTConfig, SHAPE | {"hidden_act": "gelu_pytorch_tanh", "layer_norm_eps": 1e-6}),
    "ViTModel, rectangles": (ViTConfig, SHAPE | {"image_size": [32, 48]}),
    "DeiTModel": (DeiTConfig, SHAPE),
    "DeiTForImageClassificationWithTeacher": (DeiTConfig, SHAPE | {"num_labels": 3}),
    "DeiTForImageClassification": (DeiTConfig, SHAPE | {"num_labels": 3}),
    "CLIPVisionModel": (CLIPVisionConfig, SHAPE),
    "CLIPVisionModelWithProjection": (CLIPVisionConfig, SHAPE | {"projection_dim": 12, "hidden_act": "gelu"}),
    "CLIPModel": (CLIPConfig, {"vision_config": SHAPE, "text_config": TEXT, "projection_dim": 12}),
}


def make(name: str) -> PreTrainedModel:
    config, arguments = MODELS[name]
    model = getattr(transformers, name.partition(",")[0])(config(**arguments)).eval()
    return randomised(model)


@torch.no_grad()
def outputs(model: PreTrainedModel, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a model gives, by our names."""
    kind = type(model).__name__
    if kind == "CLIPModel":
        return {"output": model.get_image_features(pixels, interpolate_pos_encoding=True).pooler_output}
    if kind.startswith("CLIP"):
        given = model(pixels, interpolate_pos_encoding=True)
        return {"output": given.image_embeds} if "image_embeds" in given else {"class token": given.pooler_output}
    if kind.startswith("Dinov2"):
        base = model.base_model if "Classification" in kind else model  # a head that no bundle holds
        return {"tokens": base(pixels).last_hidden_state}
    given = model(pixels, interpolate_pos_encoding=pixels.shape[-2:] != (32, 48))  # it takes tables to be squares
    if kind == "DeiTForImageClassification":  # a head that no bundle holds
        return {"tokens": model.deit(pixels, interpolate_pos_encoding=True).last_hidden_state}
    return {"output": given.logits} if "logits" in given else {"tokens": given.last_hidden_state}


@pytest.mark.parametrize("historic", [True, False], ids=["as on the Hub", "as in memory"])
@pytest.mark.parametrize("name", MODELS)
def test_converts_exactly_at_every_size(name, historic, tmp_path):
    model = make(name)
    model.save_pretrained(tmp_path, save_original_format=historic)
    converted = convert(tmp_path).build(dynamic_img_size=True)
    for size in [(32, 48)] if "rectangles" in name else [(32, 32), (48, 48), (24, 40)]:
        pixels = torch.randn(2, 3, *size)
        with torch.no_grad():
            tokens = converted.forward_features(pixels)
            ours = {"tokens": tokens, "class token": tokens[:, 0], "output": converted.forward_head(tokens)}
        for key, expected in outputs(model, pixels).items():
            assert expected.std() > 0.1
            assert (ours[key] - expected).abs().max() < 2e-5, (key, size)


def test_a_tower_that_openclip_scaled(tmp_path):
    from open_clip.transformer import VisionTransformer

    tower = VisionTransformer(
        image_size=32, patch_size=8, width=32, layers=2, heads=2, mlp_ratio=3, ls_init_value=0.1, output_dim=12
    )
    randomised(tower)
    torch.save({f"visual.{name}": tensor for name, tensor in tower.state_dict().items()}, tmp_path / "scaled.pt")
    converted = convert(tmp_path / "scaled.pt", num_heads=2, act="gelu").build()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert (converted(pixels) - tower(pixels)).abs().max() < 2e-5
