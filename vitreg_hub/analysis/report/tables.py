"""The numbers of an analysis as tables of text, section by section, with what they mean."""

from collections.abc import Callable, Sequence

from vitreg_hub.analysis.results import QUANTILES, ArtifactReport, Similarities
from vitreg_hub.analysis.wording import names
from vitreg_hub.pages.content import Section, Table
from vitreg_hub.pages.wording import amount, interval, percent
from vitreg_hub.plotting import number


def summary(reports: Sequence[ArtifactReport]) -> Table:
    """What a reader wants to know first; a column per model."""
    facts: tuple[tuple[str, Callable[[ArtifactReport], str]], ...] = (
        ("parameters", lambda r: amount(r.model.num_params)),
        ("blocks", lambda r: str(r.model.depth)),
        ("channels", lambda r: str(r.model.embed_dim)),
        ("patch size", lambda r: " x ".join(map(str, r.model.patch_size))),
        ("grid of patches", lambda r: " x ".join(map(str, r.images.grid))),
        ("class tokens", lambda r: str(r.model.num_class_tokens)),
        ("registers", lambda r: str(r.model.num_registers)),
        ("training step", lambda r: _or("-", r.model.step)),
        ("chosen block", lambda r: str(r.block)),
        ("share of outliers in that block", lambda r: percent(r.outlier_fraction[r.block])),
        ("its 95 % interval by picture", lambda r: interval(r.places.interval)),
        ("cutoff in that block", lambda r: number(r.chosen.cutoff.value)),
        ("largest norm in that block", lambda r: number(r.chosen.quantile(1.0))),
        ("median norm in that block", lambda r: number(r.chosen.quantile(0.5))),
        ("first block with outliers", lambda r: _or("none", r.first_outlier_block)),
    )
    rows = [(name, *(read(report) for report in reports)) for name, read in facts]
    known = [row for row in rows if set(row[1:]) != {"-"}]
    return Table(title="Models side by side", head=("", *names(reports)), rows=known)


def _or(otherwise: str, value: int | None) -> str:
    return otherwise if value is None else f"{value:,}"


def sections(reports: Sequence[ArtifactReport]) -> tuple[Section, ...]:
    """Everything that was measured, in the order of the page."""
    named = tuple(zip(names(reports), reports, strict=True))
    made = (
        Section(
            key="comparison",
            title="When, where and from which size",
            meaning="In the paper, outliers appear late in training, in the later blocks, and only in larger models.",
            definition="The measures of the next sections, over training steps or models.",
        ),
        Section(
            key="norms",
            title="Norms and outliers",
            meaning="Outliers are patch tokens whose vectors are several times longer than those around them.",
            definition="L2 norm over channels of each patch token after a block, before the final norm. The cutoff is "
            "given, or found: the bottom of the valley between two modes of the logarithms of the norms, if there are "
            "two that are well apart; otherwise there are no outliers. Nor are there any where the upper mode fills "
            "large parts of images or exists before the first block: then it comes from the images. Blocks are counted "
            "from 0.",
            tables=(_cutoffs(named), *(_norms_by_block(name, report) for name, report in named)),
        ),
        Section(
            key="places",
            title="Where outliers are",
            meaning="Outliers that follow the image sit elsewhere in each one; those that follow the grid of "
            "positions sit in the same places.",
            definition="Share of the images in which the patch at a place is an outlier, and number of outliers per "
            "image, in the chosen block.",
            tables=(_places(named),),
        ),
        Section(
            key="redundancy",
            title="Redundancy",
            meaning="In the paper, patches that look like their neighbours become outliers: little is lost there.",
            definition="Mean cosine similarity of a patch to its up to four neighbours right after the patch "
            "embedding, before positions are added; patches are called outliers by their norm in the chosen "
            "block.",
            tables=(_redundancy(named),),
        ),
        Section(
            key="local",
            title="Local information",
            meaning="In the paper, outliers have forgotten which patch they were: its place and pixels are lost.",
            definition="Linear probes on tokens of the last block after the final norm, fitted and scored on "
            "different images, on equally many tokens of both groups: a classifier of the place, and a regression of "
            "the patch's normalised pixels (L2 norm of the error). Chance is the best constant answer; a classifier "
            "that knows nothing does not lose to it in accuracy, but in distance.",
            tables=(_local(named),),
            remarks=[f"{name}: {why}" for name, r in named if (why := r.local_information.why_not)],
        ),
        Section(
            key="global",
            title="Global information",
            meaning="In the paper, outliers know about the whole image, like a class token, as registers do.",
            definition="Top-1 accuracy of a logistic regression on one token per image, of the last block after the "
            "final norm, fitted and scored on different images; patches are drawn at random. Chance is the accuracy "
            "of always answering the most frequent class of training.",
            tables=(_global(named),),
            remarks=[f"{name}: {why}" for name, r in named if (why := r.global_information.why_not)],
        ),
        Section(
            key="attention",
            title="Attention",
            meaning="Outliers and registers can attract far more attention than their number explains.",
            definition="Share of the attention of a token that goes to each kind of token in the chosen block, mean "
            "over heads and images.",
            tables=(_attention(named),),
        ),
        Section(
            key="examples",
            title="Single images",
            meaning="With outliers, maps of norms and attention show bright spots in empty places; without, the "
            "objects.",
            definition="Maps of the chosen block; attention is the mean over heads. Principal components are fitted "
            "to the tokens of all images of a model together.",
        ),
    )
    return made if len(reports) > 1 else made[1:]


Named = Sequence[tuple[str, ArtifactReport]]


def _cutoffs(named: Named) -> Table:
    norms = ("normal norm", "outlier norm", "largest below", "smallest above")
    head = ("model", "block", "cutoff", "how", "separation", *norms, "share above", "why")
    rows = []
    for name, report in named:
        cut = report.chosen.cutoff
        norms = tuple(map(number, (cut.separation, cut.normal_norm, cut.outlier_norm, *(cut.gap or (None, None)))))
        share = percent(report.chosen.outlier_fraction)
        rows.append((name, str(report.block), number(cut.value), cut.source, *norms, share, cut.why))
    title = "The cutoff (separation: Ashman's D of the two modes; norms: at their centres)"
    return Table(title=title, head=head, rows=rows)


def _norms_by_block(name: str, report: ArtifactReport) -> Table:
    extremes = {0.0: "smallest", 0.5: "median", 1.0: "largest"}
    head = ["block", *(extremes.get(share, percent(share)) for share in QUANTILES), "cutoff", "outliers"]
    head += ["class token", "class token 2"][: report.model.num_class_tokens]
    head += [f"register {i}" for i in range(1, report.model.num_registers + 1)]
    rows = tuple(
        (
            str(i),
            *(number(norm) for norm in block.quantiles),
            number(block.cutoff.value),
            percent(block.outlier_fraction),
            *(number(norm) for norm in (*block.class_norms, *block.register_norms)),
        )
        for i, block in enumerate(report.blocks)
    )
    title = f"{name}: norms by block (quantiles of patches, means of others)"
    return Table(title=title, head=head, rows=rows, folded=True)


def _places(named: Named) -> Table:
    rows = []
    for name, report in named:
        if not report.outlier_fraction[report.block]:
            continue
        counts, cells = report.places.per_image, [share for row in report.places.per_position for share in row]
        images = sum(counts)
        mean = sum(outliers * count for outliers, count in enumerate(counts)) / images
        never = sum(share == 0 for share in cells) / len(cells)
        with_any = 1 - counts[0] / images
        rows.append((name, percent(with_any), number(mean), str(len(counts) - 1), percent(max(cells)), percent(never)))
    of_images = ("images with any", "mean per image", "most in one image")
    head = ("model", *of_images, "most frequent place", "places without any")
    return Table(title="Outliers in images and places", head=head, rows=rows)


def _redundancy(named: Named) -> Table:
    def cells(group: Similarities | None) -> tuple[str, str]:
        return ("-", "-") if group is None else (f"{group.num_patches:,}", number(group.mean))

    head = ("model", "normal patches", "mean similarity", "patches that become outliers", "mean similarity")
    rows = tuple(
        (name, *cells(r.redundancy.normal), *cells(r.redundancy.outlier))
        for name, r in named
        if r.redundancy.normal or r.redundancy.outlier
    )
    return Table(title="Cosine similarity to the neighbours", head=head, rows=rows)


def _local(named: Named) -> Table:
    rows = []
    for name, report in named:
        found = report.local_information
        for group, probe in (("normal", found.normal), ("outlier", found.outlier)):
            if probe is None:
                continue
            cells = (
                f"{percent(probe.position_accuracy)} ({percent(probe.chance_accuracy)})",
                f"{number(probe.position_distance)} ({number(probe.chance_distance)})",
                f"{number(probe.pixel_error)} ({number(probe.chance_error)})",
            )
            rows.append((name, group, *cells, f"{probe.num_train:,}", f"{probe.num_test:,}"))
    head = ("model", "tokens", "place found", "distance in patches", "pixel error", "fitted to", "scored on")
    return Table(title="Linear probes (in brackets: chance)", head=head, rows=rows)


def _global(named: Named) -> Table:
    measured = [(name, report.global_information) for name, report in named if report.global_information.tokens]
    tokens = dict.fromkeys(token.token for _, found in measured for token in found.tokens)  # each once, in order
    accuracy = [{t.token: percent(t.accuracy) for t in found.tokens} for _, found in measured]
    rows = [(token, *(by_token.get(token, "-") for by_token in accuracy)) for token in tokens]
    if measured:
        rows += [
            ("chance", *(percent(found.chance) for _, found in measured)),
            ("classes", *(str(found.num_classes) for _, found in measured)),
            ("images fitted to", *(f"{found.num_train:,}" for _, found in measured)),
            ("images scored on", *(f"{found.num_test:,}" for _, found in measured)),
        ]
    head = ("token", *(name for name, _ in measured))
    return Table(title="Accuracy from one token", head=head, rows=rows)


def _attention(named: Named) -> Table:
    rows = tuple(
        (name, mass.source, *map(percent, (mass.to_class, mass.to_registers, mass.to_normal, mass.to_outliers)))
        for name, report in named
        for mass in report.attention
    )
    head = ("model", "from", "to class tokens", "to registers", "to normal patches", "to outliers")
    return Table(title="Where attention goes", head=head, rows=rows, folded=len(rows) > 8)
