"""Everything about a conversion that can be decided without reading the weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub.arch import REGISTER_INIT_STD
from vitreg_hub.bundle.config import BundleConfig, Preprocess, empty_model, shapes_of
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.bundle.rules import rule_problems
from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.formats.base import CheckpointFormat
from vitreg_hub.conversion.formats.detect import detect, find_format, refuse_look_alikes
from vitreg_hub.conversion.planning.assignment import assign
from vitreg_hub.conversion.planning.choices import Choices, Request
from vitreg_hub.conversion.planning.structure import Structure
from vitreg_hub.conversion.planning.tensors import Assembly
from vitreg_hub.errors import BundleError, ConversionError, DataError
from vitreg_hub.network.residual_scale import can_scale


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A bundle to be, except for its weights.

    Attributes:
        config: Its configuration. The provenance in it only names the checkpoint.
        request: What the user asked for.
        assembly: Reads or makes every tensor.
        notes: What the user should know, a sentence each.
    """

    config: BundleConfig
    request: Request
    assembly: Assembly = field(repr=False)
    notes: tuple[str, ...]

    def bundle(self, state_dict: Mapping[str, Tensor], provenance: Provenance) -> ModelBundle:
        """The bundle of this plan and its weights."""
        return ModelBundle.of(replace(self.config, provenance=provenance), state_dict)

    @property
    def checkpoint(self) -> Checkpoint:
        """What is converted."""
        return self.assembly.tensors.checkpoint

    def network(self) -> dict[str, Any]:
        """What no tensor tells, in words."""
        config, rule = self.config, self.config.positions
        offset = f" offset {rule.offset:g}" if rule.offset else ""
        return {
            "heads": config.model_args["num_heads"],
            "epsilon": f"{config.norm_eps:.3g}",
            "activation": config.activation,
            "pooling": config.model_args["global_pool"],
            "positions": f"bicubic {'with' if rule.antialias else 'without'} antialias{offset}",
            "mean": "/".join(f"{value:.3g}" for value in config.preprocess.mean),
            "std": "/".join(f"{value:.3g}" for value in config.preprocess.std),
        }

    @property
    def fmt(self) -> CheckpointFormat:
        """The format of the checkpoint."""
        return self.assembly.tensors.fmt


def make_plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Decide what a checkpoint becomes.

    Raises:
        ConversionError: It does not fit its format, no bundle can hold it, or something is ambiguous.
        UnknownArchError: The table has no row `request.arch`.
    """
    refuse_look_alikes(checkpoint)
    fmt = detect(checkpoint) if request.format == "auto" else find_format(request.format)
    tensors = assign(checkpoint, fmt)
    structure = Structure.of(tensors)
    facts = fmt.facts_of(checkpoint)
    try:
        choice = Choices(checkpoint=checkpoint, fmt=fmt, structure=structure, facts=facts, request=request)
        spec, (native, other_rows), registers = choice.spec(), choice.native_grid(), choice.num_registers()
        size = choice.image_size(native)
        args = choice.model_args(spec, size)
    except ConversionError:
        tensors.refuse()  # its problems are the cause, if there are any
        raise
    config = BundleConfig(
        arch=spec.name,
        model_args=args,
        num_classes=structure.num_classes,
        preprocess=Preprocess(input_size=(structure.in_chans, *size), **facts.preprocess),
        provenance=Provenance(origin=checkpoint.called),
        label_names=facts.label_names if len(facts.label_names or ()) == structure.num_classes else None,
        positions=facts.positions or fmt.position_rule(has_registers=structure.num_registers > 0),
    )
    network, scale = _empty_network(config, choice)
    wanted = shapes_of(network.state_dict())
    assembly = Assembly(
        tensors=tensors,
        wanted=wanted,
        native=native,
        grid=tuple(network.patch_embed.grid_size),
        other_rows=other_rows,
        rule=config.positions,
        scale=scale,
        is_scaled=facts.residual_scale != 1,
        num_new_registers=registers - structure.num_registers,
    )
    tensors.require_fit(wanted, made=assembly.made())
    return Plan(
        config=replace(config, residual_scale=scale),
        assembly=assembly,
        request=request,
        notes=tuple(_notes(choice, assembly)),
    )


def _empty_network(config: BundleConfig, choice: Choices) -> tuple[VisionTransformer, float]:
    """The network of a bundle, which must be able to hold it, and how many times larger its residual stream is."""
    spec, facts = config.spec, choice.facts
    try:
        problems = list(rule_problems(config.to_json()))
        if not problems:
            network = empty_model(config, weight_init="skip")
            scale = choice.residual_scale(network, spec)
            if scale == 1 or can_scale(network):
                return network, scale
            problems.append(
                f"its LayerNorms have epsilon {facts.norm_eps:g}, not {spec.lineage.norm_eps:g}, which a bundle can "
                "only hold without LayerScale and without a norm before the first block"
            )
    except (BundleError, DataError, TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        problems = [str(error).partition("\n")[0]]
    raise ConversionError(f"{choice.checkpoint.called} cannot become a bundle of {spec.name}: {'; '.join(problems)}")


def _notes(choice: Choices, assembly: Assembly) -> Iterator[str]:
    """What a user should know, a sentence each; what had to be assumed comes last."""
    checkpoint, fmt = choice.checkpoint, choice.fmt
    if new := assembly.num_untrained_registers:
        yield (
            f"{new} register{'s' if new > 1 else ''} drawn from N(0, {REGISTER_INIT_STD}^2), untrained: they cost "
            "accuracy until they are trained (github.com/huggingface/pytorch-image-models/issues/2046)"
        )
    if assembly.distillation_is_register:
        yield "the distillation token became the first register"
    if assembly.grid != assembly.native:
        yield (
            f"positions of {assembly.native[0]}x{assembly.native[1]} patches were resampled to "
            f"{assembly.grid[0]}x{assembly.grid[1]} by the lineage's own rule"
        )
    if assembly.scale != 1 and not assembly.is_scaled:
        yield (
            f"the residual stream is stored {assembly.scale:g} times larger, which gives timm's LayerNorms the "
            "source's epsilon; un-normed block tokens of plain timm and plain transformers are larger by that"
        )
    kinds = sorted({info.dtype for info in checkpoint.infos.values()} & {"F16", "BF16", "F64"})
    if kinds:
        yield f"tensors of type {', '.join(kinds)} were cast to F32"
    yield from fmt.notes
    if checkpoint.left_out:
        yield f"not read: {', '.join(checkpoint.left_out[:6])}{' ...' if len(checkpoint.left_out) > 6 else ''}"
    width, heads = choice.structure.embed_dim, choice.num_heads()
    usual = fmt.heads.get(width)
    if choice.facts.num_heads is None and usual not in (None, heads):
        yield f"{heads} heads as asked for; {fmt.title} has {usual} at width {width}"
    yield from choice.facts.assumptions
