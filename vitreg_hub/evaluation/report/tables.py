"""The scores of an evaluation as tables of text, section by section, with what they mean."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeVar

import numpy as np
from markupsafe import Markup

from vitreg_hub.evaluation.interventions import INTERVENTIONS
from vitreg_hub.evaluation.report.words import WORDS
from vitreg_hub.evaluation.results import PROTOCOLS, DataFacts, EvalReport, Protocol, ProtocolResult, Score, Setting
from vitreg_hub.evaluation.wording import REGISTERS, names, quoted_name, told, value
from vitreg_hub.pages.content import Section, Table
from vitreg_hub.pages.wording import amount, each_once, percent
from vitreg_hub.plotting import number

MOST_CLASSES = 60
"""Most classes whose confusion can be drawn."""
CONFUSIONS = 20
"""Largest confusions that are listed where there are more."""
LONG = 16
"""Most rows of a table of changed registers that is not folded."""

Key = TypeVar("Key")
Value = TypeVar("Value")
Named = Sequence[tuple[str, ProtocolResult]]
"""Results of one protocol by model."""


def by_protocol(reports: Sequence[EvalReport]) -> dict[Protocol, Named]:
    """Results of every protocol that was run."""
    named = tuple(zip(names(reports), reports, strict=True))
    found: dict[Protocol, Named] = {}
    for protocol in PROTOCOLS:
        if results := tuple((name, result) for name, report in named if (result := report.result(protocol))):
            found[protocol] = results
    return found


def summary(reports: Sequence[EvalReport]) -> Table:
    """What a reader wants to know first: the score to quote of each protocol; a column per model."""
    rows = [
        ("parameters", *(amount(report.model.num_params) for report in reports)),
        ("registers", *(str(report.model.num_registers) for report in reports)),
    ]
    for protocol in by_protocol(reports):
        results = [report.result(protocol) for report in reports]
        quoted = [result.scores[0] if result and result.scores else None for result in results]
        cells = score_cells(quoted, comparable=comparable(result for result in results if result))
        rows.append((f"{protocol}: {quoted_name([result for result in results if result])}", *cells))
    title = "Models side by side, with 95 % intervals in brackets"
    if len(reports) > 1:
        title += "; bold: better than all others, with an interval that overlaps with none of theirs"
    return Table(title=title, head=("", *names(reports)), rows=rows)


def comparable(results: Iterable[ProtocolResult]) -> bool:
    """Whether results are of the same images and settings."""
    return len({result.digest for result in results}) == 1


def score_cells(scores: Sequence[Score | None], *, comparable: bool) -> list[str]:
    """One score of several models in words; the best is bold if its interval overlaps with that of no other model."""
    cells = ["-" if score is None else told(score) for score in scores]
    known = [(i, s.low, s.high) for i, s in enumerate(scores) if s and s.low is not None and s.high is not None]
    if comparable and 1 < len(known) == sum(score is not None for score in scores):
        first = next(score for score in scores if score)
        (best, low, high), *others = sorted(known, key=lambda one: one[1], reverse=first.higher_is_better)
        if all(low > other[2] if first.higher_is_better else high < other[1] for other in others):
            cells[best] = Markup("<strong>{}</strong>").format(cells[best])
    return cells


def models(reports: Sequence[EvalReport]) -> Table:
    """What was scored, when, and on what; columns that nothing is known of are left out."""
    facts: tuple[tuple[str, Callable[[EvalReport], str | None]], ...] = (
        ("pixels", lambda r: r.model.img_size and "{} x {}".format(*r.model.img_size)),
        ("preprocessing", lambda r: r.model.preprocessing),
        ("date", lambda r: r.date),
        ("device", lambda r: r.device),
        ("command", lambda r: r.command),
    )
    known = [(title, read) for title, read in facts if any(map(read, reports))]
    rows = [
        (name, *(read(report) or "-" for _, read in known))
        for name, report in zip(names(reports), reports, strict=True)
    ]
    return Table(title="Models", head=("model", *(title for title, _ in known)), rows=rows)


def sections(reports: Sequence[EvalReport]) -> tuple[Section, ...]:
    """Everything that was scored, in the order of the page."""
    made = []
    for protocol, named in by_protocol(reports).items():
        title, meaning, definition = WORDS[protocol]
        remarks = [*each_once({name: result.notes for name, result in named}), comparison(named)]
        tables = tuple(make(named) for make in (_scores, _changed, _confusions, _per_class, _grid, _settings))
        texts = {"title": title, "meaning": meaning, "definition": definition}
        made.append(Section(key=protocol, **texts, tables=tables, remarks=remarks))
    return tuple(made)


def comparison(named: Named) -> str:
    """Whether the numbers of a protocol can be compared."""
    if comparable(result for _, result in named):
        those = "All numbers here have" if len(named) > 1 else "The numbers here have"
        return (
            f"{those} the digest {named[0][1].digest}: numbers with the same digest are of the same images and "
            f"settings, and can be compared."
        )
    different = [row[0] for row in _settings(named).rows if len(set(row[1:])) > 1 and row[0] != "digest"]
    return (
        f"The digests differ, so these numbers cannot be compared as they stand: the models were not scored alike in "
        f"{', '.join(different) or 'their classes'}."
    )


def _scores(named: Named) -> Table:
    same = comparable(result for _, result in named)
    found = _by_key([{_label(score): score for score in result.scores} for _, result in named])
    rows = [(name, *score_cells(scores, comparable=same)) for name, scores in found.items()]
    return Table(title="Scores", head=("score", *(name for name, _ in named)), rows=rows)


def _label(score: Score) -> str:
    return score.name if score.higher_is_better else f"{score.name} (lower is better)"


def _changed(named: Named) -> Table:
    """Scores with the registers changed."""
    rows = []
    for name, result in named:
        if result.interventions:
            changed = [result.interventions.get(kind, ()) for kind in INTERVENTIONS]
            found = _by_key([{score.name: score for score in scores} for scores in (result.scores, *changed)])
            rows += [(name, key, *("-" if s is None else value(s) for s in scores)) for key, scores in found.items()]
    head = ("model", "score", "registers as they are", *(REGISTERS[kind] for kind in INTERVENTIONS))
    title = "What registers do: the same images with the registers changed"
    return Table(title=title, head=head, rows=rows, folded=len(rows) > LONG)


def _per_class(named: Named) -> Table:
    shares = [
        {(i, name): share for i, (name, share) in enumerate(zip(class_names(r), r.per_class, strict=True))}
        for _, r in named
    ]
    rows = [
        (name, *map(percent, found))
        for (_, name), found in _by_key(shares).items()
        if any(share is not None for share in found)
    ]
    head = ("class", *(name for name, _ in named))
    return Table(title="Score of each class", head=head, rows=rows, folded=True)


def class_names(result: ProtocolResult) -> tuple[str, ...]:
    """Names of the classes that were told apart, or their numbers."""
    count = len(result.per_class) or len(result.confusion)
    known = result.test.classes
    return known if len(known) == count else tuple(map(str, range(count)))


def confusion(result: ProtocolResult) -> tuple[list[str], np.ndarray]:
    """Names [C] and counts [C, C] (true class, class told) of the classes that occur in either way."""
    counts = np.array(result.confusion, dtype=np.int64).reshape(len(result.confusion), len(result.confusion))
    occur = np.flatnonzero(counts.sum(axis=0) + counts.sum(axis=1))
    every = class_names(result)
    return [every[i] for i in occur], counts[np.ix_(occur, occur)]


def _confusions(named: Named) -> Table:
    """The largest ones, of models with too many classes for a figure."""
    rows = []
    for name, result in named:
        classes, counts = confusion(result)
        if len(classes) > MOST_CLASSES:
            wrong = counts - np.diag(np.diag(counts))
            for place in np.argsort(-wrong, axis=None, kind="stable")[:CONFUSIONS]:
                true, called = divmod(int(place), len(classes))
                if many := wrong[true, called]:
                    share = percent(many / counts[true].sum())
                    rows.append((name, classes[true], classes[called], f"{many:,}", share))
    head = ("model", "class", "called", "images", "share of the class")
    return Table(title="Largest confusions", head=head, rows=rows)


def _grid(named: Named) -> Table:
    found = _by_key([result.table for _, result in named])
    rows = [(key, *map(number, values)) for key, values in found.items()]
    head = ("setting", *(name for name, _ in named))
    return Table(title="What was tried, and further numbers", head=head, rows=rows, folded=True)


def _settings(named: Named) -> Table:
    told = [
        {"images to learn from": _images(r.train), "images scored": _images(r.test)}
        | {key: _setting(found) for key, found in r.settings.items()}
        | {"digest": r.digest}
        for _, r in named
    ]
    rows = [(key, *(text or "-" for text in texts)) for key, texts in _by_key(told).items() if any(texts)]
    head = ("setting", *(name for name, _ in named))
    return Table(title="Images, settings and their digest", head=head, rows=rows, folded=True)


def _images(data: DataFacts | None) -> str | None:
    return data and f"{data.name}, {data.num_images:,} images" + (
        f", {len(data.classes):,} classes" if data.classes else ""
    )


def _setting(found: Setting) -> str:
    if isinstance(found, tuple):
        return ", ".join(map(_setting, found))
    if isinstance(found, bool):
        return "yes" if found else "no"
    return "-" if found is None else f"{found:g}" if isinstance(found, float) else str(found)


def _by_key(found: Sequence[Mapping[Key, Value]]) -> dict[Key, list[Value | None]]:
    """What every model has under each key, keys in the order in which they are met."""
    keys = dict.fromkeys(key for one in found for key in one)
    return {key: [one.get(key) for one in found] for key in keys}
