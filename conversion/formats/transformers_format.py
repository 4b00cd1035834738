"""transformers' folders: what their configs tell, how configs are written, and its models as reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from vitreg_hub.conversion.formats.base import CheckpointFormat, Outputs
from vitreg_hub.conversion.formats.facts import Facts, height_and_width, names_in_order, unknown_keys
from vitreg_hub.errors import ConversionError
from vitreg_hub.files import CONFIG_FILE, PREPROCESSOR_FILE
from vitreg_hub.network.position_rule import Grid

if TYPE_CHECKING:
    from torch import Tensor

    from vitreg_hub.bundle.model_bundle import ModelBundle
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu", "relu": "relu", "silu": "silu", "swish": "silu"}
ACTIVATIONS |= {"gelu_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
"""transformers' names of activations, and timm's."""

OLD_KEYS = set(
    """
    _name_or_path add_cross_attention architectures bad_words_ids chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id dropout dtype finetuning_task id2label initializer_factor
    is_decoder is_encoder_decoder label2id model_type num_labels output_attentions output_hidden_states
    output_scores pad_token_id prefix problem_type projection_dim pruned_heads return_dict return_dict_in_generate
    sep_token_id task_specific_params text_config text_config_dict tf_legacy_loss tie_encoder_decoder
    tie_word_embeddings tokenizer_class torch_dtype torchscript transformers_version use_bfloat16 vision_config
    vision_config_dict
    """.split()  # noqa: SIM905
)
"""What every config.json of transformers may hold, beside the settings of its kind; nothing of it is about a ViT."""
IMAGE_KEYS = set(
    """
    crop_size do_center_crop do_convert_rgb do_normalize do_rescale do_resize feature_extractor_type image_mean
    image_processor_type image_std processor_class resample rescale_factor return_tensors size size_divisor use_fast
    _processor_class _valid_processor_keys data_format default_to_square device disable_grouping input_data_format
    do_pad pad_size image_seq_length antialias
    """.split()  # noqa: SIM905
)
"""What a preprocessor_config.json may hold."""

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
    configs: ClassVar[tuple[str, ...]] = (CONFIG_FILE, PREPROCESSOR_FILE)
    is_folder: ClassVar[bool] = True

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        images = dict(self._read_images(checkpoint.preprocessor))
        unread = _unread_images(checkpoint.preprocessor)
        if not checkpoint.config:
            if self.norm_eps is None:
                raise ConversionError(
                    f"{checkpoint.called} is {self.title}, whose epsilon, activation and heads stand in config.json: "
                    "put that beside the weights, or give the folder."
                )
            return Facts(preprocess=images, unread=unread)
        given = checkpoint.config.get("vision_config", checkpoint.config)
        labels = names_in_order(given_labels := dict(checkpoint.config.get("id2label") or {}))
        if given_labels and labels is None:
            unread += ("id2label, whose numbers are not those of classes",)
        known = _class(self.config_class)().to_dict().keys() | _class("GenerationConfig")().to_dict().keys() | OLD_KEYS
        unread += unknown_keys(given, known)
        if given is not checkpoint.config:
            unread += unknown_keys(checkpoint.config, known | _class("CLIPConfig")().to_dict().keys())
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
            label_names=None if labels == tuple(f"LABEL_{i}" for i in range(len(labels or ()))) else labels,
            unread=unread,
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

    def run_reference(self, checkpoint: Checkpoint, bundle: ModelBundle, images: Tensor, *, native: Grid) -> Outputs:
        import torch
        import transformers

        from vitreg_hub.conversion.checkpoint.file_kinds import WEIGHT_NAMES

        usual = [name for name in WEIGHT_NAMES if (checkpoint.folder / name).exists()]
        if len(checkpoint.files) == 1 and checkpoint.files[0].name not in usual[:1]:
            raise ConversionError("transformers reads folders only, with its own file names")
        name = self._class_for(bundle)
        with _quiet_transformers():
            model = _class(name).from_pretrained(checkpoint.folder, local_files_only=True, dtype=torch.float32).eval()
        return f"{name} of transformers {transformers.__version__}", self._outputs(model, images, native != bundle.grid)

    def _class_for(self, bundle: ModelBundle) -> str:
        return self.head_class if self.head_class and bundle.num_classes else self.model_class

    def _outputs(self, model: Any, images: Tensor, is_resampled: bool) -> dict[str, Tensor]:
        # DINOv2 resamples without being asked
        how = {"interpolate_pos_encoding": True} if is_resampled and self.family != "dinov2" else {}
        found = model(images, **how)
        if "logits" in found:
            return {"tokens": model.base_model(images, **how).last_hidden_state, "output": found.logits}
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


def _unread_images(settings: Mapping[str, Any]) -> tuple[str, ...]:
    """What an image processor's settings hold that no bundle tells."""
    differs = {
        "do_resize": settings.get("do_resize") is False,
        "do_rescale": settings.get("do_rescale") is False,
        "rescale_factor": abs((settings.get("rescale_factor") or 1 / 255) - 1 / 255) > 1e-6,
        "resample": settings.get("resample") not in (None, *INTERPOLATIONS),
        "do_pad": bool(settings.get("do_pad")),
    }
    return (*unknown_keys(settings, IMAGE_KEYS), *(key for key, is_other in differs.items() if is_other))


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
