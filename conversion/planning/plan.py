"""Everything about a conversion that can be decided without reading the weights."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor

from vitreg_hub.arch import REGISTER_INIT_STD
from vitreg_hub.bundle.config import BundleConfig, Preprocess, empty_model, shapes_of
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.bundle.rules import rule_problems
from vitreg_hub.conversion.checkpoint.opening import Checkpoint
from vitreg_hub.conversion.formats.base import CheckpointFormat
from vitreg_hub.conversion.formats.detect import detect, find_format, refuse_look_alikes, without_useless_prefix
from vitreg_hub.conversion.formats.facts import Facts
from vitreg_hub.conversion.planning.assignment import Assignment, Structure, assign
from vitreg_hub.conversion.planning.choices import Choices, Request
from vitreg_hub.errors import BundleError, ConversionError, DataError
from vitreg_hub.files import CONFIG_FILE, OPENCLIP_CONFIG
from vitreg_hub.network.position_rule import Grid
from vitreg_hub.network.residual_scale import WRITES_TO_STREAM, can_scale

MAX_LEFT_OUT = 40
"""How many keys of a file a note names; weights come first."""

UNREADABLE = (TypeError, ValueError, LookupError, AttributeError, RuntimeError, AssertionError, ArithmeticError)
"""What reading somebody else's config can raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """A bundle to be: its configuration, and how each of its tensors is read or made.

    Attributes:
        config: Configuration of the bundle. The provenance in it only names the checkpoint.
        native: Height and width in patches of the checkpoint's position table.
        other_rows: Rows of this table before those of the patches.
    """

    choices: Choices
    config: BundleConfig
    wanted: Mapping[str, tuple[int, ...]]
    native: Grid
    other_rows: int

    @property
    def tensors(self) -> Assignment:
        """The checkpoint in timm's names."""
        return self.choices.tensors

    @property
    def num_new_registers(self) -> int:
        """Registers that the bundle has and the checkpoint does not."""
        return self.config.num_registers - self.choices.structure.num_registers

    @property
    def distillation_is_register(self) -> bool:
        """Whether the checkpoint's distillation token becomes a register, as the network has no other place for it."""
        return "dist_token" in self.tensors and "dist_token" not in self.wanted

    @property
    def num_untrained_registers(self) -> int:
        """Registers that are drawn at random."""
        return self.num_new_registers - (1 if self.distillation_is_register else 0)

    @property
    def rescaled_by(self) -> float:
        """How many times larger the bundle's residual stream is than the checkpoint's."""
        return self.config.residual_scale / self.choices.facts.residual_scale

    def dropped(self) -> dict[str, tuple[str, ...]]:
        """Names in the checkpoint that have no place in the bundle, by reason."""
        heads = tuple(parts[0][0] for name, parts in self.tensors.parts.items() if name.startswith("head_dist."))
        if not heads or not self.distillation_is_register:
            return dict(self.tensors.dropped)
        return {**self.tensors.dropped, "a network with registers has one head, on the class token": heads}

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

    def notes(self) -> Iterator[str]:
        """What a user should know, a sentence each; what had to be assumed comes last."""
        choice, checkpoint, fmt = self.choices, self.tensors.checkpoint, self.tensors.fmt
        yield from checkpoint.notes
        if new := self.num_untrained_registers:
            yield (
                f"{new} register{'s' if new > 1 else ''} drawn from N(0, {REGISTER_INIT_STD}^2), untrained: they cost "
                "accuracy until they are trained (github.com/huggingface/pytorch-image-models/issues/2046)"
            )
        if self.distillation_is_register:
            yield "the distillation token became the first register"
        if self.config.grid != self.native:
            old, new = (f"{height}x{width}" for height, width in (self.native, self.config.grid))
            yield f"positions of {old} patches were resampled to {new} by the lineage's own rule"
        if self.rescaled_by != 1:
            yield (
                f"the residual stream is stored {self.rescaled_by:g} times larger, which gives timm's LayerNorms the "
                "source's epsilon; un-normed block tokens of plain timm and plain transformers are larger by that"
            )
        kinds = sorted({info.dtype for info in checkpoint.infos.values()} & {"F16", "BF16", "F64"})
        if kinds:
            yield f"tensors of type {', '.join(kinds)} were cast to F32"
        yield from fmt.notes
        if checkpoint.left_out:
            more = len(checkpoint.left_out) - MAX_LEFT_OUT
            names = ", ".join(checkpoint.left_out[:MAX_LEFT_OUT])
            yield f"not read: {names}{f' and {more} more' if more > 0 else ''}"
        width, heads = choice.structure.embed_dim, choice.num_heads()
        usual = fmt.heads.get(width)
        if choice.facts.num_heads is None and usual not in (None, heads):
            yield f"{heads} heads as asked for; {fmt.title} has {usual} at width {width}"
        labels, classes = choice.facts.label_names, choice.structure.num_classes
        if labels and len(labels) != classes:
            yield f"the config's {len(labels)} label names are not kept: the head has {classes} outputs"
        if choice.facts.unread:
            yield f"not kept from the config beside the weights: {', '.join(choice.facts.unread[:MAX_LEFT_OUT])}"
        beside = {CONFIG_FILE: checkpoint.config, OPENCLIP_CONFIG: checkpoint.openclip_config}
        there = [name for name, content in beside.items() if content]
        if there and not set(there) & set(fmt.configs):
            yield f"{' and '.join(there)} beside the weights tell nothing here: {fmt.title} has no such file"
        yield from choice.facts.assumptions

    def made(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are not copies, as they come out for this checkpoint."""
        batch, _, width = self.tensors.shape("pos_embed")
        made = {"cls_token": self.tensors.shape("cls_token"), "pos_embed": (batch, self.wanted["pos_embed"][1], width)}
        if self.num_new_registers:
            made["reg_token"] = (1, self.num_new_registers, width)
        has_projection = "head.weight" in self.tensors and self.tensors.fmt.head_is_projection
        if has_projection and "head.bias" not in self.tensors:
            made["head.bias"] = self.wanted["head.bias"]
        for name in self.tensors.parts:
            if self.distillation_is_register and name.startswith(("dist_token", "head_dist.")):
                made[name] = self.tensors.shape(name)
        return made

    def make(self, name: str) -> Tensor:
        """Read or make a tensor, float32 and contiguous."""
        tensor = self._make(name)
        if self.rescaled_by != 1 and WRITES_TO_STREAM.fullmatch(name):
            tensor = tensor * self.rescaled_by
        return tensor.contiguous()

    def _make(self, name: str) -> Tensor:
        if name == "reg_token" and self.num_new_registers:
            return self._new_registers()
        if name == "head.bias" and name not in self.tensors:
            return torch.zeros(self.wanted[name])
        tensor = self.tensors.read(name)
        folded = 0 if "dist_token" in self.wanted else self.other_rows  # positions that are added to their tokens
        if name == "pos_embed":
            return self.config.positions.resample(tensor[:, folded:], old=self.native, new=self.config.grid)
        if name == "cls_token" and folded:
            return tensor + self.tensors.read("pos_embed")[:, :1]
        if name == "reg_token" and folded > 1:
            return tensor + self.tensors.read("pos_embed")[:, 1:folded]
        return tensor

    def _new_registers(self) -> Tensor:
        _, number, width = self.wanted["reg_token"]
        generator = torch.Generator().manual_seed(0)
        std = REGISTER_INIT_STD * self.choices.facts.residual_scale
        registers = torch.randn(1, number, width, generator=generator) * std
        if self.distillation_is_register:
            registers[:, :1] = self.tensors.read("dist_token") + self.tensors.read("pos_embed")[:, 1:2]
        return registers


def make_plan(checkpoint: Checkpoint, request: Request) -> Plan:
    """Decide what a checkpoint becomes.

    Raises:
        ConversionError: It does not fit its format, no bundle can hold it, or something is ambiguous.
        UnknownArchError: The table has no row `request.arch`.
    """
    checkpoint = without_useless_prefix(checkpoint)
    refuse_look_alikes(checkpoint)
    fmt = detect(checkpoint) if request.format == "auto" else find_format(request.format)
    tensors = assign(checkpoint, fmt)
    structure = Structure.of(tensors)
    facts = _facts(checkpoint, fmt)
    try:
        choice = Choices(tensors=tensors, structure=structure, facts=facts, request=request)
        spec, (native, other_rows) = choice.spec(), choice.native_grid()
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
    plan = Plan(
        choices=choice,
        config=replace(config, residual_scale=scale),
        wanted=shapes_of(network.state_dict()),
        native=native,
        other_rows=other_rows,
    )
    tensors.require_fit(plan.wanted, made=plan.made())
    return plan


def _facts(checkpoint: Checkpoint, fmt: CheckpointFormat) -> Facts:
    """What the configs beside the weights tell, and for what they leave out, what the lineage always has."""
    try:
        facts = fmt.read_config(checkpoint)
    except ConversionError:
        raise
    except UNREADABLE as error:
        reason = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        raise ConversionError(
            f"the config beside {checkpoint.called} cannot be read as {fmt.title}'s ({reason})."
        ) from error
    return replace(
        facts,
        norm_eps=fmt.norm_eps if facts.norm_eps is None else facts.norm_eps,
        act=fmt.act if facts.act is None else facts.act,
        other_rows=fmt.other_rows if facts.other_rows is None else facts.other_rows,
        preprocess={"mean": fmt.mean, "std": fmt.std, "crop_pct": fmt.crop_pct, **facts.preprocess},
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
    raise ConversionError(
        f"{choice.tensors.checkpoint.called} cannot become a bundle of {spec.name}: {'; '.join(problems)}"
    )
