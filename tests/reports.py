"""Reports of models that do not exist, drawn from random numbers: what an analysis could have found."""

from dataclasses import replace

import numpy as np

from vitreg_hub.analysis.meters.histogram import EDGES, packed
from vitreg_hub.analysis.results import (
    QUANTILES,
    ArtifactReport,
    AttentionMass,
    BlockNorms,
    Cutoff,
    Example,
    GlobalInformation,
    ImageFacts,
    LocalInformation,
    LocalProbe,
    ModelFacts,
    OutlierPlaces,
    Redundancy,
    Similarities,
    TokenAccuracy,
)

SIMILARITY_BINS = 200


def report(
    name: str = "vit_synthetic",
    *,
    outliers: bool = True,
    registers: int = 0,
    class_tokens: int = 1,
    labels: bool = True,
    depth: int = 12,
    grid: tuple[int, int] = (16, 16),
    num_images: int = 64,
    num_params: int = 86_567_656,
    step: int | None = None,
    seed: int = 0,
) -> ArtifactReport:
    """A plausible report.

    Args:
        name: Of the model.
        outliers: About 2 % of the patch tokens are, from two thirds of the depth on; otherwise none ever is.
        registers: How many the model has.
        class_tokens: 0, 1 or 2.
        labels: The images have labels, so that they were classified.
        depth: Blocks.
        grid: Rows and columns of patches.
        num_images: Images.
        num_params: Parameters.
        step: Training step.
        seed: Of all numbers.
    """
    rng = np.random.default_rng(seed)
    patches = grid[0] * grid[1]
    places = rng.random((num_images, patches)) < rng.gamma(0.5, 0.05, patches).clip(0, 0.9)
    places[0, 0] = True
    first = 2 * depth // 3 if outliers else depth
    blocks = []
    for i in range(depth):
        norms = 12 * 1.14 ** (12 * i / depth) * np.exp(0.12 * rng.standard_normal(places.shape))
        if i >= first:
            norms = np.where(places, norms * (5 + rng.random(places.shape)), norms)
        blocks.append(_block(norms, outlier=places if i >= first else None, rng=rng, prefix=(class_tokens, registers)))
    seen = places.reshape(num_images, *grid) & outliers
    share = float(seen.mean())
    return ArtifactReport(
        model=ModelFacts(
            name=name,
            num_params=num_params,
            depth=depth,
            embed_dim=768,
            num_class_tokens=class_tokens,
            num_registers=registers,
            patch_size=(14, 14),
            step=step,
        ),
        images=ImageFacts(
            name="synthetic images",
            num_images=num_images,
            size=(14 * grid[0], 14 * grid[1]),
            grid=grid,
            preprocessing="resized to 256, cropped to the middle, normalised",
        ),
        block=depth - 1,
        blocks=tuple(blocks),
        places=OutlierPlaces(
            per_position=tuple(tuple(row) for row in seen.mean(axis=0).tolist()),
            per_image=tuple(np.bincount(seen.sum(axis=(1, 2))).tolist()),
        ),
        redundancy=Redundancy(
            normal=_similarities(rng.beta(9, 2, num_images * patches)),
            outlier=_similarities(rng.beta(40, 2, max(1, int(seen.sum())))) if outliers else None,
        ),
        local_information=LocalInformation(
            normal=_probe(0.417 + 0.02 * rng.random(), 0.79, 18.4, patches),
            outlier=_probe(0.228 + 0.02 * rng.random(), 5.09, 25.2, patches) if outliers else None,
            why_not=None if outliers else "the model has no outliers.",
        ),
        global_information=_global(outliers, registers, class_tokens, labels, rng),
        attention=_attention(class_tokens, registers, share),
        notes=("Numbers are random.", "Images of one size only."),
        versions={"torch": "2.9.0", "timm": "1.0.31"},
    )


def examples(of: ArtifactReport, num: int = 4, *, heads: int = 12, seed: int = 0) -> list[Example]:
    """Images with a bright disc, which stands out in all maps."""
    rng = np.random.default_rng(seed)
    rows, cols = of.images.grid
    height, width = of.images.size
    found = []
    for _ in range(num):
        centre = rng.uniform(0.3, 0.7, 2)

        def disc(shape, centre=centre):
            y, x = np.mgrid[: shape[0], : shape[1]]
            return np.exp(-(((y / shape[0] - centre[0]) ** 2 + (x / shape[1] - centre[1]) ** 2) * 20))

        outliers = (rng.random((rows, cols)) < 0.03) & (of.first_outlier_block is not None)
        norms = 40 + 6 * disc((rows, cols)) + rng.random((rows, cols)) + 200 * outliers
        attention = disc((rows, cols)) + 0.3 * rng.random((1 + of.model.num_registers, heads, rows, cols))
        attention /= attention.sum(axis=(2, 3), keepdims=True)
        found.append(
            Example(
                image=np.clip(disc((height, width))[..., None] * rng.random(3) + 0.2 * rng.random(3), 0, 1),
                norms=norms,
                outliers=outliers,
                class_attention=attention[0] if of.model.num_class_tokens else None,
                register_attention=attention[1:],
                components=np.clip(disc((rows, cols))[..., None] * rng.random(3) + 0.2 * rng.random(3), 0, 1),
            )
        )
    return found


def with_cutoff(of: ArtifactReport, cutoff: Cutoff) -> ArtifactReport:
    """The same report with another cutoff in the block that is looked at."""
    blocks = list(of.blocks)
    blocks[of.block] = replace(blocks[of.block], cutoff=cutoff)
    return replace(of, blocks=tuple(blocks))


def _block(norms, *, outlier, rng, prefix) -> BlockNorms:
    class_tokens, registers = prefix
    counts, _ = np.histogram(norms, EDGES.astype(float))
    if outlier is None:
        cutoff = Cutoff(value=None, source="none", why="the norms have one mode", separation=0.8, outlier_weight=0.4)
    else:
        low, high = float(norms[~outlier].max()), float(norms[outlier].min())
        value = (low * high) ** 0.5
        normal, upper = float(np.median(norms[~outlier])), float(np.median(norms[outlier]))
        cutoff = Cutoff(
            value=value,
            source="found",
            why="two modes, 11 standard deviations apart",
            separation=11.2,
            outlier_weight=float(outlier.mean()),
            normal_norm=normal,
            outlier_norm=upper,
        )
    median = float(np.median(norms))
    return BlockNorms(
        histogram=packed(counts),
        quantiles=tuple(float(value) for value in np.quantile(norms, QUANTILES)),
        mean=float(norms.mean()),
        cutoff=cutoff,
        outlier_fraction=0.0 if outlier is None else float((norms > cutoff.value).mean()),
        class_norms=tuple(median * (1.2 + 0.1 * rng.random()) for _ in range(class_tokens)),
        register_norms=tuple(median * (2 + 4 * rng.random()) for _ in range(registers)),
    )


def _similarities(values) -> Similarities:
    counts, _ = np.histogram(values, SIMILARITY_BINS, (-1, 1))
    return Similarities(num_patches=len(values), mean=float(values.mean()), counts=tuple(counts.tolist()))


def _probe(accuracy: float, distance: float, error: float, patches: int) -> LocalProbe:
    return LocalProbe(
        num_train=900,
        num_test=300,
        position_accuracy=accuracy,
        position_distance=distance,
        pixel_error=error,
        chance_accuracy=1 / patches,
        chance_distance=6.3,
        chance_error=31.5,
    )


def _global(outliers, registers, class_tokens, labels, rng) -> GlobalInformation:
    if not labels:
        return GlobalInformation(
            tokens=(), num_classes=0, num_train=0, num_test=0, chance=None, why_not="The images have no labels."
        )
    kinds = [*["class", "class 2"][:class_tokens], "normal patch", *["outlier patch"] * outliers]
    kinds += [f"register {i}" for i in range(1, registers + 1)]
    return GlobalInformation(
        tokens=tuple(TokenAccuracy(token=kind, accuracy=0.6 + 0.35 * rng.random()) for kind in kinds),
        num_classes=10,
        num_train=500,
        num_test=140,
        chance=0.1123,
        why_not=None if outliers else "outlier patch: there are none.",
    )


def _attention(class_tokens: int, registers: int, share: float) -> tuple[AttentionMass, ...]:
    sources = [*["class", "class 2"][:class_tokens], *(f"register {i}" for i in range(1, registers + 1))]
    masses = []
    for i, source in enumerate(sources):
        to_class, to_registers = 0.08 * (class_tokens > 0) + 0.001 * i, 0.25 * (registers > 0)
        to_outliers = 0.3 if share else 0.0
        masses.append(
            AttentionMass(
                source=source,
                to_class=to_class,
                to_registers=to_registers,
                to_normal=1 - to_class - to_registers - to_outliers,
                to_outliers=to_outliers,
            )
        )
    return tuple(masses)
