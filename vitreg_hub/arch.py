"""THE table: which register ViTs exist. Everything else is derived from its rows; imports no torch.

An architecture is an upstream timm entrypoint (`ArchSpec.base`) plus JSON-safe overrides that add registers. The
entrypoint brings what JSON cannot carry: LayerNorm's epsilon, the SwiGLU class, the missing bias of CLIP's patches.
"""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vitreg_hub.errors import DataError, UnknownArchError

REGISTER_COUNTS = (0, 1, 2, 4, 8, 16)
"""The ablation of "Vision Transformers Need Registers" (arXiv 2309.16588, figure 8); 0 is the network without any."""

REGISTER_INIT_STD = 0.02
"""New registers are drawn from N(0, 0.02^2), as in DINOv3 (dinov3/models/vision_transformer.py, `init_weights`).

Registers have no positions, so equal ones get equal gradients and stay equal; timm's 1e-6 is nearly that.
"""

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True, slots=True)
class Family:
    """What all sizes of one lineage share.

    Attributes:
        img_size: Native image side in pixels.
        init_values: Initial LayerScale, None for a lineage without it.
        pre_norm: LayerNorm before the first block, and then no bias in the patch embedding (timm ties the two).
        mean: Of each channel, for pixels in [0, 1].
        crop_pct: Share of the resized image that the centre crop keeps.
        act: timm's name of the MLP's activation, where that is not SwiGLU.
    """

    img_size: int
    init_values: float | None = None
    pre_norm: bool = False
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    crop_pct: float = 1.0
    norm_eps: float = 1e-6
    act: str = "gelu"
    timm_class: str = "VisionTransformer"

    @property
    def distilled(self) -> bool:
        """Whether a distillation token with a head of its own follows the class token.

        Both have positions, and timm's class for it has no room for registers.
        """
        return self.timm_class == "VisionTransformerDistilled"


FAMILIES = {
    # dinov2/hub/backbones.py (img_size), dinov2/configs/ssl_default_config.yaml (student.layerscale).
    "dinov2": Family(img_size=518, init_values=1e-5),
    # deit/models_v2.py (`init_scale`), deit/README_revenge.md (evaluation crop ratio 1.0).
    "deit3": Family(img_size=224, init_values=1e-6),
    # open_clip/transformer.py `VisionTransformer`, open_clip/constants.py.
    "clip": Family(img_size=224, pre_norm=True, mean=CLIP_MEAN, std=CLIP_STD, norm_eps=1e-5),
    "clip_quickgelu": Family(
        img_size=224, pre_norm=True, mean=CLIP_MEAN, std=CLIP_STD, norm_eps=1e-5, act="quick_gelu"
    ),
    # ViT, DeiT, DINO; deit/main.py (`--eval-crop-ratio`: 224 / 256).
    "plain": Family(img_size=224, crop_pct=0.875),
    "deit_distilled": Family(img_size=224, crop_pct=0.875, timm_class="VisionTransformerDistilled"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ArchSpec:
    """One row. Look facts up here; never split the name.

    Attributes:
        family: Key of `FAMILIES`.
        size: Word for the width and depth.
        base: Upstream timm entrypoint that builds the network.
        num_registers: Register tokens, between the class token and the patches, without positions.
        embed_dim: Width D of a token.
        mlp_ratio: Output width of the MLP's first layer over D; with SwiGLU that layer holds gate and value.
        swiglu: Whether the MLP is timm's SwiGLUPacked (gate first).
        act_layer: timm's name of an activation that the base does not have already.
        own_img_size: Native side where it is not the family's.
    """

    family: str
    size: str
    base: str
    num_registers: int
    patch_size: int
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float = 4.0
    swiglu: bool = False
    act_layer: str | None = None
    own_img_size: int | None = None

    @property
    def name(self) -> str:
        """timm-style name, e.g. ``vit_base_reg4_deit3``; the DINOv2 family is the default and goes unnamed."""
        suffix = "" if self.family == "dinov2" else f"_{self.family}"
        return f"vit_{self.size}_reg{self.num_registers}{suffix}"

    @property
    def lineage(self) -> Family:
        """What all sizes of its family share."""
        return FAMILIES[self.family]

    @property
    def img_size(self) -> int:
        """Native image side in pixels."""
        return self.own_img_size or self.lineage.img_size

    @property
    def num_patches(self) -> int:
        """Patch tokens N of a native image."""
        return (self.img_size // self.patch_size) ** 2

    def model_args(self) -> dict[str, Any]:
        """Arguments that turn `base` into this row: JSON-safe and complete, whatever upstream's defaults become.

        The class token and the registers carry no position (`no_embed_class`), except with a distillation token.
        """
        args: dict[str, Any] = dict(
            img_size=[self.img_size, self.img_size],
            patch_size=self.patch_size,
            in_chans=3,
            embed_dim=self.embed_dim,
            depth=self.depth,
            num_heads=self.num_heads,
            mlp_ratio=self.mlp_ratio,
            init_values=self.lineage.init_values,
            reg_tokens=self.num_registers,
            no_embed_class=not self.lineage.distilled,
            global_pool="token",
            act_layer=self.act_layer,
        )
        return {key: value for key, value in args.items() if value is not None}

    @property
    def num_params(self) -> int:
        """Parameters of the backbone, without a classification head."""
        dim, pre_norm = self.embed_dim, self.lineage.pre_norm
        hidden = int(dim * self.mlp_ratio)
        stem = 3 * self.patch_size**2 * dim + (2 * dim if pre_norm else dim)  # norm_pre, or the patches' bias
        tokens = (1 + self.num_registers + self.num_patches) * dim
        if self.lineage.distilled:
            tokens += 3 * dim  # the second token, and the positions of both
        attention = 4 * dim * dim + 4 * dim
        mlp = dim * hidden + hidden + (hidden // 2 if self.swiglu else hidden) * dim + dim
        norms_and_scales = 4 * dim + (2 * dim if self.lineage.init_values else 0)
        return stem + tokens + self.depth * (attention + mlp + norms_and_scales) + 2 * dim


def _specs(
    family: str, size: str, base: str, patch_size: int, shape: tuple[int, int, int], **facts: Any
) -> Iterator[ArchSpec]:
    """A row for every number of registers, given width, depth and heads."""
    embed_dim, depth, num_heads = shape
    for number in (0,) if FAMILIES[family].distilled else REGISTER_COUNTS:
        yield ArchSpec(
            family=family,
            size=size,
            base=base,
            num_registers=number,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            **facts,
        )


def _rows() -> Iterator[ArchSpec]:
    # The toy row: for tests, the quickstart and the weights that ship with the package.
    yield from _specs("dinov2", "nano", "vit_small_patch14_dinov2", 4, (128, 4, 4), own_img_size=32)
    # dinov2/models/vision_transformer.py `vit_small` ... `vit_giant2`; tiny: deit/models.py `deit_tiny_patch16_224`.
    yield from _specs("dinov2", "tiny", "vit_small_patch14_dinov2", 14, (192, 12, 3))
    yield from _specs("dinov2", "small", "vit_small_patch14_dinov2", 14, (384, 12, 6))
    yield from _specs("dinov2", "base", "vit_base_patch14_dinov2", 14, (768, 12, 12))
    yield from _specs("dinov2", "large", "vit_large_patch14_dinov2", 14, (1024, 24, 16))
    # 2 * 4096 / 1536: gate and value of dinov2/layers/swiglu_ffn.py `SwiGLUFFNFused` for width 1536.
    yield from _specs(
        "dinov2", "giant", "vit_giant_patch14_dinov2", 14, (1536, 40, 24), mlp_ratio=2 * 4096 / 1536, swiglu=True
    )
    # deit/models_v2.py `deit_small_patch16_LS` ... `deit_huge_patch14_LS`.
    yield from _specs("deit3", "small", "deit3_small_patch16_224", 16, (384, 12, 6))
    yield from _specs("deit3", "medium", "deit3_medium_patch16_224", 16, (512, 12, 8))
    yield from _specs("deit3", "base", "deit3_base_patch16_224", 16, (768, 12, 12))
    yield from _specs("deit3", "large", "deit3_large_patch16_224", 16, (1024, 24, 16))
    yield from _specs("deit3", "huge", "deit3_huge_patch14_224", 14, (1280, 32, 16))
    # open_clip/model_configs ViT-B-16, ViT-L-14, ViT-H-14, ViT-g-14 (whose MLP is 6144 wide). OpenAI's and some later
    # weights use QuickGELU, which timm has under names of their own, except for the giant.
    for family, infix in (("clip", ""), ("clip_quickgelu", "quickgelu_")):
        giant: dict[str, Any] = {"act_layer": "quick_gelu"} if infix else {}
        yield from _specs(family, "base", f"vit_base_patch16_clip_{infix}224", 16, (768, 12, 12))
        yield from _specs(family, "large", f"vit_large_patch14_clip_{infix}224", 14, (1024, 24, 16))
        yield from _specs(family, "huge", f"vit_huge_patch14_clip_{infix}224", 14, (1280, 32, 16))
        yield from _specs(
            family, "giant", "vit_giant_patch14_clip_224", 14, (1408, 40, 16), mlp_ratio=6144 / 1408, **giant
        )
    # deit/models.py; timm's own `vit_large_patch16_224` and `vit_huge_patch14_224`.
    yield from _specs("plain", "tiny", "deit_tiny_patch16_224", 16, (192, 12, 3))
    yield from _specs("plain", "small", "deit_small_patch16_224", 16, (384, 12, 6))
    yield from _specs("plain", "base", "deit_base_patch16_224", 16, (768, 12, 12))
    yield from _specs("plain", "large", "vit_large_patch16_224", 16, (1024, 24, 16))
    yield from _specs("plain", "huge", "vit_huge_patch14_224", 14, (1280, 32, 16))
    yield from _specs("deit_distilled", "tiny", "deit_tiny_distilled_patch16_224", 16, (192, 12, 3))
    yield from _specs("deit_distilled", "small", "deit_small_distilled_patch16_224", 16, (384, 12, 6))
    yield from _specs("deit_distilled", "base", "deit_base_distilled_patch16_224", 16, (768, 12, 12))


ARCHS: dict[str, ArchSpec] = {spec.name: spec for spec in _rows()}


def require_divisible(img_size: int | Sequence[int], patch_size: int | Sequence[int]) -> None:
    """Refuse an image that would lose its last rows or columns: timm cuts them off silently. Sizes are in pixels.

    Raises:
        DataError: The patch does not divide the image.
    """
    height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
    patch = (patch_size, patch_size) if isinstance(patch_size, int) else tuple(patch_size)
    if height % patch[0] or width % patch[1]:
        raise DataError(
            f"an image of {height}x{width} pixels does not divide into patches of {patch[0]}x{patch[1]}: "
            f"resize or pad it to multiples of that."
        )


def require_whole_patches(timm_args: Mapping[str, Any]) -> None:
    """The same for arguments of a timm ViT, unless the model pads its images."""
    if not (timm_args.get("dynamic_img_pad") and timm_args.get("dynamic_img_size")):  # timm pads only with both
        require_divisible(timm_args["img_size"], timm_args["patch_size"])


def get_arch(name: str) -> ArchSpec:
    """Look up an architecture by name.

    Raises:
        UnknownArchError: The name is in no row; the message names the closest ones.
    """
    if name in ARCHS:
        return ARCHS[name]
    near = difflib.get_close_matches(name, ARCHS, n=3)
    raise UnknownArchError(
        f"no architecture {name!r}; closest: {', '.join(near) or 'none'}. "
        f"`vitreg list` prints all {len(ARCHS)}; a Hub repository needs the prefix 'hf-hub:'."
    )


def row(family: str, size: str, num_registers: int) -> ArchSpec:
    """The row for a number of registers: the one with that many, or else with the next smaller count.

    Raises:
        UnknownArchError: There is no such family or size, or it takes no registers.
    """
    specs = [spec for spec in ARCHS.values() if (spec.family, spec.size) == (family, size)]
    fitting = [spec for spec in specs if spec.num_registers <= num_registers]
    if not fitting or (num_registers and fitting[0].lineage.distilled):
        raise UnknownArchError(
            f"no architecture of family {family!r} and size {size!r} takes {num_registers} registers; "
            f"`vitreg list` prints all {len(ARCHS)}."
        )
    return max(fitting, key=lambda spec: spec.num_registers)
