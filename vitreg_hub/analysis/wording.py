"""Names, numbers and verdicts in words: the same in figures, tables and on the command line."""

import math
from collections.abc import Sequence

from vitreg_hub.analysis.results import ArtifactReport
from vitreg_hub.plotting import number

LONGEST_NAME = 34


def percent(share: float | None) -> str:
    """A share in [0, 1] with three digits; only zero reads as zero."""
    if share is None or not math.isfinite(share):
        return "-"
    return "under 0.001 %" if 0 < share < 1e-5 else f"{100 * share:.3g} %"


def interval(shares: tuple[float, float] | None) -> str:
    """From the lower to the upper share."""
    return "-" if shares is None else " to ".join(map(percent, shares))


def amount(count: int) -> str:
    """Millions and billions with three digits."""
    for unit, name in ((10**9, "B"), (10**6, "M")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count:,}"


def names(reports: Sequence[ArtifactReport]) -> tuple[str, ...]:
    """Short, distinct names of the models, each in one line; long ones lose their middle."""
    found: list[str] = []
    for report in reports:
        name = "".join(c if c.isprintable() else " " for c in report.model.name).strip() or "unnamed"
        if len(name) > LONGEST_NAME:
            name = f"{name[:11]}…{name[12 - LONGEST_NAME :]}"
        unique, copies = name, 1
        while unique in found:
            copies += 1
            unique = f"{name} ({copies})"
        found.append(unique)
    return tuple(found)


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
