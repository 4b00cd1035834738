"""CLIP's vision towers: OpenAI's archive, OpenCLIP's checkpoints, and transformers' CLIP models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.metadata import version
from importlib.util import find_spec
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from vitreg_hub.arch import CLIP_MEAN, CLIP_STD
from vitreg_hub.conversion.formats.base import PRE_NORM, CheckpointFormat, Outputs
from vitreg_hub.conversion.formats.facts import Facts, height_and_width, unknown_keys
from vitreg_hub.conversion.formats.rules import Reshape, drop, keep, qkv, same
from vitreg_hub.conversion.formats.timm_format import NO_ANTIALIAS, TOWER, bare_facts, usual_images
from vitreg_hub.conversion.formats.transformers_format import TransformersFormat
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import OPENCLIP_CONFIG
from vitreg_hub.network.position_rule import Grid, PositionRule

if TYPE_CHECKING:
    from torch import Tensor

    from vitreg_hub.bundle.model_bundle import ModelBundle
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

TEXT_TOWER = "text tower; --text-tower keeps it"
ARCHIVE_NUMBERS = ("input_resolution", "context_length", "vocab_size")
"""What OpenAI's archive holds beside the weights."""
MODEL_KEYS = {"embed_dim", "quick_gelu", "vision_cfg", "text_cfg", "custom_text", "cast_dtype", "output_dict"}
MODEL_KEYS |= {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"}
IMAGE_KEYS = {"size", "mode", "mean", "std", "interpolation", "resize_mode", "fill_color"}
VISION_KEYS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "ls_init_value", "pool_type"}
VISION_KEYS |= {"patch_dropout", "attentional_pool", "attn_pooler_queries", "attn_pooler_heads", "no_ln_pre"}
VISION_KEYS |= {"pos_embed_type", "final_ln_after_pool", "output_tokens", "act_kwargs", "norm_kwargs"}
VISION_KEYS |= {f"timm_{name}" for name in ("model_name", "model_pretrained", "pool", "proj", "proj_bias", "drop")}
VISION_KEYS |= {"timm_drop_path", "block_type", "qk_norm", "scaled_cosine_attn", "scale_heads", "scale_attn"}
"""What an open_clip_config.json may hold (open_clip/model.py, `CLIP` and `CLIPVisionCfg`; transform.py)."""
CLASS_TOKEN_ONLY = "all tokens pass the final norm in a bundle, in the source only the class token does"

VISUAL = (
    keep("class_embedding", "cls_token", reshape=Reshape.TOKEN),
    keep("positional_embedding", "pos_embed", reshape=Reshape.TABLE),
    keep("conv1.weight", "patch_embed.proj.weight"),
    keep("ln_pre.{x}", "norm_pre.{x}"),
    keep("ln_post.{x}", "norm.{x}"),
    keep("proj", "head.weight", reshape=Reshape.TRANSPOSE),
    keep("transformer.resblocks.{i}.ln_{n}.{x}", "blocks.{i}.norm{n}.{x}"),
    keep("transformer.resblocks.{i}.attn.in_proj_{x}", "blocks.{i}.attn.qkv.{x}"),
    keep("transformer.resblocks.{i}.attn.out_proj.{x}", "blocks.{i}.attn.proj.{x}"),
    keep("transformer.resblocks.{i}.mlp.c_fc.{x}", "blocks.{i}.mlp.fc1.{x}"),
    keep("transformer.resblocks.{i}.mlp.c_proj.{x}", "blocks.{i}.mlp.fc2.{x}"),
    keep("transformer.resblocks.{i}.ls_{n}.gamma", "blocks.{i}.ls{n}.gamma"),
)

TEXT = (
    *drop("transformer.{rest}", "token_embedding.weight", "positional_embedding", "ln_final.{x}", why=TEXT_TOWER),
    *drop("text_projection", "text_projection.{x}", "text.{rest}", "logit_scale", "logit_bias", why=TEXT_TOWER),
)

CLIP: dict[str, Any] = {"mean": CLIP_MEAN, "std": CLIP_STD, "act": None, "head_is_projection": True}
"""What all of CLIP's formats share."""

OWN_TOWER: dict[str, Any] = CLIP | {
    "rules": VISUAL,
    "prefixes": ("visual.",),
    "alone_when_bare": True,
    "marks": ("class_embedding", r"conv1\.weight", r"transformer\.resblocks\.\d+\.ln_1\.weight"),
    "norm_eps": 1e-5,
    # width over head_width in open_clip/model_configs/*.json, without 1280, which has 16 there and 20 elsewhere
    "heads": {384: 6, 512: 8, 768: 12, 896: 14, 1024: 16, 1408: 16, 1664: 16, 1792: 16},
    "positions": PositionRule(antialias=True, keep_equal_count=True),
    "has_text_tower": True,
}
"""What OpenAI's and OpenCLIP's own towers share."""


class OpenClipFormat(CheckpointFormat):
    """OpenCLIP's own towers."""

    configs: ClassVar[tuple[str, ...]] = (OPENCLIP_CONFIG,)

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        if not checkpoint.openclip_config:
            return Facts(assumptions=(usual_images(self.title),))
        model = checkpoint.openclip_config.get("model_cfg", {})
        vision = model["vision_cfg"]
        if "timm_model_name" in vision:
            raise ConversionError(
                f"the config beside {checkpoint.called} names timm's {vision['timm_model_name']}, but these are "
                "tensors of OpenCLIP's own tower: put the config of these weights there."
            )
        if vision.get("pool_type", "tok") != "tok" or vision.get("attentional_pool"):
            raise ConversionError("this OpenCLIP tower does not pool by its class token, which no bundle can hold.")
        if vision.get("act_kwargs") or vision.get("norm_kwargs", {}).keys() - {"eps"}:
            raise ConversionError("this OpenCLIP tower has arguments for layers, which no bundle can hold.")
        width, layers = vision["width"], vision["layers"]
        return Facts(
            num_heads=width // vision.get("head_width", 64),
            norm_eps=vision.get("norm_kwargs", {}).get("eps"),
            act="quick_gelu" if model.get("quick_gelu") else "gelu",
            img_size=height_and_width(vision.get("image_size")),
            preprocess=_images_in(checkpoint.openclip_config),
            unread=_unread(checkpoint.openclip_config),
            shape={"embed_dim": width, "depth": layers, "patch_size": height_and_width(vision.get("patch_size"))},
        )

    def run_reference(self, checkpoint: Checkpoint, bundle: ModelBundle, images: Tensor, *, native: Grid) -> Outputs:
        if find_spec("open_clip") is None:
            raise ConversionError("open_clip is not installed: pip install 'vitreg_hub[clip]'")
        from open_clip.model import resize_pos_embed
        from open_clip.transformer import VisionTransformer
        from timm.layers import QuickGELU
        from torch import nn

        args: dict[str, Any] = {"init_values": None, **bundle.model_args}
        model = VisionTransformer(
            image_size=args["img_size"],
            patch_size=args["patch_size"],
            width=args["embed_dim"],
            layers=args["depth"],
            heads=args["num_heads"],
            mlp_ratio=args["mlp_ratio"],
            ls_init_value=args["init_values"],
            act_layer=QuickGELU if bundle.spec.lineage.act == "quick_gelu" else nn.GELU,
            output_dim=bundle.num_classes or args["embed_dim"],
        ).eval()
        if not bundle.num_classes:
            model.proj = None
        weights = {f"visual.{name}": tensor for name, tensor in self.tower_weights(checkpoint).items()}
        resize_pos_embed(weights, SimpleNamespace(visual=model))
        model.load_state_dict({name.removeprefix("visual."): tensor for name, tensor in weights.items()})
        return f"open_clip {version('open_clip_torch')}", {"output": model(images)}


class OpenAIFormat(OpenClipFormat):
    """OpenAI's archives, which hold the same tower."""

    def is_declared(self, checkpoint: Checkpoint) -> bool:
        """Whether a checkpoint is a TorchScript archive, or was saved from OpenAI's; other archives are refused."""
        if checkpoint.container != "torchscript" and not any(name in checkpoint.infos for name in ARCHIVE_NUMBERS):
            return False
        if not self.is_marked(checkpoint.infos):
            raise ConversionError(f"{checkpoint.called} is a TorchScript archive; only OpenAI's CLIP is read as one.")
        return True

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        """Usually nothing: all archives are alike."""
        return super().read_config(checkpoint) if checkpoint.openclip_config else Facts()


class OpenClipTimmFormat(CheckpointFormat):
    """OpenCLIP's models whose tower is timm's, which timm therefore can run."""

    configs: ClassVar[tuple[str, ...]] = (OPENCLIP_CONFIG,)

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        """What open_clip_config.json tells, and the timm network that it names."""
        if not checkpoint.openclip_config:
            return bare_facts(self.title, checkpoint)
        from vitreg_hub.conversion.formats.timm_network import facts_of_network

        vision = checkpoint.openclip_config["model_cfg"]["vision_cfg"]
        # open_clip/model.py, CLIPVisionCfg.timm_pool; "" is the network's own. The image size is not passed to timm
        pooling = vision.get("timm_pool", "avg")
        args = {"num_classes": 0, "global_pool": pooling} if pooling else {"num_classes": 0}
        built = facts_of_network(vision["timm_model_name"], args)
        config = checkpoint.openclip_config
        return dataclasses.replace(built, img_size=None, preprocess=_images_in(config), unread=_unread(config))


def _unread(config: Mapping[str, Any]) -> tuple[str, ...]:
    """The keys of an open_clip_config.json that nothing here knows."""
    model = config.get("model_cfg", {})
    return (
        *unknown_keys(config, ("model_cfg", "preprocess_cfg")),
        *unknown_keys(model, MODEL_KEYS),
        *unknown_keys(model["vision_cfg"], VISION_KEYS, inside="vision_cfg."),
        *unknown_keys(config.get("preprocess_cfg", {}), IMAGE_KEYS, inside="preprocess_cfg."),
    )


def _images_in(config: Mapping[str, Any]) -> dict[str, Any]:
    """What an open_clip_config.json tells about images, as fields of `Preprocess`."""
    images = config.get("preprocess_cfg", {})
    modes = {"shortest": "center", "squash": "squash"}
    mode = images.get("resize_mode", "shortest")
    if mode not in modes:
        raise ConversionError(f"its images are resized by {mode!r}, which no bundle can tell.")
    fields: dict[str, Any] = {key: tuple(images[key]) for key in ("mean", "std") if key in images}
    if "interpolation" in images:
        fields["interpolation"] = images["interpolation"]
    return fields | {"crop_mode": modes[mode]}


OPENCLIP = OpenClipFormat(
    name="openclip", title="OpenCLIP", outside=TEXT, needs=PRE_NORM, writes_prefix=True, **OWN_TOWER
)

OPENAI = OpenAIFormat(
    name="openai",
    title="OpenAI's CLIP",
    outside=(*TEXT, *drop(*ARCHIVE_NUMBERS, why="a number of OpenAI's archive, not a weight")),
    notes=(CLASS_TOKEN_ONLY,),
    is_exported=False,
    **dict(OWN_TOWER, act="quick_gelu"),
)

OPENCLIP_TIMM = OpenClipTimmFormat(
    name="openclip-timm",
    title="OpenCLIP with a timm tower",
    rules=(*TOWER, *same("reg_token", "norm_pre.{x}", "fc_norm.{x}", "head.{x}")),
    outside=(keep("visual.head.proj.{x}", "head.{x}"), *TEXT),
    prefixes=("visual.trunk.",),
    marks=(r"blocks\.\d+\.attn\.qkv\.weight", r"patch_embed\.proj\.weight"),
    needs_prefix=True,
    norm_eps=None,
    heads={192: 3, 384: 6, 512: 8, 768: 12, 1024: 16},
    other_rows=None,
    has_text_tower=True,
    is_exported=False,
    **CLIP,
)

HF_CLIP = TransformersFormat(
    name="hf-clip",
    title="transformers' CLIP",
    rules=(
        keep("embeddings.class_embedding", "cls_token", reshape=Reshape.TOKEN),
        keep("embeddings.position_embedding.weight", "pos_embed", reshape=Reshape.TABLE),
        *drop("embeddings.position_ids", why="a list of numbers, not a weight"),
        keep("embeddings.patch_embedding.weight", "patch_embed.proj.weight"),
        keep("pre_layrnorm.{x}", "norm_pre.{x}"),
        keep("post_layernorm.{x}", "norm.{x}"),
        keep("encoder.layers.{i}.layer_norm{n}.{x}", "blocks.{i}.norm{n}.{x}"),
        *qkv("encoder.layers.{i}.self_attn", "q_proj", "k_proj", "v_proj"),
        keep("encoder.layers.{i}.self_attn.out_proj.{x}", "blocks.{i}.attn.proj.{x}"),
        keep("encoder.layers.{i}.mlp.fc{n}.{x}", "blocks.{i}.mlp.fc{n}.{x}"),
    ),
    outside=(
        keep("visual_projection.weight", "head.weight"),
        *drop("text_model.{rest}", "text_projection.weight", "logit_scale", why="text tower"),
    ),
    prefixes=("vision_model.",),
    marks=(r"embeddings\.class_embedding", r"pre_layrnorm\.weight"),
    norm_eps=None,
    positions=NO_ANTIALIAS,
    notes=(CLASS_TOKEN_ONLY,),
    needs=PRE_NORM,
    writes_prefix=True,
    config_class="CLIPVisionConfig",
    model_class="CLIPVisionModel",
    head_class="CLIPVisionModelWithProjection",
    image_processor="CLIPImageProcessor",
    one_side_is_shorter=True,
    **CLIP,
)
