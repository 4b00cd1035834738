"""transformers' folders: what their configs tell, how configs are written, and its models as reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vitreg_hub.conversion.formats.base import CheckpointFormat, Outputs
from vitreg_hub.conversion.formats.facts import Facts, height_and_width
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import CONFIG_FILE, PREPROCESSOR_FILE

if TYPE_CHECKING:
    from torch import Tensor

    from vitreg_hub.bundle.model_bundle import ModelBundle
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= {"gelu_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of activations, and timm's."""

INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}
"""PIL's numbers, as preprocessor_config.json has them."""


@dataclass(frozen=True, kw_only=True)
class TransformersFormat(CheckpointFormat):
    """A family of transformers' models. Its classes are given by name, and loaded when they are needed.

    Attributes:
        config_class: The configuration, whose defaults fill in what a config.json leaves out.
        head_class: The model with a head, "" where no bundle can hold its head.
        image_defaults: What the usual image processor does by default, as fields of `Preprocess`.
        one_side_is_shorter: Whether a single number as the size of images means the shorter side.
    """

    config_class: str
    model_class: str
    head_class: str = ""
    image_processor: str = "BitImageProcessor"
    image_defaults: Mapping[str, Any] = field(default_factory=dict)
    one_side_is_shorter: bool = False
    is_folder: ClassVar[bool] = True

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        images = dict(self._read_images(checkpoint.preprocessor))
        if not checkpoint.config:
            if self.norm_eps is None:
                raise ConversionError(
                    f"{checkpoint.called} is {self.title}, whose epsilon, activation and heads stand in config.json: "
                    "put that beside the weights, or give the folder."
                )
            return Facts(preprocess=images)
        given = checkpoint.config.get("vision_config", checkpoint.config)
        config = _class(self.config_class)().to_dict() | given
        if config.get("hidden_act", "gelu") not in ACTIVATIONS:
            raise ConversionError(
                f"the activation {config['hidden_act']!r} is none of {', '.join(sorted(ACTIVATIONS))}."
            )
        return Facts(
            num_heads=_whole(config.get("num_attention_heads")),
            norm_eps=float(config["layer_norm_eps"]),
            act=ACTIVATIONS.get(config.get("hidden_act")),
            img_size=height_and_width(config.get("image_size")),
            preprocess=images,
            label_names=_label_names(checkpoint.config.get("id2label")),
            shape={
                "embed_dim": given.get("hidden_size"),
                "depth": given.get("num_hidden_layers"),
                "patch_size": height_and_width(given.get("patch_size")),
                "in_chans": given.get("num_channels"),
                "hidden": given.get("intermediate_size"),
                "swiglu": given.get("use_swiglu_ffn"),
                "num_registers": given.get("num_register_tokens"),
            },
        )

    def _read_images(self, settings: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        """An image processor's settings as fields of `Preprocess`; where a field comes twice the last one counts."""
        yield from self.image_defaults.items()
        for ours, theirs in ("mean", "image_mean"), ("std", "image_std"):
            if theirs in settings:
                yield ours, tuple(settings[theirs])
        if settings.get("do_normalize") is False:
            yield from {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}.items()
        if settings.get("resample") in INTERPOLATIONS:
            yield "interpolation", INTERPOLATIONS[settings["resample"]]
        size = settings.get("size")
        if not size:
            return
        keeps_ratio, side = self.one_side_is_shorter, size
        if isinstance(size, dict):
            keeps_ratio = "shortest_edge" in size
            side = size.get("shortest_edge") or size["height"]
        crop = settings.get("crop_size") if settings.get("do_center_crop") else None
        if isinstance(crop, dict):
            crop = crop["height"]
        yield "crop_mode", "center" if keeps_ratio else "squash"
        yield "crop_pct", (crop or side) / side

    def run_reference(self, checkpoint: Checkpoint, bundle: ModelBundle, images: Tensor) -> Outputs:
        import torch
        import transformers

        from vitreg_hub.conversion.checkpoint.opening import WEIGHT_NAMES

        usual = [name for name in WEIGHT_NAMES if (checkpoint.folder / name).exists()]
        if len(checkpoint.files) == 1 and checkpoint.files[0].name not in usual[:1]:
            raise ConversionError("transformers reads folders only, with its own file names")
        name = self._class_for(bundle)
        with _quiet_transformers():
            model = _class(name).from_pretrained(checkpoint.folder, local_files_only=True, dtype=torch.float32).eval()
        return f"{name} of transformers {transformers.__version__}", self._outputs(model, images)

    def _class_for(self, bundle: ModelBundle) -> str:
        return self.head_class if self.head_class and bundle.num_classes else self.model_class

    def _outputs(self, model: Any, images: Tensor) -> dict[str, Tensor]:
        found = model(images)
        if "logits" in found:
            return {"tokens": model.base_model(images).last_hidden_state, "output": found.logits}
        if "image_embeds" in found:
            return {"output": found.image_embeds}
        if self.head_is_projection:  # CLIP's last_hidden_state has not passed the final norm
            return {"class token": found.pooler_output}
        return {"tokens": found.last_hidden_state}

    def config_files(self, bundle: ModelBundle) -> Mapping[str, Mapping[str, Any]]:
        args, act = bundle.model_args, bundle.activation
        common = dict(
            hidden_size=args["embed_dim"],
            num_hidden_layers=args["depth"],
            num_attention_heads=args["num_heads"],
            image_size=args["img_size"][0],
            patch_size=args["patch_size"],
            num_channels=args["in_chans"],
            hidden_act={"gelu_tanh": "gelu_pytorch_tanh"}.get(act, act),
            # 1e-12 becomes 0.954e-12 when a scale stands for it
            layer_norm_eps=1e-12 if bundle.residual_scale == 1024 else bundle.norm_eps,
        )
        config = _class(self.config_class)(**common | self._own_settings(bundle))
        return {
            CONFIG_FILE: config.to_dict() | {"architectures": [self._class_for(bundle)]},
            PREPROCESSOR_FILE: self._image_settings(bundle),
        }

    def _own_settings(self, bundle: ModelBundle) -> dict[str, Any]:
        """Settings that not all families have: the MLP's width and the head."""
        settings: dict[str, Any] = {"intermediate_size": mlp_width(bundle)}
        if bundle.label_names and not self.head_is_projection:
            settings["id2label"] = dict(enumerate(bundle.label_names))
        elif bundle.num_classes:
            settings["projection_dim" if self.head_is_projection else "num_labels"] = bundle.num_classes
        return settings

    def _image_settings(self, bundle: ModelBundle) -> dict[str, Any]:
        """The settings of an image processor that resizes and crops as the bundle says."""
        images, side = bundle.preprocess, bundle.preprocess.input_size[1]
        resized = round(side / images.crop_pct)
        is_squashed = images.crop_mode == "squash"
        return dict(
            image_processor_type="DeiTImageProcessor" if is_squashed else self.image_processor,
            size={"height": resized, "width": resized} if is_squashed else {"shortest_edge": resized},
            do_center_crop=resized != side or not is_squashed,
            crop_size={"height": side, "width": side},
            do_resize=True,
            resample={name: number for number, name in INTERPOLATIONS.items()}.get(images.interpolation, 3),
            do_rescale=True,
            do_normalize=True,
            image_mean=list(images.mean),
            image_std=list(images.std),
        )


def mlp_width(bundle: ModelBundle) -> int:
    """Outputs of the first layer of a bundle's MLPs."""
    return bundle.state_dict["blocks.0.mlp.fc1.weight"].shape[0]


def _class(name: str) -> Any:
    import transformers

    return getattr(transformers, name)


def _whole(number: Any) -> int | None:
    if number is None:
        return None
    if int(number) != number:
        raise ValueError(f"{number!r} is not a whole number")
    return int(number)


def _label_names(labels: Mapping[str, Any] | None) -> tuple[str, ...] | None:
    """Names of classes in their order, None where they are only numbered."""
    if not labels:
        return None
    names = tuple(str(labels[key]) for key in sorted(labels, key=int))
    return None if names == tuple(f"LABEL_{i}" for i in range(len(names))) else names


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its report of unused tensors and its progress bar."""
    from transformers import logging

    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
