"""The whole OpenCLIP model beside the bundle, in open_clip's own form, so that zero-shot still works."""

import json
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vitreg_hub.bundle.config import shapes_of
from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.checkpoint.safetensors_writer import write_safetensors
from vitreg_hub.conversion.formats.clip import ARCHIVE_NUMBERS
from vitreg_hub.conversion.planning.plan import Plan
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, new_folder


def tower_config(plan: Plan) -> Mapping[str, Any]:
    """The open_clip_config.json of a checkpoint with both towers, which fit open_clip's own class.

    Raises:
        ConversionError: open_clip is not installed, the checkpoint has no text tower, or its heads are unknown.
    """
    checkpoint, fmt = plan.tensors.checkpoint, plan.tensors.fmt
    if find_spec("open_clip") is None:
        raise ConversionError("--text-tower needs open_clip: pip install 'vitreg_hub[clip]'.")
    if not fmt.has_text_tower:
        raise ConversionError(f"{checkpoint.called} is {fmt.title}: only OpenCLIP's text towers are kept.")
    if not any("token_embedding" in name for name in checkpoint.infos):
        raise ConversionError(f"{checkpoint.called} has no text tower.")
    config = checkpoint.openclip_config or _config(plan)
    found, wanted = _shapes(checkpoint), _wanted_shapes(checkpoint, config["model_cfg"])
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        raise ConversionError(
            f"{checkpoint.called} does not fit open_clip's model: {len(wrong)} tensors differ, first {wrong[0]}; put "
            f"its {OPENCLIP_CONFIG} beside the weights."
        )
    return config


def write_towers(folder: Path, checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Write both towers to a new folder, which `open_clip` loads as ``local-dir:FOLDER``.

    Raises:
        BundleError: The folder exists or cannot be written.
    """
    with new_folder(folder) as staging:
        (staging / OPENCLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        shapes = _shapes(checkpoint)
        write_safetensors(staging / OPENCLIP_WEIGHTS, shapes, lambda name: checkpoint.read(name).contiguous())


def _shapes(checkpoint: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that open_clip's class has too."""
    return {name: info.shape for name, info in sorted(checkpoint.infos.items()) if name not in ARCHIVE_NUMBERS}


def _wanted_shapes(checkpoint: Checkpoint, model_cfg: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    import open_clip  # an extra

    kind = open_clip.CustomTextCLIP if "text.ln_final.weight" in checkpoint.infos else open_clip.CLIP
    try:
        with torch.device("meta"):
            model = kind(**{key: value for key, value in model_cfg.items() if key != "custom_text"})
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError, OSError, ImportError) as error:
        reason = str(error).partition("\n")[0]
        raise ConversionError(f"open_clip cannot build the model of {checkpoint.called}: {reason}.") from error
    return shapes_of(model.state_dict())


def _config(plan: Plan) -> dict[str, Any]:
    """open_clip's configuration of a bare checkpoint; all of open_clip's text towers have heads of 64 channels."""
    checkpoint, args, images = plan.tensors.checkpoint, plan.config.model_args, plan.config.preprocess
    infos = checkpoint.infos
    if "token_embedding.weight" not in infos or "text_projection" not in infos:
        raise ConversionError(
            f"{checkpoint.called} has a text tower of its own kind: put its {OPENCLIP_CONFIG} beside it."
        )
    width = infos["token_embedding.weight"].shape[1]
    if width % 64:
        raise ConversionError(
            f"{checkpoint.called} has a text tower of width {width}, and no tensor tells its heads: put its "
            f"{OPENCLIP_CONFIG} beside the weights."
        )
    height, width_in_pixels = (rows * args["patch_size"] for rows in plan.native)
    model = dict(
        embed_dim=infos["text_projection"].shape[1],
        quick_gelu=plan.config.activation == "quick_gelu",
        vision_cfg=dict(
            image_size=height if height == width_in_pixels else [height, width_in_pixels],
            layers=args["depth"],
            width=args["embed_dim"],
            head_width=args["embed_dim"] // args["num_heads"],
            mlp_ratio=args["mlp_ratio"],
            patch_size=args["patch_size"],
        ),
        text_cfg=dict(
            context_length=infos["positional_embedding"].shape[0],
            vocab_size=infos["token_embedding.weight"].shape[0],
            width=width,
            heads=width // 64,
            layers=len({name.split(".")[2] for name in infos if name.startswith("transformer.resblocks.")}),
        ),
    )
    preprocess = dict(mean=list(images.mean), std=list(images.std), interpolation="bicubic")
    return dict(model_cfg=model, preprocess_cfg=preprocess)
