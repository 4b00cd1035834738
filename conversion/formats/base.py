"""What a checkpoint format is: one record of everything that sets a lineage apart."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from vitreg_hub.arch import IMAGENET_MEAN, IMAGENET_STD
from vitreg_hub.conversion.formats.facts import Facts
from vitreg_hub.conversion.formats.rules import Rule
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.position_rule import TIMM_RULE, Grid, PositionRule

if TYPE_CHECKING:
    from torch import Tensor

    from vitreg_hub.bundle.model_bundle import ModelBundle
    from vitreg_hub.conversion.checkpoint.opening import Checkpoint

Outputs: TypeAlias = "tuple[str, Mapping[str, Tensor]]"
"""Of a reference implementation: its name, and what it computed."""

LAYER_SCALE = {"blocks.0.ls1.gamma": "LayerScale"}
PRE_NORM = {"norm_pre.weight": "norm before the first block"}
REGISTERS = {"reg_token": "registers"}
DISTILLATION = {"dist_token": "distillation token"}
"""Parts that some lineages always have: the name of one of its tensors in timm, and what to call it."""


@dataclass(frozen=True, kw_only=True)
class CheckpointFormat:
    """How one lineage stores a ViT, what its tensors cannot tell, and how a bundle is written in its form.

    A lineage that does something in its own way overrides a method; this class itself reads bare files of tensors that
    timm can load. Nothing here or in the files of the lineages loads torch, timm or transformers before it is called.

    Attributes:
        rules: Tensors of the vision tower, without prefix.
        outside: Tensors that may stand beside the tower, with their full names.
        prefixes: Prefixes that the tower's names may have; the first that occurs counts, other names are outside.
        respell: (pattern, replacement) for other spellings of the same name.
        marks: Patterns of names without prefix; a checkpoint in which each of them occurs has this format.
        family: Key of `vitreg_hub.arch.FAMILIES`; here and below, None where only a config, tensors or the user tell.
        act: timm's name of the activation.
        other_rows: Rows of the position table before those of the patches.
        positions: How the lineage resamples positions.
        registers_positions: The same for checkpoints with registers, where it differs.
        crop_pct: Share of the resized image that the evaluation's centre crop keeps.
        head_is_projection: Whether the head has no bias and makes embeddings in a space shared with texts.
        has_text_tower: Whether OpenCLIP's text tower may stand beside the tower.
        needs_prefix: Whether the tower's names always have one of the prefixes.
        alone_when_bare: Whether nothing may stand beside a tower whose names have no prefix.
        notes: What a user should know about every bundle made from such a checkpoint, a sentence each.
        no_reference: Why nobody else's code can run such a checkpoint, "" where it can.
        needs: Parts that every network of this lineage has; see `LAYER_SCALE`.
        writes_prefix: Whether all exports have the first of the prefixes.
        mask_token: Name of a token that only training uses; exports hold zeros for it.
        container: Key under which the lineage's .pth files hold the weights, "" without one.
        is_folder: Whether a checkpoint is a folder with configs beside the weights, rather than one file.
        keeps_residual_scale: Whether exports keep timm's epsilon and the scale of the bundle's residual stream.
    """

    name: str
    title: str
    rules: tuple[Rule, ...]
    outside: tuple[Rule, ...] = ()
    prefixes: tuple[str, ...] = ()
    respell: tuple[tuple[str, str], ...] = ()
    marks: tuple[str, ...] = ()
    family: str | None = None
    norm_eps: float | None = 1e-6
    act: str | None = "gelu"
    heads: Mapping[int, int] = field(default_factory=dict)
    other_rows: int | None = 1
    positions: PositionRule = TIMM_RULE
    registers_positions: PositionRule | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 1.0
    head_is_projection: bool = False
    has_text_tower: bool = False
    needs_prefix: bool = False
    alone_when_bare: bool = False
    notes: tuple[str, ...] = ()
    no_reference: str = ""
    is_exported: bool = True
    needs: Mapping[str, str] = field(default_factory=dict)
    writes_prefix: bool = False
    mask_token: str = ""
    container: str = ""
    configs: ClassVar[tuple[str, ...]] = ()
    """Names of the files beside the weights that `read_config` reads."""
    is_folder: ClassVar[bool] = False
    keeps_residual_scale: ClassVar[bool] = False

    def prefix_in(self, names: Collection[str]) -> str:
        """The prefix that the tower's names have in a checkpoint."""
        return next((p for p in self.prefixes if any(name.startswith(p) for name in names)), "")

    def _spelled(self, name: str, prefix: str) -> str:
        """A name of the tower without its prefix, in the spelling of the rules."""
        name = name.removeprefix(prefix)
        for pattern, replacement in self.respell:
            name = re.sub(pattern, replacement, name)
        return name

    def rules_of(self, names: Collection[str]) -> Iterator[tuple[str, list[tuple[Rule, str]]]]:
        """Every name with all rules that match it, and timm's name by each; one rule in a checkpoint of this format."""
        prefix = self.prefix_in(names)
        for name in names:
            is_inside = name.startswith(prefix)
            found = _matching(self.rules, self._spelled(name, prefix)) if is_inside else []
            may_be_outside = not (is_inside and (prefix or self.alone_when_bare))
            yield name, found or (_matching(self.outside, name) if may_be_outside else [])

    def num_known(self, names: Collection[str]) -> int:
        """How many of the names have a rule."""
        if self.needs_prefix and not self.prefix_in(names):
            return 0
        alike = _alike(names)
        return sum(alike[name] for name, found in self.rules_of(alike) if len(found) == 1)

    def tower_weights(self, checkpoint: Checkpoint) -> dict[str, Tensor]:
        """The weights under the lineage's names, without prefix and containers."""
        prefix = self.prefix_in(checkpoint.infos)
        names = [name for name in checkpoint.infos if name.startswith(prefix)]
        return {self._spelled(name, prefix): checkpoint.read(name) for name in names}

    def is_declared(self, checkpoint: Checkpoint) -> bool:
        """Whether the container or the config says that a checkpoint has this format."""
        return False

    def is_marked(self, names: Collection[str]) -> bool:
        """Whether the names bear all marks of the format."""
        names = _alike(names)
        prefix = self.prefix_in(names)
        if self.needs_prefix and not prefix:
            return False
        inside = [self._spelled(name, prefix) for name in names if name.startswith(prefix)]
        return bool(self.marks) and all(any(re.fullmatch(mark, name) for name in inside) for mark in self.marks)

    def read_config(self, checkpoint: Checkpoint) -> Facts:
        """What the configs beside the weights tell.

        Raises:
            ConversionError: Something that no bundle can hold, or no config where one is needed.
        """
        return Facts()

    def position_rule(self, *, has_registers: bool) -> PositionRule:
        """How the lineage resamples positions."""
        if has_registers and self.registers_positions:
            return self.registers_positions
        return self.positions

    def weights_at(self, checkpoint: Checkpoint, bundle: ModelBundle, native: Grid) -> dict[str, Tensor]:
        """`tower_weights` with positions for the bundle's grid, resampled as the lineage's own code does.

        This is written after that code once more (dinov2/models/vision_transformer.py, `interpolate_pos_encoding`), so
        that a fault of `PositionRule` shows. What timm resamples by itself is left to timm.
        """
        from torch import cat
        from torch.nn.functional import interpolate

        weights, rule, grid = self.tower_weights(checkpoint), bundle.positions, bundle.grid
        if grid == native or (rule == TIMM_RULE and native[0] == native[1]):
            return weights
        others, patches = weights["pos_embed"].tensor_split([-math.prod(native)], dim=1)
        how: dict[str, Any] = {"size": grid}
        if rule.offset:
            how = {"scale_factor": tuple((new + rule.offset) / old for new, old in zip(grid, native, strict=True))}
        image = patches.reshape(1, *native, -1).permute(0, 3, 1, 2)
        image = interpolate(image, mode="bicubic", antialias=rule.antialias, **how)
        return weights | {"pos_embed": cat([others, image.flatten(2).transpose(1, 2)], dim=1)}

    def run_reference(self, checkpoint: Checkpoint, bundle: ModelBundle, images: Tensor, *, native: Grid) -> Outputs:
        """Run a checkpoint in somebody else's implementation, here timm's with its own filter of checkpoints.

        Args:
            bundle: What it became, for the images' size and without new registers.
            images: [B, C, H, W].
            native: Height and width in patches of the checkpoint's position table.

        Returns:
            The implementation's name, and some of tokens [B, N, D], class token [B, D] and output [B, E].

        Raises:
            ConversionError: No implementation can run it, and why.
        """
        if self.no_reference:
            raise ConversionError(self.no_reference)
        from vitreg_hub.conversion.formats.timm_network import run_timm

        weights = self.weights_at(checkpoint, bundle, native)
        has_patches_only = self.tower_weights(checkpoint)["pos_embed"].shape[1] == math.prod(native)
        args = {**bundle.model_args, "no_embed_class": has_patches_only, "num_classes": bundle.num_classes}
        return run_timm(bundle.spec.base, args, weights, images, norm_eps=bundle.norm_eps)

    def obstacles(self, bundle: ModelBundle) -> Iterator[str]:
        """Why the format cannot hold a bundle, a clause each."""
        is_swiglu = bundle.spec.swiglu
        for tensor, part in self.needs.items():
            if tensor not in bundle.state_dict:
                yield f"it has no {part}"
        if len(set(bundle.model_args["img_size"])) > 1:
            yield "its images are not square"
        if self.act not in (None, bundle.activation) and not is_swiglu:
            yield f"its activation is {bundle.activation}"
        if self.norm_eps not in (None, bundle.norm_eps):
            yield f"its LayerNorms have epsilon {bundle.norm_eps:g}"
        if bundle.model_args["global_pool"] != "token":
            yield "its head averages patches"
        if is_swiglu and not any(rule.swiglu for rule in self.rules):
            yield "its MLP is SwiGLU"

    def export_prefix(self, bundle: ModelBundle) -> str:
        """What the tower's names begin with in an export; in transformers' models with a head they have a prefix."""
        has_prefix = self.writes_prefix or (self.is_folder and bundle.num_classes)
        return self.prefixes[0] if has_prefix else ""

    def config_files(self, bundle: ModelBundle) -> Mapping[str, Mapping[str, Any]]:
        """The configs beside the weights of an export, by file name.

        Raises:
            ConversionError: The configs cannot describe the bundle.
        """
        return {}


def _alike(names: Iterable[str]) -> Counter[str]:
    """Names of block 0 for those of all blocks, and of how many each is one: rules do not tell blocks apart."""
    return Counter(re.sub(r"(?<=\.)(0|[1-9]\d{0,3})(?=\.)", "0", name) for name in names)


def _matching(rules: Iterable[Rule], name: str) -> list[tuple[Rule, str]]:
    """The rules about a name, with timm's name."""
    return [(rule, target) for rule in rules if (target := rule.timm_name(name)) is not None]
