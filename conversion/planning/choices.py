"""Which row of the table a checkpoint becomes, with which overrides; what is ambiguous is refused."""

import math
from dataclasses import dataclass
from typing import Any, NoReturn

from timm.models import VisionTransformer

from vitreg_hub.arch import ARCHS, REGISTER_COUNTS, ArchSpec, get_arch, row
from vitreg_hub.conversion.formats.facts import Facts
from vitreg_hub.conversion.planning.assignment import Assignment, Structure
from vitreg_hub.errors import ConversionError
from vitreg_hub.network.kinds import kind_of
from vitreg_hub.network.position_rule import Grid
from vitreg_hub.network.residual_scale import scale_for, stream_norms

ACTS = ("gelu", "quick_gelu")

MAX_PATCHES = 2**20
"""No ViT reads more; a larger number is a typing error, and its table would fill the memory."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What the user asked for, as `convert` explains it; None leaves the choice to the checkpoint."""

    format: str = "auto"
    arch: str | None = None
    img_size: tuple[int, int] | None = None
    num_registers: int | None = None
    num_heads: int | None = None
    act: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Choices:
    """Decisions about the bundle, each based on tensors, config, format and request, in this order."""

    tensors: Assignment
    structure: Structure
    facts: Facts
    request: Request

    def __post_init__(self) -> None:
        for key, value in self.facts.shape.items():
            has = getattr(self.structure, key)
            if value not in (None, has):
                self._refuse(
                    f"has {key} {has}, but the config beside it says {value}: put the config of these weights there"
                )
        if self.request.act not in (None, *ACTS):
            self._refuse(f"cannot have the activation {self.request.act!r}: give --act {' or '.join(ACTS)}")

    @property
    def _asked(self) -> ArchSpec | None:
        """The row that the user asked for."""
        return get_arch(self.request.arch) if self.request.arch else None

    def num_registers(self) -> int:
        own, wanted = self.structure.num_registers, self.request.num_registers
        if wanted is None or wanted == own:
            return own
        if own:
            self._refuse(f"has {own} registers already; they can be kept, but not replaced by {wanted}")
        if wanted not in REGISTER_COUNTS:
            self._refuse(f"cannot get {wanted} registers: the table has {', '.join(map(str, REGISTER_COUNTS))}")
        return wanted

    def family(self) -> str:
        has = self.structure
        if has.swiglu and (not has.layer_scale or has.pre_norm or has.distilled or self.tensors.fmt.family == "deit3"):
            self._refuse("has a SwiGLU MLP in a network for which timm has none")
        if has.pre_norm:
            return "clip_quickgelu" if self.act() == "quick_gelu" else "clip"
        if has.distilled:
            return "plain" if self.num_registers() else "deit_distilled"
        if not has.layer_scale:
            return "plain"
        family = self.facts.family or self.tensors.fmt.family or (self._asked.family if self._asked else None)
        if family in ("dinov2", "deit3"):
            return family
        has_class_row = has.num_registers > 0 or not is_square(has.position_rows)
        return "dinov2" if has_class_row or has.swiglu else "deit3"

    def act(self) -> str:
        known, asked = self.facts.act, self.request.act
        if known is None and not self.structure.pre_norm:
            known = "gelu"  # of timm's VisionTransformer
        if known and asked and known != asked:
            self._refuse(f"has the activation {known}, not {asked}: leave --act out")
        if told := known or asked:
            return told
        if self._asked and self._asked.lineage.pre_norm:
            return self._asked.lineage.act
        self._refuse(
            "was trained with GELU or with QuickGELU, which no tensor tells: give --act gelu (OpenCLIP's LAION, "
            "DataComp and CommonPool models) or --act quick_gelu (OpenAI's, MetaCLIP's and DFN's)"
        )

    def num_heads(self) -> int:
        width, from_config, asked = self.structure.embed_dim, self.facts.num_heads, self.request.num_heads
        if None not in (from_config, asked) and from_config != asked:
            self._refuse(f"has {from_config} heads as the config beside it says, not {asked}: leave --num-heads out")
        from_arch = self._asked.num_heads if self._asked else None
        known = (from_config, asked, from_arch, self.tensors.fmt.heads.get(width))
        found = next((number for number in known if number is not None), None)
        if found is None:
            advice = f"a number that divides {width}"
            if width == 1280:
                advice = "16 or 20"
            elif width % 64 == 0:
                advice = f"often {width // 64}, 64 channels each"
            self._refuse(
                f"has width {width}, and no tensor tells the number of attention heads: give --num-heads ({advice})"
            )
        if found < 1 or width % found:
            self._refuse(f"has width {width}, which does not divide into {found} heads")
        return found

    def spec(self) -> ArchSpec:
        """The row of the table: the one asked for, the one that fits, or the family's nearest."""
        family, registers, has = self.family(), self.num_registers(), self.structure
        if self._asked:
            self._require_fit(self._asked, family, registers)
            return self._asked
        sizes = {spec.size for spec in ARCHS.values() if spec.family == family and spec.swiglu == has.swiglu}
        rows = [row(family, size, registers) for size in sizes]
        return min(rows, key=lambda spec: (abs(spec.embed_dim - has.embed_dim), abs(spec.depth - has.depth), spec.name))

    def native_grid(self) -> tuple[Grid, int]:
        """Height and width in patches of the position table, and its rows before those of the patches."""
        others = self._other_rows()
        patches = self.structure.position_rows - others
        patch_height, patch_width = self.structure.patch_size
        # the size that was asked for is the result's: it tells the table's only where this cannot be square
        size = self.facts.img_size or (None if is_square(patches) else self.request.img_size)
        if size:
            grid = (size[0] // patch_height, size[1] // patch_width)
            if grid[0] * grid[1] == patches:
                return grid, others
            if self.facts.img_size:
                self._refuse(
                    f"has positions for {patches} patches, but the config beside it says images of "
                    f"{size[0]}x{size[1]}: put the config of these weights there"
                )
        if not is_square(patches):
            self._refuse(
                f"has positions for {patches} patches, no square, and neither tensors nor config tell their height and "
                "width: give --img-size HEIGHT,WIDTH of the training images"
            )
        return (math.isqrt(patches), math.isqrt(patches)), others

    def image_size(self, native: Grid) -> tuple[int, int]:
        """Height and width in pixels for which the position table is made."""
        patch_height, patch_width = self.structure.patch_size
        size = self.request.img_size or (native[0] * patch_height, native[1] * patch_width)
        if math.prod(size) // (patch_height * patch_width) > MAX_PATCHES:
            self._refuse(f"cannot get positions for an image of {size[0]}x{size[1]}: more than {MAX_PATCHES} patches")
        return size

    def _other_rows(self) -> int:
        has = self.structure
        if self.facts.other_rows is not None:
            return 2 if has.distilled and self.facts.other_rows else self.facts.other_rows
        possible = {0, 1, 1 + has.num_registers, 1 + has.distilled}
        fitting = [number for number in sorted(possible) if is_square(has.position_rows - number)]
        if len(fitting) != 1:
            self._refuse(
                f"has {has.position_rows} positions, and no tensor tells which of them are for patches: "
                "convert it from a folder with timm's config.json"
            )
        return fitting[0]

    def model_args(self, spec: ArchSpec, size: Grid) -> dict[str, Any]:
        """Complete arguments of the row's entrypoint, for images of a height and width in pixels."""
        has, args = self.structure, spec.model_args()
        height, width = has.patch_size
        args |= dict(
            img_size=list(size),
            patch_size=height if height == width else [height, width],
            in_chans=has.in_chans,
            embed_dim=has.embed_dim,
            depth=has.depth,
            num_heads=self.num_heads(),
        )
        args[kind_of(spec).registers_argument] = self.num_registers()
        if int(has.embed_dim * spec.mlp_ratio) != has.hidden:
            args["mlp_ratio"] = has.hidden / has.embed_dim
            if int(has.embed_dim * args["mlp_ratio"]) != has.hidden:  # rounded down, and timm rounds down too
                args["mlp_ratio"] = (has.hidden + 0.5) / has.embed_dim
        if has.layer_scale and not spec.lineage.init_values:
            args["init_values"] = 1e-5  # any number: the weights replace it
        if not has.swiglu and self.act() != spec.lineage.act:
            args["act_layer"] = self.act()
        if not has.qkv_bias:
            args["qkv_bias"] = False
        if not has.proj_bias:
            args["proj_bias"] = False
        pooling = self.facts.global_pool or ("avg" if has.average else "token")
        args["global_pool"] = pooling
        if has.average != (pooling == "avg"):  # by default timm norms after the pooling where it averages
            args["fc_norm"] = has.average
        return args

    def residual_scale(self, network: VisionTransformer, spec: ArchSpec) -> float:
        """How many times larger the residual stream must be for the checkpoint's epsilon."""
        if self.facts.residual_scale != 1:
            return self.facts.residual_scale
        eps = self.facts.norm_eps
        if eps is None:
            eps = 1e-5 if self.structure.pre_norm else 1e-6  # of timm's CLIP and timm's others
        for norm in stream_norms(network):
            norm.eps = eps
        return scale_for(network, norm_eps=spec.lineage.norm_eps)

    def _require_fit(self, spec: ArchSpec, family: str, registers: int) -> None:
        has = self.structure
        if spec.family == family:
            registers = row(family, spec.size, registers).num_registers
        facts = {
            "family": (spec.family, family),
            "width": (spec.embed_dim, has.embed_dim),
            "depth": (spec.depth, has.depth),
            "heads": (spec.num_heads, self.num_heads()),
            "patch size": ((spec.patch_size, spec.patch_size), has.patch_size),
            "MLP width": (int(spec.embed_dim * spec.mlp_ratio), has.hidden),
            "SwiGLU": (spec.swiglu, has.swiglu),
            "registers": (spec.num_registers, registers),
        }
        wrong = [f"{fact} {mine}, not {theirs}" for fact, (theirs, mine) in facts.items() if mine != theirs]
        if wrong:
            add = "; new registers come with --registers" if spec.num_registers and not has.num_registers else ""
            self._refuse(f"is not {spec.name}: it has {', '.join(wrong)}{add}")

    def _refuse(self, what: str) -> NoReturn:
        raise ConversionError(f"{self.tensors.checkpoint.called} {what}.")


def is_square(number: int) -> bool:
    """Whether a number of patches is that of a square grid."""
    return number > 0 and math.isqrt(number) ** 2 == number
