"""Names and scores in words: the same in figures, tables and on the command line."""

from collections.abc import Sequence

from vitreg_hub.evaluation.interventions import Intervention
from vitreg_hub.evaluation.results import EvalReport, ProtocolResult, Score
from vitreg_hub.pages.wording import short_names
from vitreg_hub.plotting import number

REGISTERS: dict[Intervention, str] = {"zeroed": "zeroed", "mean": "their mean", "shuffled": "of other images"}
"""What took the place of registers."""


def names(reports: Sequence[EvalReport]) -> tuple[str, ...]:
    """Short, distinct names of the models."""
    return short_names([report.model.name for report in reports])


def value(score: Score) -> str:
    """One decimal of a percentage, as the field writes it, or three digits in the score's unit."""
    return f"{_digits(score, score.value)} {'%' if score.unit == 'share' else score.unit}".strip()


def told(score: Score) -> str:
    """The value, and its 95 % interval in brackets where one is known."""
    if score.low is None or score.high is None:
        return value(score)
    return f"{value(score)} ({_digits(score, score.low)} to {_digits(score, score.high)})"


def _digits(score: Score, found: float) -> str:
    return f"{100 * found:.1f}" if score.unit == "share" else number(found)


def outcome(result: ProtocolResult) -> str:
    """The score to quote of a protocol, also with the registers changed, in one line."""
    if not result.scores:
        return f"{result.protocol}: nothing was scored"
    also = ", ".join(
        f"{what} {value(found[0])}" for kind, what in REGISTERS.items() if (found := result.interventions.get(kind))
    )
    quoted = f"{result.protocol}: {result.scores[0].name} {told(result.scores[0])}"
    return f"{quoted}, registers {also}" if also else quoted


def quoted_name(results: Sequence[ProtocolResult]) -> str:
    """What the score to quote is called; without details, such as "CorLoc", where they differ."""
    found = dict.fromkeys(result.scores[0].name for result in results if result.scores)
    name = next(iter(found), "")
    return name if len(found) == 1 else name.partition(",")[0]


def verdict(report: EvalReport) -> str:
    """What all protocols found, in one sentence."""
    return f"{'; '.join(map(outcome, report.results)) or 'no protocol was run'}."
