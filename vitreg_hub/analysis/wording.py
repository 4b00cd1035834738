"""Names and verdicts in words: the same in figures, tables and on the command line."""

from collections.abc import Sequence

from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.pages.wording import interval, percent, short_names
from vitreg_hub.plotting import number


def names(reports: Sequence[ArtifactReport]) -> tuple[str, ...]:
    """Short, distinct names of the models."""
    return short_names([report.model.name for report in reports])


def verdict(report: ArtifactReport) -> str:
    """What the norms say about outliers, in one or two sentences."""
    block = report.chosen
    cutoff, first = block.cutoff, report.first_outlier_block
    if first is None:
        if cutoff.source == "given":
            sentence = f"No outliers: no patch token has a norm above the given cutoff of {number(cutoff.value)}."
        else:
            sentence = (
                f"No outliers: in no block do a few patch tokens stand out; in block {report.block}, {cutoff.why}."
            )
    elif not block.outlier_fraction:
        sentence = (
            f"No outliers in block {report.block}, but {percent(report.outlier_fraction[first])} of the patch tokens "
            f"in block {first}, where they first appear."
        )
    else:
        since = "not in any block before" if first == report.block else f"they first appear in block {first}"
        sentence = (
            f"{percent(block.outlier_fraction)} of the patch tokens in block {report.block} are outliers "
            f"(norm above {number(cutoff.value)}); {since}."
        )
        if report.places.interval:
            pictures = f"{report.places.num_pictures:,} such pictures"
            sentence += f" Other {pictures} would have {interval(report.places.interval)} (95 % interval)."
        if cutoff.gap:
            sentence += (
                f" Other patches have norms up to {number(cutoff.gap[0])}, outliers from {number(cutoff.gap[1])}."
            )
    if norms := block.register_norms:
        low, high = number(min(norms)), number(max(norms))
        many = f"Its {len(norms)} registers have mean norms" if len(norms) > 1 else "Its register has a mean norm"
        span = f"of {low}" if low == high else f"from {low} to {high}"
        sentence += f" {many} {span} there; the median patch has {number(block.quantile(0.5))}."
    return sentence
