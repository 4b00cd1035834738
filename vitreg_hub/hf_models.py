"""The same bundles in transformers: three models around timm's network, and their registration.

Tensor names on disk are timm's. In memory they have the prefix of the attribute that holds the network, which
transformers adds and removes by a rule that each model class gives it.
"""

import copy
from dataclasses import dataclass
from typing import Any, Unpack, cast

import timm
import torch
from timm.layers import LayerScale
from timm.models import VisionTransformer, adapt_input_conv
from torch import Tensor, nn
from transformers import PreTrainedModel, TimmWrapperConfig, TimmWrapperImageProcessor, initialization
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.modeling_outputs import BackboneOutput, BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.models import auto
from transformers.utils import TransformersKwargs, can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from vitreg_hub import environment
from vitreg_hub.arch import require_divisible
from vitreg_hub.bundle.config import read_entry
from vitreg_hub.bundle.provenance import Provenance, provenance_from_json, provenance_to_json
from vitreg_hub.errors import BundleError
from vitreg_hub.hf_config import VitRegConfig, default_names
from vitreg_hub.network.hf_attention import AttentionKernel, VitRegAttention, VitRegBlock
from vitreg_hub.network.kinds import STEM, kind_of
from vitreg_hub.network.untold import UNTOLD

SAVED_BY_TRANSFORMERS = "saved by transformers, started from: "


@dataclass
class VitRegModelOutput(BaseModelOutputWithPooling):
    """Output of `VitRegModel`; N = 1 + R + P tokens: class, registers, patches.

    Attributes:
        last_hidden_state: [B, N, D] all tokens after the final norm.
        pooler_output: [B, D] the class token, unless the weights were trained with another pooling; with a
            distillation token, the mean of both.
        hidden_states: [B, N, D] before the first block and after each block, before the final norm.
        attentions: [B, H, N, N] per block, rows sum to 1.
        register_tokens: [B, R, D] of `last_hidden_state`.
        patch_tokens: [B, P, D] of `last_hidden_state`, row by row.
    """

    register_tokens: Tensor | None = None
    patch_tokens: Tensor | None = None


class AdaptChannels(ConversionOps):
    """Loads the patches' convolution into a model for images with another number of channels, as timm does."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """Adapt the weight, if the model that is loaded has another number."""
        (found,) = input_dict.values()
        weight = found[0] if isinstance(found, list) else found
        wanted = kwargs["model"].get_parameter_or_buffer(kwargs["full_layer_name"]).shape[1]
        return {target_patterns[0]: adapt_input_conv(wanted, weight, weight.shape[1])}

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does: the model has its own number by then, so nothing."""
        return self


class VitRegPreTrainedModel(PreTrainedModel):
    """What the three models share: timm's network and how it is built, initialised, run and saved."""

    config: VitRegConfig
    base_model_prefix = "timm_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]
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

    def __init_subclass__(cls, **kwargs: Any) -> None:  # here, so that users' subclasses write bundles too
        super().__init_subclass__(**kwargs)
        prefix = WeightRenaming(r"^(?!timm_model\.)(.+)", r"timm_model.\1")
        stem = f"{STEM}.weight"
        channels = WeightConverter(stem, stem, [AdaptChannels()])
        register_checkpoint_conversion_mapping(cls.__name__, [prefix, channels], overwrite=True)

    def __init__(self, config: VitRegConfig, *, num_classes: int) -> None:
        super().__init__(config)
        network = timm.create_model(
            config.architecture,
            num_classes=num_classes,
            dynamic_img_size=True,  # identical at the native size
            block_fn=VitRegBlock,
            attn_layer=VitRegAttention,
            pretrained_cfg=config.pretrained_cfg,
            **config.model_args,
        )
        self.timm_model = cast(VisionTransformer, network)
        entry = read_entry(config.vitreg)
        self.untold = [(part, entry[part.key]) for part in UNTOLD]
        for part, value in self.untold:
            part.apply(self.timm_model, value)
        for module in self.timm_model.modules():
            if isinstance(module, AttentionKernel):
                module.config = self.config
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
        encoded = self._run(pixel_values, return_dict=True, **kwargs)  # pyright: ignore[reportCallIssue]  # for the decorator
        if encoded.hidden_states is not None:
            encoded["hidden_states"] = tuple(map(self._own_tokens, encoded.hidden_states))
        return encoded

    def _own_tokens(self, tokens: Tensor | None) -> Tensor | None:
        """A hidden state as the original model has it, before it was changed to be stored."""
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
        config, width = self.config, self.timm_model.num_classes  # of the head that is written
        names = tuple((config.id2label or {}).values())
        if width and len(names) != width and names != default_names(len(names)):
            raise BundleError(
                f"the model has {width} classes, but config.id2label names {len(names)}: name as many, or load the "
                "weights again with id2label, which makes a head of that width."
            )
        self.config = copy.deepcopy(config)
        self.config.num_labels = width
        old = provenance_from_json(config.vitreg["provenance"])
        # no figures: the weights may have changed since they were measured
        provenance = Provenance(
            origin=SAVED_BY_TRANSFORMERS + old.origin.removeprefix(SAVED_BY_TRANSFORMERS),
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
        tokens, first_patch = cast(Tensor, encoded.last_hidden_state), self.timm_model.num_prefix_tokens
        return VitRegModelOutput(
            **encoded,
            pooler_output=self.timm_model.forward_head(tokens),
            register_tokens=tokens[:, self.num_class_tokens : first_patch],
            patch_tokens=tokens[:, first_patch:],
        )


class VitRegForImageClassification(VitRegPreTrainedModel):
    """Register ViT with timm's head on the pooled tokens; registers are in no pooling."""

    def __init__(self, config: VitRegConfig) -> None:
        super().__init__(config, num_classes=config.num_labels or 0)
        self.num_labels = config.num_labels

    @can_return_tuple
    def forward(
        self, pixel_values: Tensor, labels: Tensor | None = None, **kwargs: Unpack[TransformersKwargs]
    ) -> ImageClassifierOutput:
        """Classify images; labels are [B] classes, or [B, num_labels] for several per image or regression."""
        encoded = self._encode(pixel_values, **kwargs)
        logits = self.timm_model.forward_head(cast(Tensor, encoded.last_hidden_state))
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
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]  # the others come by name
        self, pixel_values: Tensor, **kwargs: Unpack[TransformersKwargs]
    ) -> BackboneOutput:
        """Compute feature maps, [B, D, H/p, W/p] for each of `out_features`. Arguments as for `VitRegModel`."""
        encoded = self._encode(pixel_values, **kwargs)
        states = cast(tuple[Tensor, ...], encoded.hidden_states)  # the decorator asks for them
        maps: Any = tuple(self._feature_map(states[i], pixel_values) for i in self.out_indices)
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
    """Let transformers' auto classes return our models for our bundles. A second call changes nothing."""
    auto.AutoConfig.register(TimmWrapperConfig.model_type, VitRegConfig, exist_ok=True)
    auto.AutoModel.register(VitRegConfig, VitRegModel, exist_ok=True)
    auto.AutoModelForImageClassification.register(VitRegConfig, VitRegForImageClassification, exist_ok=True)
    auto.AutoBackbone.register(VitRegConfig, VitRegBackbone, exist_ok=True)
    # timm's own transforms either way
    processors: dict[str, type] = dict.fromkeys(("torchvision", "pil"), TimmWrapperImageProcessor)
    auto.AutoImageProcessor.register(VitRegConfig, image_processor_classes=processors, exist_ok=True)


register()
