"""The same bundles in transformers: a configuration, three models around timm's network, and their registration.

Tensor names on disk are timm's. In memory they have the prefix of the attribute that holds the network, which
transformers adds and removes by a rule that each model class gives it.
"""

import copy
import dataclasses
import json
from typing import Any, Unpack

import timm
import torch
from timm.layers import LayerScale, to_2tuple
from timm.models import get_pretrained_cfg
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperImageProcessor, initialization
from transformers.backbone_utils import BackboneConfigMixin, BackboneMixin, filter_output_hidden_states
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models import auto
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from vitreg_hub import environment
from vitreg_hub.arch import ArchSpec, get_arch, require_divisible, row
from vitreg_hub.bundle.config import BundleConfig, Preprocess, read_entry
from vitreg_hub.bundle.provenance import Provenance, provenance_from_json, provenance_to_json
from vitreg_hub.bundle.rules import source_problems
from vitreg_hub.errors import BundleError
from vitreg_hub.network.hf_attention import AttentionKernel, VitRegAttention, VitRegBlock
from vitreg_hub.network.kinds import kind_of
from vitreg_hub.network.untold import UNTOLD

SAVED_BY_TRANSFORMERS = "saved by transformers, started from: "


def _model_arg(name: str) -> property:
    """A configuration attribute that lives in `model_args` under timm's name."""

    def write(config: "VitRegConfig", value: Any) -> None:
        config.model_args[name] = value
        config.pretrained_cfg["input_size"] = [config.num_channels, *config.model_args["img_size"]]

    return property(lambda config: config.model_args[name], write)


class VitRegConfig(BackboneConfigMixin, TimmWrapperConfig):
    """Configuration of a register ViT: a bundle's config.json in memory.

    Args:
        arch: Name of a row of the table (``vitreg list``).
        model_args: Arguments of the upstream timm entrypoint; completed from the row.
        apply_layernorm: Whether a backbone's feature maps pass the final norm.
        reshape_hidden_states: Whether a backbone's feature maps are [B, D, H, W] instead of [B, N, D].
        out_features: Names of a backbone's stages (``stem``, ``stage1`` ...); `out_indices` gives them by number.

    The usual names (`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `mlp_ratio`, `patch_size`, `image_size`,
    `num_channels`, `num_register_tokens`) can be read, set, and given as arguments.
    """

    vitreg: dict[str, Any] | None = None
    pretrained_cfg: dict[str, Any] | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    hidden_size = _model_arg("embed_dim")
    num_hidden_layers = _model_arg("depth")
    num_attention_heads = _model_arg("num_heads")
    mlp_ratio = _model_arg("mlp_ratio")
    patch_size = _model_arg("patch_size")
    num_channels = _model_arg("in_chans")
    _img_size = _model_arg("img_size")

    def __new__(cls, *args: Any, **kwargs: Any) -> "VitRegConfig | TimmWrapperConfig":
        """`AutoConfig.for_model("timm_wrapper", architecture=...)` asks for any timm model, not for one of ours."""
        if "architecture" in kwargs and not kwargs.get("vitreg"):
            return TimmWrapperConfig(*args, **kwargs)
        return super().__new__(cls)

    def __post_init__(self, arch: str = "vit_base_reg4", **kwargs: Any) -> None:
        spec = get_arch(self.vitreg["arch"] if self.vitreg else arch)
        cfg = dataclasses.asdict(get_pretrained_cfg(spec.name))
        args = spec.model_args() | (self.model_args or {})
        args["img_size"] = to_2tuple(args["img_size"])
        defaults = BundleConfig(
            arch=spec.name,
            model_args=args,
            num_classes=0,
            preprocess=Preprocess.from_cfg(cfg | {"input_size": [args["in_chans"], *args["img_size"]]}),
            provenance=Provenance(origin="random initialisation"),
        )
        defaults = json.loads(defaults.text())  # lists in place of tuples, as when read from disk
        self.architecture, self.model_args = spec.base, defaults["model_args"]
        self.vitreg = copy.deepcopy(self.vitreg) or defaults["vitreg"]
        self.pretrained_cfg = copy.deepcopy(self.pretrained_cfg) or defaults["pretrained_cfg"]
        self.pretrained_cfg.pop("num_classes", None)
        for said_elsewhere in "num_features", "global_pool", "label_names":
            kwargs.pop(said_elsewhere, None)
        # the names of the stages depend on the depth, so what sets the network's shape comes first
        for name in kwargs.keys() & {name for name, member in vars(VitRegConfig).items() if type(member) is property}:
            setattr(self, name, kwargs.pop(name))
        self.set_output_features_output_indices(
            out_features=kwargs.pop("out_features", None), out_indices=kwargs.pop("out_indices", None)
        )
        super().__post_init__(**kwargs)

    @property
    def spec(self) -> ArchSpec:
        """The row of the table."""
        return get_arch(self.vitreg["arch"])

    @property
    def residual_scale(self) -> float:
        """How many times larger the residual stream of the stored network is."""
        return float(self.vitreg.get("residual_scale", 1))

    @property
    def stage_names(self) -> list[str]:
        """Names of the residual stream before the first block and after each."""
        return ["stem", *(f"stage{i}" for i in range(1, self.num_hidden_layers + 1))]

    @property
    def image_size(self) -> int | list[int]:
        """Native side in pixels, or height and width where they differ."""
        height, width = self._img_size
        return height if height == width else [height, width]

    @image_size.setter
    def image_size(self, size: int | list[int]) -> None:
        self._img_size = list(to_2tuple(size))

    @property
    def num_register_tokens(self) -> int:
        """Number of registers; setting it moves to the row of the same size for so many."""
        return self.model_args[kind_of(self.spec).registers_argument]

    @num_register_tokens.setter
    def num_register_tokens(self, number: int) -> None:
        self.vitreg["arch"] = row(self.spec.family, self.spec.size, number).name
        self.model_args[kind_of(self.spec).registers_argument] = number

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "VitRegConfig | TimmWrapperConfig":
        """Read a config.json: ours, or any other timm repository's as if this package were not there."""
        if not config_dict.get("vitreg"):
            return TimmWrapperConfig.from_dict(config_dict, **kwargs)
        problems = list(source_problems(config_dict))
        try:
            read_entry(config_dict["vitreg"])
        except BundleError as error:
            problems.append(str(error))
        if problems:
            raise BundleError("config.json breaks the form of a bundle: " + "; ".join(problems))
        return super().from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What goes to disk: a bundle's config.json, and settings of transformers that differ from its defaults."""
        settings = super().to_diff_dict()
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        not_stored = ("model_type", "architectures", "dtype", "transformers_version", "num_labels", "label_names")
        settings = {k: v for k, v in settings.items() if k not in not_stored and v != defaults.get(k, not_stored)}
        if settings.get("out_indices") == [self.num_hidden_layers]:
            del settings["out_indices"], settings["out_features"]
        labels = tuple(self.id2label[i] for i in range(self.num_labels))
        config = BundleConfig(
            model_args=self.model_args,
            num_classes=self.num_labels,
            preprocess=Preprocess.from_cfg(self.pretrained_cfg),
            label_names=None if labels == tuple(f"LABEL_{i}" for i in range(self.num_labels)) else labels,
            **read_entry(self.vitreg),
        )
        return settings | config.to_json()


@dataclasses.dataclass
class VitRegModelOutput(BaseModelOutputWithPooling):
    """Output of `VitRegModel`; N = 1 + R + P tokens: class, registers, patches.

    Attributes:
        last_hidden_state: [B, N, D] all tokens after the final norm.
        pooler_output: [B, D] the class token, unless the weights were trained with another pooling; the mean of both
            with a distillation token.
        hidden_states: [B, N, D] before the first block and after each block, before the final norm.
        attentions: [B, H, N, N] per block, rows sum to 1.
        register_tokens: [B, R, D] of `last_hidden_state`.
        patch_tokens: [B, P, D] of `last_hidden_state`, row by row.
    """

    register_tokens: Tensor | None = None
    patch_tokens: Tensor | None = None


class VitRegPreTrainedModel(PreTrainedModel):
    """What the three models share: timm's network and how it is built, initialised, run and saved."""

    config: VitRegConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    model_tags = ["timm", "vitreg"]
    supports_gradient_checkpointing = True
    accepts_loss_kwargs = False
    _no_split_modules = ["VitRegBlock"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": VitRegBlock, "attentions": AttentionKernel}

    def __init_subclass__(cls, **kwargs: Any) -> None:  # here, so that subclasses of users write bundles too
        super().__init_subclass__(**kwargs)
        prefix = WeightRenaming(r"^(?!timm_model\.)(.+)", r"timm_model.\1")
        register_checkpoint_conversion_mapping(cls.__name__, [prefix], overwrite=True)

    def __init__(self, config: VitRegConfig, *, num_classes: int) -> None:
        super().__init__(config)
        self.timm_model = timm.create_model(
            config.architecture,
            num_classes=num_classes,
            dynamic_img_size=True,  # identical at the native size
            block_fn=VitRegBlock,
            attn_layer=VitRegAttention,
            pretrained_cfg=config.pretrained_cfg,
            **config.model_args,
        )
        entry = read_entry(config.vitreg)
        self.untold = [(part, entry[part.key]) for part in UNTOLD]
        for part, value in self.untold:
            part.apply(self.timm_model, value)
        for block in self.timm_model.blocks:
            block.attn.kernel.config = self.config
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LayerScale):
            initialization.constant_(module.gamma, module.init_values)
        if module is self.timm_model:
            kind = kind_of(module)
            initialization.trunc_normal_(getattr(module, kind.positions), std=self.config.initializer_range)
            for name, initialiser, std in kind.drawn:
                if (token := getattr(module, name)) is not None:
                    getattr(initialization, initialiser)(token, std=std)

    def _encode(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """[B, C, H, W] -> [B, N, D] after the final norm, with hidden states of the network that is not scaled."""
        encoded = self._run(pixel_values, return_dict=True, **kwargs)
        if encoded.hidden_states is not None:
            encoded["hidden_states"] = tuple(map(self._own_tokens, encoded.hidden_states))
        return encoded

    def _own_tokens(self, tokens: Tensor | None) -> Tensor | None:
        """A hidden state as the model itself has it, whatever was changed for storing it."""
        if tokens is not None:
            for part, value in self.untold:
                tokens = part.own_tokens(tokens, value)
        return tokens

    @capture_outputs(tie_last_hidden_states=False)
    def _run(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BaseModelOutputWithPooling:
        """Run the network; the decorator adds hidden states and attentions."""
        if not torch.compiler.is_compiling():
            require_divisible(pixel_values.shape[-2:], self.config.patch_size)
        return BaseModelOutputWithPooling(self.timm_model.forward_features(pixel_values.to(self.dtype)))

    def get_input_embeddings(self) -> nn.Module:
        """The projection of the patches."""
        return self.timm_model.patch_embed.proj

    def load_state_dict(self, state_dict: dict[str, Tensor], *args: Any, **kwargs: Any):
        """Also takes timm's names, which a trainer that resumes reads from disk."""
        prefix = f"{self.base_model_prefix}."
        named = {key if key.startswith(prefix) else prefix + key: tensor for key, tensor in state_dict.items()}
        return super().load_state_dict(named, *args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Write a bundle, without a card. Arguments as in transformers; adapters are written as PEFT does."""
        config = self.config
        self.config = copy.deepcopy(config)
        self.config.num_labels = self.timm_model.num_classes  # what is written has the head that this model has
        old = provenance_from_json(config.vitreg["provenance"])
        origin = SAVED_BY_TRANSFORMERS + old.origin.removeprefix(SAVED_BY_TRANSFORMERS)
        # no figures: the weights may have changed since they were measured
        provenance = Provenance(
            origin=origin,
            license=old.license,
            versions=environment.versions("transformers"),
            command=environment.command(),
            created=environment.now(),
        )
        self.config.vitreg["provenance"] = provenance_to_json(provenance)
        try:
            super().save_pretrained(*args, **kwargs)
        finally:
            self.config = config


class VitRegModel(VitRegPreTrainedModel):
    """Register ViT without a head: all tokens, by name."""

    _keys_to_ignore_on_load_unexpected = [r"head(_dist)?\."]

    def __init__(self, config: VitRegConfig) -> None:
        super().__init__(config, num_classes=0)
        self.num_class_tokens = kind_of(self.timm_model).num_class_tokens(self.timm_model)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> VitRegModelOutput:
        """Encode images.

        Args:
            pixel_values: [B, C, H, W], any height and width that the patch divides.
            **kwargs: `output_hidden_states` (True, or a list of indices), `output_attentions`, `return_dict`.

        Raises:
            DataError: The patch does not divide the image.
        """
        encoded = self._encode(pixel_values, **kwargs)
        tokens, first_patch = encoded.last_hidden_state, self.timm_model.num_prefix_tokens
        return VitRegModelOutput(
            **encoded,
            pooler_output=self.timm_model.forward_head(tokens),
            register_tokens=tokens[:, self.num_class_tokens : first_patch],
            patch_tokens=tokens[:, first_patch:],
        )


class VitRegForImageClassification(VitRegPreTrainedModel):
    """Register ViT with timm's head on the pooled tokens; registers are in no pooling."""

    def __init__(self, config: VitRegConfig) -> None:
        super().__init__(config, num_classes=config.num_labels)
        self.num_labels = config.num_labels

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Classify images.

        Args:
            pixel_values: As for `VitRegModel`.
            labels: [B] classes, or [B, num_labels] for several labels per image or regression.
            **kwargs: As for `VitRegModel`.
        """
        encoded = self._encode(pixel_values, **kwargs)
        logits = self.timm_model.forward_head(encoded.last_hidden_state)
        loss = self.loss_function(labels, logits, self.config) if labels is not None else None
        return ImageClassifierOutput(
            loss=loss, logits=logits, hidden_states=encoded.hidden_states, attentions=encoded.attentions
        )


class VitRegBackbone(BackboneMixin, VitRegPreTrainedModel):
    """Register ViT as a dense backbone: patch feature maps of chosen blocks, without class token and registers."""

    _keys_to_ignore_on_load_unexpected = [r"head(_dist)?\."]

    def __init__(self, config: VitRegConfig) -> None:
        super().__init__(config, num_classes=0)
        self.num_features = [config.hidden_size] * (config.num_hidden_layers + 1)

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        """Compute feature maps, [B, D, H/p, W/p] for each of `out_features`. Arguments as for `VitRegModel`."""
        encoded = self._encode(pixel_values, **kwargs)
        maps = tuple(self._feature_map(encoded.hidden_states[i], pixel_values) for i in self.out_indices)
        return BackboneOutput(feature_maps=maps, hidden_states=encoded.hidden_states, attentions=encoded.attentions)

    def _feature_map(self, tokens: Tensor, pixel_values: Tensor) -> Tensor:
        if self.config.apply_layernorm:
            for part, value in self.untold:
                tokens = part.stored_tokens(tokens, value)
            tokens = self.timm_model.norm(tokens)
        if not self.config.reshape_hidden_states:
            return tokens
        patches = tokens[:, self.timm_model.num_prefix_tokens :]
        height, width = (side // self.config.patch_size for side in pixel_values.shape[-2:])
        return patches.transpose(1, 2).unflatten(2, (height, width))


def register() -> None:
    """Let transformers' auto classes give our models for our bundles. A second call changes nothing."""
    auto.AutoConfig.register(TimmWrapperConfig.model_type, VitRegConfig, exist_ok=True)
    auto.AutoModel.register(VitRegConfig, VitRegModel, exist_ok=True)
    auto.AutoModelForImageClassification.register(VitRegConfig, VitRegForImageClassification, exist_ok=True)
    auto.AutoBackbone.register(VitRegConfig, VitRegBackbone, exist_ok=True)
    processors = dict.fromkeys(("torchvision", "pil"), TimmWrapperImageProcessor)  # timm's own transforms either way
    auto.AutoImageProcessor.register(VitRegConfig, image_processor_classes=processors, exist_ok=True)
