"""Both towers of a contrastive run in open_clip's own form, beside the bundle, so that zero-shot works there."""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.files import CONFIG_FILE, OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, new_folder, replaced_folder

logger = logging.getLogger(__name__)

RESIZE_MODES = {"center": "shortest", "squash": "squash", "border": "longest"}
"""open_clip's words for timm's crop modes."""


def save_open_clip(
    towers: Any, folder: str | Path, *, bundle: ModelBundle, trunk: str | None = None, replace: bool = False
) -> Path:
    """Write both towers to a new folder, which plain open_clip loads as ``local-dir:FOLDER``.

    open_clip passes only the image tower's name to timm, and neither registers nor an image size. But timm accepts a
    folder or a repository as a name, and builds what the config.json there says. So this folder contains the bundle's
    config.json and names itself: if it is moved, change `timm_model_name` in its open_clip_config.json.

    Args:
        trunk: Where timm will find the image tower's config.json, such as ``hf-hub:org/name``; None: in the folder.

    Raises:
        BundleError: The folder exists or cannot be written.
    """
    folder = Path(folder)
    config = _config(towers, bundle, trunk=trunk or f"local-dir:{folder.absolute()}")
    with (replaced_folder if replace else new_folder)(folder) as staging:
        (staging / OPENCLIP_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        (staging / CONFIG_FILE).write_text(bundle.text(), encoding="utf-8")
        save_file(dict(_tensors(towers, bundle)), staging / OPENCLIP_WEIGHTS, metadata={"format": "pt"})
    return folder


def _tensors(towers: Any, bundle: ModelBundle) -> Iterator[tuple[str, Tensor]]:
    """Yield weights under the names of open_clip's `CustomTextCLIP`, where the trunk has those of timm."""
    for name, tensor in bundle.state_dict.items():
        if not bundle.kind.is_of_head(name):
            yield f"visual.trunk.{name}", tensor
    yield "visual.head.proj.weight", _stored(towers.projection.weight)
    for name, tensor in towers.text.state_dict().items():
        yield f"text.{name}", _stored(tensor)
    yield "logit_scale", _stored(towers.logit_scale.squeeze(0))


def _stored(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _config(towers: Any, bundle: ModelBundle, *, trunk: str) -> dict[str, Any]:
    images, text = bundle.preprocess, towers.text
    if images.crop_pct != 1:
        logger.warning(
            "this model expects %g %% of an image's sides to be cut off, and open_clip cuts off nothing.",
            100 * (1 - images.crop_pct),
        )
    height, width = images.input_size[1:]
    vision = dict(
        image_size=height if height == width else [height, width],
        timm_model_name=trunk,
        timm_pool=bundle.model_args["global_pool"],
        timm_proj="linear",
    )
    words = dict(
        context_length=text.context_length,
        vocab_size=text.vocab_size,
        width=text.width,
        heads=text.heads,
        layers=text.transformer.layers,
    )
    return dict(
        model_cfg=dict(embed_dim=towers.projection.out_features, vision_cfg=vision, text_cfg=words, custom_text=True),
        preprocess_cfg=dict(
            mean=list(images.mean),
            std=list(images.std),
            interpolation=images.interpolation,
            resize_mode=RESIZE_MODES[images.crop_mode],
        ),
    )
