"""What a network is: from its tensors, and what no tensor tells from the config beside it, the format, or the user."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import timm
import transformers
from timm.layers import GELUTanh, QuickGELU, SwiGLU
from timm.models.vision_transformer import Block
from torch import nn

from vitreg_hub.arch import ARCHS
from vitreg_hub.bundle.config import Preprocess, read_entry
from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.formats.rules import CheckpointFormat
from vitreg_hub.conversion.planning.assignment import Assignment
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.kinds import KINDS, kind_of
from vitreg_hub.network.positions import TIMM_RULE, PositionRule

ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of activations, and timm's."""

TRANSFORMERS_CONFIGS = {
    "hf-clip": transformers.CLIPVisionConfig,
    "hf-deit": transformers.DeiTConfig,
    "hf-dinov2": transformers.Dinov2Config,
    "hf-dinov2-with-registers": transformers.Dinov2WithRegistersConfig,
    "hf-vit": transformers.ViTConfig,
}
"""Whose defaults stand for what a config.json leaves out."""

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as preprocessor_config.json has them."""


MAX_DEPTH = 1000
"""Blocks that a config may ask timm to build."""

NO_NETWORK_ARGS = {
    "checkpoint_path",
    "pretrained",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "cache_dir",
    "features_only",
}
"""Arguments of `timm.create_model` that read files or change the class; a stranger's config may not give them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Structure:
    """What tensors tell.

    Attributes:
        embed_dim: Width D of a token.
        depth: Blocks.
        patch_size: Height and width of a patch in pixels.
        in_chans: Channels of the images.
        hidden: Outputs of the MLP's first layer.
        swiglu: Whether these are gate and value.
        layer_scale: Whether branches are scaled.
        pre_norm: Whether there is a norm before the first block.
        qkv_bias: Whether queries, keys and values have a bias.
        proj_bias: Whether the other layers of a block have one.
        num_registers: Registers.
        distilled: Whether there is a distillation token.
        position_rows: Rows of the position table.
        num_classes: Outputs of the head, 0 without one.
        average: Whether the norm follows the pooling, as in models that average patches.
    """

    embed_dim: int
    depth: int
    patch_size: tuple[int, int]
    in_chans: int
    hidden: int
    swiglu: bool
    layer_scale: bool
    pre_norm: bool
    qkv_bias: bool
    proj_bias: bool
    num_registers: int
    distilled: bool
    position_rows: int
    num_classes: int
    average: bool

    @classmethod
    def of(cls, tensors: Assignment) -> Self:
        """Read the structure from shapes.

        Raises:
            ConversionError: A tensor that decides it is missing or misshapen; the message has all other problems too.
        """
        dims = {
            "patch_embed.proj.weight": 4,
            "pos_embed": 3,
            "cls_token": 3,
            "blocks.0.attn.qkv.weight": 2,
            "blocks.0.mlp.fc1.weight": 2,
            "blocks.0.mlp.fc2.weight": 2,
        }
        dims |= {name: 3 for name in ("reg_token", "dist_token") if name in tensors}
        dims |= {name: 2 for name in ("head.weight",) if name in tensors}
        problems = [
            f"{tensors.source_of(name)} is missing"
            if name not in tensors
            else f"{tensors.source_of(name)} has shape {list(tensors.shape(name))}, wanted {number} dimensions"
            for name, number in dims.items()
            if len(tensors.shape(name)) != number
        ]
        blocks = {int(name.split(".")[1]) for name in tensors.parts if name.startswith("blocks.")}
        if gap := next((i for i in range(len(blocks)) if i not in blocks), None):
            problems.append(f"block {gap} is missing")
        if problems:
            tensors.refuse([*tensors.problems, *problems])
        hidden, inner = tensors.shape("blocks.0.mlp.fc1.weight")[0], tensors.shape("blocks.0.mlp.fc2.weight")[1]
        first_layers = [parts[0] for name, parts in tensors.parts.items() if name.endswith(".mlp.fc1.weight")]
        if hidden != 2 * inner and (gated := [name for name, rule in first_layers if rule.swiglu]):
            tensors.refuse([*tensors.problems, f"{gated[0]} must have gate and value for {inner} channels"])
        embed_dim, in_chans, *patch_size = tensors.shape("patch_embed.proj.weight")
        return cls(
            embed_dim=embed_dim,
            depth=len(blocks),
            patch_size=tuple(patch_size),
            in_chans=in_chans,
            hidden=hidden,
            swiglu=hidden == 2 * inner,
            layer_scale=any(name.endswith(".ls1.gamma") for name in tensors.parts),
            pre_norm="norm_pre.weight" in tensors,
            qkv_bias="blocks.0.attn.qkv.bias" in tensors,
            proj_bias="blocks.0.attn.proj.bias" in tensors,
            num_registers=tensors.shape("reg_token")[1] if "reg_token" in tensors else 0,
            distilled="dist_token" in tensors,
            position_rows=tensors.shape("pos_embed")[1],
            num_classes=tensors.shape("head.weight")[0] if "head.weight" in tensors else 0,
            average="fc_norm.weight" in tensors,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """What no tensor tells; None is not known.

    Attributes:
        family: Key of `vitreg_hub.arch.FAMILIES`.
        num_heads: Attention heads.
        norm_eps: LayerNorm epsilon.
        act: timm's name of the activation.
        img_size: Height and width in pixels.
        other_rows: Rows of the position table before those of the patches.
        global_pool: timm's name of the pooling, token or avg.
        positions: How positions are resampled.
        residual_scale: How many times larger the residual stream is stored; see `vitreg_hub.network.residual_scale`.
        preprocess: Fields of `Preprocess`, without the input size.
        label_names: Names of the classes.
        shape: Facts of `Structure` that the config gives too, for comparison.
    """

    family: str | None = None
    num_heads: int | None = None
    norm_eps: float | None = None
    act: str | None = None
    img_size: tuple[int, int] | None = None
    other_rows: int | None = None
    global_pool: str | None = None
    positions: PositionRule | None = None
    residual_scale: float = 1.0
    preprocess: Mapping[str, Any]
    label_names: tuple[str, ...] | None = None
    shape: Mapping[str, Any]


def told_by(checkpoint: Checkpoint, fmt: CheckpointFormat) -> Told:
    """Collect what the configs beside the weights say, and where they are silent what the format knows.

    Raises:
        ConversionError: A config contradicts itself or describes something else.
    """
    try:
        if fmt.library == "timm" and checkpoint.config.get("architecture"):
            said = _timm(checkpoint.config)
        elif fmt.library == "transformers":
            said = _transformers(checkpoint, fmt)
        elif fmt.library == "open_clip" and checkpoint.openclip_config:
            said = _openclip(checkpoint.openclip_config)
        else:
            said = {}
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError) as error:
        if isinstance(error, ConversionError):
            raise
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConversionError(
            f"the config beside {checkpoint.called} cannot be read as {fmt.title}'s ({reason})."
        ) from error
    facts = dict(norm_eps=fmt.norm_eps, act=fmt.act, other_rows=fmt.other_rows, positions=None)
    preprocess = dict(mean=fmt.mean, std=fmt.std, crop_pct=fmt.crop_pct) | said.pop("preprocess", {})
    known = {key: value for key, value in said.items() if value is not None}
    return Told(**{"shape": {}, **facts, **known, "preprocess": preprocess})


def _side(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = size if isinstance(size, list | tuple) else (size, size)
    return int(height), int(width)


def _whole(number: Any) -> int | None:
    if number is not None and int(number) != number:
        raise ValueError(f"{number!r} is no whole number")
    return number if number is None else int(number)


def _activation(name: Any) -> str:
    if name not in ACTIVATIONS:
        raise ConversionError(f"the activation {name!r} is none of {', '.join(sorted(ACTIVATIONS))}.")
    return ACTIVATIONS[name]


def _transformers(checkpoint: Checkpoint, fmt: CheckpointFormat) -> dict[str, Any]:
    given = checkpoint.config.get("vision_config", checkpoint.config)
    if fmt.needs_config and not checkpoint.config:
        raise ConversionError(
            f"{checkpoint.called} is {fmt.title}, whose epsilon, activation and heads stand in config.json: "
            "put that beside the weights, or give the folder."
        )
    config = (TRANSFORMERS_CONFIGS[fmt.name]().to_dict() | given) if checkpoint.config else {}
    labels = checkpoint.config.get("id2label")
    names = tuple(str(labels[key]) for key in sorted(labels, key=int)) if labels else None
    if names == tuple(f"LABEL_{i}" for i in range(len(names or ()))):
        names = None
    return dict(
        num_heads=_whole(config.get("num_attention_heads")),
        norm_eps=float(config["layer_norm_eps"]) if config else None,
        act=_activation(config["hidden_act"]) if "hidden_act" in config else None,
        img_size=_side(config.get("image_size")),
        preprocess=dict(_transformers_images(checkpoint.preprocessor, fmt)),
        label_names=names,
        shape={
            "embed_dim": given.get("hidden_size"),
            "depth": given.get("num_hidden_layers"),
            "patch_size": _side(given.get("patch_size")),
            "in_chans": given.get("num_channels"),
            "hidden": given.get("intermediate_size"),
            "swiglu": given.get("use_swiglu_ffn"),
            "num_registers": given.get("num_register_tokens"),
        },
    )


def _transformers_images(settings: Mapping[str, Any], fmt: CheckpointFormat) -> Iterator[tuple[str, Any]]:
    """transformers' image processor in timm's terms."""
    if fmt.name == "hf-vit":  # the defaults of ViTImageProcessor
        yield from {"interpolation": "bilinear", "crop_mode": "squash"}.items()
    for ours, theirs in ("mean", "image_mean"), ("std", "image_std"):
        if theirs in settings:
            yield ours, tuple(settings[theirs])
    if settings.get("do_normalize") is False:
        yield from {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}.items()
    if settings.get("resample") in INTERPOLATIONS:
        yield "interpolation", INTERPOLATIONS[settings["resample"]]
    size, crop = settings.get("size"), settings.get("crop_size")
    if not size:
        return
    # one number is the shorter side for CLIP's processor alone
    keeps_ratio = "shortest_edge" in size if isinstance(size, dict) else fmt.name == "hf-clip"
    side = (size.get("shortest_edge") or size["height"]) if isinstance(size, dict) else size
    cropped = (crop["height"] if isinstance(crop, dict) else crop) if settings.get("do_center_crop") else side
    yield from {"crop_mode": "center" if keeps_ratio else "squash", "crop_pct": (cropped or side) / side}.items()


def _openclip(config: Mapping[str, Any]) -> dict[str, Any]:
    model, images = config.get("model_cfg", {}), config.get("preprocess_cfg", {})
    vision = model["vision_cfg"]
    modes = {"shortest": "center", "squash": "squash"}
    if images.get("resize_mode", "shortest") not in modes:
        raise ConversionError(f"its images are resized by {images['resize_mode']!r}, which no bundle can tell.")
    said: dict[str, Any] = dict(
        preprocess={key: tuple(images[key]) for key in ("mean", "std") if key in images}
        | {"crop_mode": modes[images.get("resize_mode", "shortest")]}
        | ({"interpolation": images["interpolation"]} if "interpolation" in images else {}),
        img_size=_side(vision.get("image_size")),
    )
    if "timm_model_name" in vision:
        # open_clip/model.py, CLIPVisionCfg.timm_pool; "" is the network's own. The image size is not passed to timm
        pooling = vision.get("timm_pool", "avg")
        built = _facts_of(vision["timm_model_name"], {"num_classes": 0} | ({"global_pool": pooling} if pooling else {}))
        return said | built | {"img_size": None}
    if vision.get("pool_type", "tok") != "tok" or vision.get("attentional_pool"):
        raise ConversionError("this OpenCLIP tower pools otherwise than by its class token, which no bundle can hold.")
    if vision.get("act_kwargs") or vision.get("norm_kwargs", {}).keys() - {"eps"}:
        raise ConversionError("this OpenCLIP tower has arguments for activations or norms, which no bundle can hold.")
    width, layers = vision["width"], vision["layers"]
    return said | dict(
        num_heads=width // vision.get("head_width", 64),
        norm_eps=vision.get("norm_kwargs", {}).get("eps"),
        act="quick_gelu" if model.get("quick_gelu") else "gelu",
        shape={"embed_dim": width, "depth": layers, "patch_size": _side(vision.get("patch_size"))},
    )


def _timm(config: Mapping[str, Any]) -> dict[str, Any]:
    cfg, ours = config.get("pretrained_cfg") or {}, read_entry(config["vitreg"]) if config.get("vitreg") else {}
    args = dict(config.get("model_args") or {})
    if "img_size" not in args and "input_size" in cfg:
        args["img_size"] = list(cfg["input_size"][1:])
    preprocess = Preprocess.from_cfg({"input_size": (3, 1, 1), "mean": (), "std": ()} | dict(cfg))
    wanted = ("mean", "std", "crop_pct", "crop_mode", "interpolation")
    labels = config.get("label_names") or cfg.get("label_names")
    return _facts_of(config["architecture"], args) | dict(
        preprocess={key: getattr(preprocess, key) for key in wanted if getattr(preprocess, key)},
        positions=ours.get("positions", TIMM_RULE),
        residual_scale=ours.get("residual_scale"),
        family=ARCHS[ours["arch"]].family if ours else None,
        label_names=tuple(map(str, labels)) if isinstance(labels, list) else None,
    )


def _facts_of(architecture: str, args: dict[str, Any]) -> dict[str, Any]:
    """Facts of a timm model, read from its empty network."""
    if not timm.is_model(architecture):
        raise ConversionError(f"timm {timm.__version__} has no model {architecture!r}, which the config names.")
    if foreign := sorted(args.keys() & NO_NETWORK_ARGS):
        raise ConversionError(
            f"the config gives {', '.join(foreign)} to {architecture}, which do not describe a network."
        )
    if args.get("depth", 1) > MAX_DEPTH:
        raise ConversionError(f"the config gives {architecture} {args['depth']} blocks, which is no ViT.")
    model = timm.create_model(architecture, device="meta", **args)
    if type(model) not in [kind.timm_class for kind in KINDS.values()]:
        raise ConversionError(f"{architecture} is timm's {type(model).__name__}, not its VisionTransformer.")
    act = model.blocks[0].mlp.act
    acts = {nn.GELU: "gelu", QuickGELU: "quick_gelu", GELUTanh: "gelu_tanh", nn.SiLU: "silu", nn.ReLU: "relu"}
    if type(act) not in acts or isinstance(model.blocks[0].mlp, SwiGLU):
        raise ConversionError(f"{architecture} has an MLP that no row of the table has.")
    if type(model.blocks[0]) is not Block or not isinstance(model.blocks[0].norm1, nn.LayerNorm):
        raise ConversionError(f"{architecture} has blocks or norms that no row of the table has.")
    if model.global_pool not in ("token", "avg") or model.pool_include_prefix:
        raise ConversionError(f"{architecture} pools by {model.global_pool!r}, which these architectures do not.")
    return dict(
        num_heads=model.blocks[0].attn.num_heads,
        norm_eps=model.blocks[0].norm1.eps,
        act=acts[type(act)],
        img_size=model.patch_embed.img_size,
        other_rows=0 if model.no_embed_class else model.num_prefix_tokens,
        global_pool=model.global_pool,
        shape={
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "patch_size": model.patch_embed.patch_size,
            "num_registers": kind_of(model).num_registers(model),
            "hidden": model.blocks[0].mlp.fc1.out_features,
        },
    )


def exact_square(number: int) -> bool:
    """Whether a number of patches is that of a square grid."""
    return number > 0 and math.isqrt(number) ** 2 == number
