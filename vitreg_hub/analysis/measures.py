"""One function per thing that the paper measures, and `analyze`, which measures all of them together."""

from importlib.metadata import version
from pathlib import Path
from typing import Unpack

import numpy as np
from torch import nn

from vitreg_hub.analysis.engine import PHOTOS, Options, OutlierMeter, Study
from vitreg_hub.analysis.meters.attention import AttentionMeter
from vitreg_hub.analysis.meters.examples import ExampleMeter
from vitreg_hub.analysis.meters.global_probe import TokenClassification
from vitreg_hub.analysis.meters.local_probes import LocalProbes
from vitreg_hub.analysis.meters.places import PlaceMeter
from vitreg_hub.analysis.meters.redundancy import NeighborSimilarity
from vitreg_hub.analysis.results import (
    ArtifactReport,
    AttentionMass,
    BlockNorms,
    Example,
    GlobalInformation,
    LocalInformation,
    OutlierPlaces,
    Redundancy,
)
from vitreg_hub.errors import DataError
from vitreg_hub.images.source import Images

Model = nn.Module | str | Path
"""A module of timm or transformers, or a name as in `open_vit`."""
FEW_PATCHES = 50_000
"""Below this, shares of outliers are rough."""
LIBRARIES = ("vitreg_hub", "torch", "timm", "transformers", "scikit-learn")


def patch_norms(model: Model, images: Images = PHOTOS, **options: Unpack[Options]) -> tuple[BlockNorms, ...]:
    """Norms of patch tokens, class token and registers after every block, and which patches are outliers.

    A token's norm is the L2 norm over its channels, before the final norm; the outliers of DINOv2 ViT-g have about ten
    times the norm of others. Source: Darcet et al., section 2.1 and figures 3 and 4.

    Args:
        model: A ViT as a module or by name.
        images: Images in any form that `open_images` takes.
        **options: See `Options`.

    Raises:
        VitregError: The model or the images cannot be used; the message says why.
    """
    return Study(model, images, **options).blocks


def outlier_places(model: Model, images: Images = PHOTOS, **options: Unpack[Options]) -> OutlierPlaces:
    """At which positions outliers are, and how many an image has.

    Positions that are interpolated without antialiasing give outliers fixed places (Darcet et al., appendix A).
    Arguments and errors as in `patch_norms`.
    """
    study = Study(model, images, **options)
    return study.measure_one(_place_meter(study))


def neighbor_redundancy(model: Model, images: Images = PHOTOS, **options: Unpack[Options]) -> Redundancy:
    """Cosine similarity of patches to their 4 neighbours right after the patch embedding, outliers against others.

    Outliers appear in patches that are similar to their neighbours (Darcet et al., section 2.1 and figure 5a).
    Arguments and errors as in `patch_norms`.
    """
    return Study(model, images, **options).measure_one(NeighborSimilarity())


def local_information(model: Model, images: Images = PHOTOS, **options: Unpack[Options]) -> LocalInformation:
    """What linear probes find out from a patch token about its position and pixels, outliers against others.

    Outliers have lost much of both (Darcet et al., section 2.1 and figure 5b). Tokens are those of the last block
    after the final norm. Arguments and errors as in `patch_norms`.
    """
    study = Study(model, images, **options)
    return study.measure_one(LocalProbes(seed=study.seed))


def global_information(model: Model, images: Images = PHOTOS, **options: Unpack[Options]) -> GlobalInformation:
    """How well one token alone shows the class of an image: class token, a normal patch, an outlier, each register.

    Outliers do nearly as well as the class token (Darcet et al., section 2.1 and table 1). Tokens are those of the
    last block after the final norm; images need labels. Arguments and errors as in `patch_norms`.
    """
    study = Study(model, images, **options)
    return study.measure_one(TokenClassification(seed=study.seed))


def attention_mass(model: Model, images: Images = PHOTOS, **options: Unpack[Options]) -> tuple[AttentionMass, ...]:
    """Shares of the attention of class token and registers that go to outliers, other patches, registers, class token.

    Mean over heads and images (Darcet et al., figures 1, 2 and 9, in numbers). Arguments and errors as in
    `patch_norms`.
    """
    study = Study(model, images, **options)
    return study.measure_one(AttentionMeter(study.block))


def token_examples(
    model: Model, images: Images = PHOTOS, *, number: int = 4, **options: Unpack[Options]
) -> tuple[Example, ...]:
    """Maps of some images: norms and outliers, attention of class token and registers, principal components.

    The images are spread evenly over the data set, or are the first ones of a stream. Arguments and errors as in
    `patch_norms`.
    """
    study = Study(model, images, **options)
    return study.measure_one(_example_meter(study, number))


def analyze(
    model: Model,
    images: Images = PHOTOS,
    *,
    num_examples: int = 4,
    step: int | None = None,
    **options: Unpack[Options],
) -> ArtifactReport:
    """Measure everything that section 2 of the paper measures of one model's artifacts.

    The images pass through the model twice: once for the norms, which show the outliers, and once for all that
    depends on them. Memory does not grow with the number of images, and the result does not depend on how they are
    batched or shared among processes (`accelerate launch`), beyond rounding. A module is not changed.

    Args:
        model: A ViT as a module or by name: an architecture, a bundle's folder, ``hf-hub:org/name``, any ViT of timm,
            a folder of transformers.
        images: "photos" (a few pictures, which ship with scikit-learn and scikit-image, in tiles, or whole above 256
            pixels a side), "digits", a folder, a `datasets.Dataset`, PIL images, ``org/name[:split]``, or preprocessed
            images as a tensor.
        num_examples: Images whose maps are kept in `examples`.
        step: Training step of the model, if it is one of several checkpoints.
        **options: See `Options`.

    Raises:
        VitregError: The model or the images cannot be used; the message says why.
    """
    study = Study(model, images, **options)
    meters: dict[str, OutlierMeter] = {
        "places": _place_meter(study),
        "redundancy": NeighborSimilarity(),
        "local_information": LocalProbes(seed=study.seed),
        "global_information": TokenClassification(seed=study.seed),
        "attention": AttentionMeter(study.block),
        "examples": _example_meter(study, num_examples),
    }
    return ArtifactReport(
        model=study.model_facts(step=step),
        images=study.image_facts(),
        block=study.block,
        blocks=study.blocks,
        notes=tuple(_notes(study)),
        versions={name: version(name) for name in LIBRARIES},
        **study.measure(meters),
    )


def _place_meter(study: Study) -> PlaceMeter:
    return PlaceMeter(by_label=study.source.name == PHOTOS, seed=study.seed)


def _example_meter(study: Study, number: int) -> ExampleMeter:
    picked = study.source.picked
    if number < 0:
        raise DataError(f"there cannot be {number} examples: give 0 or more.")
    if picked is None:
        chosen = range(number)
    else:
        chosen = {int(picked[i]) for i in np.linspace(0, len(picked) - 1, min(number, len(picked))).round().astype(int)}
    return ExampleMeter(block=study.block, chosen=chosen, mean=study.opened.mean, std=study.opened.std)


def _notes(study: Study) -> list[str]:
    blocks, notes = study.blocks, []
    if study.opened.untrained:
        notes.append("The weights are random: the network was not trained.")
    if study.whole_pictures:
        notes.append(
            f"The images are {study.norms.num_images} whole pictures, since at this size their tiles would be enlarged "
            "too much: give images of your own for more than a first look."
        )
    elif study.source.name == PHOTOS:
        notes.append("The images are tiles of 15 pictures; a tile's class is its picture, so accuracies are high.")
    if study.block != len(blocks) - 1:
        notes.append(
            f"Outliers and attention are those of block {study.block}; probes and components read the last block."
        )
    patches = sum(blocks[study.block].histogram.counts)
    if patches < FEW_PATCHES:
        notes.append(
            f"{patches:,} patches were seen; below {FEW_PATCHES:,} shares are rough and rare outliers are missed."
        )
    elsewhere = [i for i, block in enumerate(blocks) if block.outlier_fraction]
    if elsewhere and not blocks[study.block].outlier_fraction:
        notes.append(
            f"Blocks {', '.join(map(str, elsewhere))} have outliers, but the chosen block {study.block} has none: "
            "choose another one with `block`."
        )
    if study.options.get("cutoff") is not None:
        notes.append("The cutoff was given and is the same for all blocks; it was not found from the norms.")
    return notes
