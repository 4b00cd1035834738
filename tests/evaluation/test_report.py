"""The report of an evaluation holds every number, is the same once it is read again, and works in a browser."""

import re
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from page_checks import assert_self_contained, assert_shown, offline_tab, opened_browser, walk
from PIL import Image
from playwright.sync_api import Browser

from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.evaluation.dense.scoring import Example
from vitreg_hub.evaluation.dense_protocols import box_examples
from vitreg_hub.evaluation.discovery import DiscoveryScore, Setting
from vitreg_hub.evaluation.interventions import INTERVENTIONS
from vitreg_hub.evaluation.report.figures import eval_figures
from vitreg_hub.evaluation.report.pictures import class_colours
from vitreg_hub.evaluation.report.tables import score_cells, sections, summary
from vitreg_hub.evaluation.report.write import render, write_report
from vitreg_hub.evaluation.results import (
    PROTOCOLS,
    DataFacts,
    EvalReport,
    EvaluatedModel,
    Protocol,
    ProtocolResult,
    Score,
    load_reports,
    to_json,
)
from vitreg_hub.evaluation.scores import Share
from vitreg_hub.evaluation.wording import told, verdict

CLASSES = tuple(["cat", "dog", "horse", "sheep", "cow", "bird", "boat", "car"])
THINGS = ("sky", "ground", "ball", "box")
HOSTILE = """</title><script>alert('x')</script><img src="http://evil.example/x.png" onerror="a(1)" & $x$"""
CLASSIFYING = ("classify", "knn", "linear", "logreg", "zero-shot")


def share(name: str, value: float, spread: float = 0.02) -> Score:
    return Score(name=name, value=value, low=max(0.0, value - spread), high=min(1.0, value + spread))


def changed(score: Score, factor: float) -> Score:
    ends = {"low": score.low and score.low * factor, "high": score.high and score.high * factor}
    return replace(score, value=score.value * factor, **ends)


def result(
    protocol: Protocol, *, quality: float, registers: int, seed: int, classes: tuple[str, ...] = CLASSES
) -> ProtocolResult:
    """What a protocol could have found."""
    draw = np.random.default_rng(seed)
    made: dict = {}
    if protocol in CLASSIFYING:
        counts = draw.multinomial(40, np.full(len(classes), 1 / len(classes)), size=len(classes))
        counts = (1 - quality) * counts + quality * 40 * np.eye(len(classes))
        counts = counts.round().astype(int)
        scores = [share("top-1", quality), share("top-5", min(1.0, quality + 0.03))]
        scores += [Score(name="calibration error", value=0.031, higher_is_better=False)]
        made["confusion"] = tuple(map(tuple, counts.tolist()))
        made["per_class"] = (None, *(counts.diagonal() / counts.sum(1)).tolist()[1:])
    elif protocol == "segmentation":
        classes = THINGS
        scores = [Score(name="mean IoU", value=quality - 0.2), Score(name="pixel accuracy", value=quality)]
        made["per_class"] = tuple(draw.uniform(0.2, 0.9, len(classes)).tolist())
    elif protocol == "depth":
        classes = ()
        scores = [
            Score(name="rmse", value=1.3 - quality, unit="m", higher_is_better=False),
            Score(name="silog", value=23.4 - quality, unit="", higher_is_better=False),
            Score(name="a1", value=quality),
        ]
    else:
        classes = ()
        scores = [share(f"CorLoc, keys of block -1, bias {-0.1 * (seed % 3):.1g}", quality - 0.3)]
        made["table"] = {f"keys of block -{i}, bias -0.2": 0.1 * i + 0.0123 for i in range(1, 5)}
    if protocol in ("linear", "logreg"):
        made["table"] = {f"class token, lr {rate:g}": 0.8 + rate for rate in (0.001, 0.01, 0.1)}
    if registers:
        made["interventions"] = {
            kind: tuple(changed(score, 0.5 + 0.15 * i) for score in scores) for i, kind in enumerate(INTERVENTIONS)
        }
    return ProtocolResult(
        protocol=protocol,
        train=None if protocol in ("classify", "zero-shot", "discovery") else DataFacts(name="x:train", num_images=900),
        test=DataFacts(name="x:test", num_images=320, classes=classes),
        settings={"temperature": 0.07, "ks": (10, 20), "normalised": True, "image size": (64, 64), "crop": None},
        scores=tuple(scores),
        notes=(f"{protocol} was made up.",),
        **made,
    )


def made_up(name: str, *, quality: float, registers: int, seed: int, **changed) -> EvalReport:
    return EvalReport(
        model=EvaluatedModel(
            name=name,
            num_params=21_700_000 + seed,
            num_registers=registers,
            img_size=(64, 64),
            preprocessing="resized to 64 x 64",
        ),
        results=tuple(result(p, quality=quality, registers=registers, seed=seed, **changed) for p in PROTOCOLS),
        notes=("numbers are random",),
        versions={"torch": "2.14.0", "timm": "1.0.31"},
        command="vitreg evaluate all a b",
        date="2026-01-02T03:04:05+00:00",
        device="CPU with 2 cores",
    )


def pictures(seed: int) -> dict[Protocol, tuple[Example, ...]]:
    """Pictures with what a model could have told of them."""
    draw = np.random.default_rng(seed)
    rows, columns = np.mgrid[:48, :64]
    truth = (rows > 26).astype(np.int64)
    truth[(rows - 22) ** 2 + (columns - 40) ** 2 < 120] = 2
    truth[:3] = 255
    predicted = np.where(draw.random(truth.shape) < 0.1, 3, truth % 255)
    depth = np.where(truth == 2, 2.0, 3.0 + (47 - rows) / 6).astype(np.float32)
    depth[:3] = 0
    box = np.array([[29.0, 11.0, 51.0, 33.0]])
    colours = class_colours(5)[1:][np.minimum(truth, 3)]
    image = Image.fromarray((colours // 2 + draw.integers(0, 120, colours.shape)).astype(np.uint8))

    def example(number: int, predicted: np.ndarray, truth: np.ndarray) -> Example:
        return Example(name=f"picture_{number}.png", image=image, predicted=predicted, truth=truth)

    return {
        "segmentation": tuple(example(i, predicted, truth) for i in range(2)),
        "depth": (example(0, depth * 1.1 + 0.1, depth),),
        "discovery": (example(0, box[0] + draw.integers(-6, 6, 4), box),),
    }


@pytest.fixture(scope="module")
def reports() -> list[EvalReport]:
    return [
        made_up("vit_small_reg0", quality=0.82, registers=0, seed=1),
        made_up("vit_small_reg4", quality=0.94, registers=4, seed=2),
    ]


@pytest.fixture(scope="module")
def folder(reports, tmp_path_factory):
    return write_report(reports, tmp_path_factory.mktemp("evaluation") / "report", examples=[pictures(1), pictures(2)])


@pytest.fixture(scope="module")
def page(folder) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def cells(page: str) -> list[str]:
    return [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", page)]


def test_report_is_the_same_once_it_is_read_again(folder, reports):
    again = load_reports(folder / "report.json")
    assert list(again) == reports
    assert to_json(again) == (folder / "report.json").read_text(encoding="utf-8")
    assert render(again, eval_figures(again)) == render(reports, eval_figures(reports))


def test_page_is_whole_and_has_a_section_and_figures_for_each_protocol(folder, page):
    assert_self_contained(page)
    seen = walk(page)
    assert {one["id"] for one in seen.all("section")} == {*PROTOCOLS, "about"}
    drawn = {file.stem for file in folder.glob("*.png")}
    plain = [protocol.replace("-", "_") for protocol in PROTOCOLS]
    wanted = {f"{protocol}_scores" for protocol in plain}
    wanted |= {f"{protocol.replace('-', '_')}_confusion" for protocol in CLASSIFYING}
    wanted |= {f"{protocol}_examples" for protocol in ("segmentation", "depth", "discovery")}
    assert drawn == wanted == {one["id"].removeprefix("figure-") for one in seen.all("figure")}
    assert all(one["alt"] for one in seen.all("img"))


def test_every_number_is_on_the_page(page, reports):
    shown = cells(page)
    for report in reports:
        for found in report.results:
            assert {told(score) for score in found.scores} <= set(shown)
            changed = {f"{100 * s.value:.1f} %" for scores in found.interventions.values() for s in scores[:1]}
            assert found.protocol == "depth" or changed <= set(shown)
            assert {f"{value:.3g}" for value in found.table.values()} <= set(shown)
            assert {f"{100 * v:.3g} %" for v in found.per_class if v is not None} <= set(shown)
            assert found.digest in shown
    text = walk(page).text
    for said in ("numbers are random", "knn was made up.", "torch 2.14.0", "CPU with 2 cores", "x:test, 320 images"):
        assert said in text


def test_scores_in_words(reports):
    plain, registers = reports
    assert told(plain.results[1].scores[0]) == "82.0 % (80.0 to 84.0)"
    assert "; knn: top-1 82.0 % (80.0 to 84.0); " in verdict(plain)
    assert (
        "knn: top-1 94.0 % (92.0 to 96.0), registers zeroed 47.0 %, their mean 61.1 %, of other images 75.2 %;"
        in verdict(registers)
    )
    assert "depth: rmse 0.48 m; " in verdict(plain)
    assert verdict(replace(plain, results=())) == "no protocol was run."


def test_the_best_is_bold_only_where_intervals_lie_apart():
    near = [share("top-1", 0.90), share("top-1", 0.93)]
    far = [share("top-1", 0.80), None, share("top-1", 0.93)]
    errors = [replace(score, higher_is_better=False) for score in (far[0], far[2])]

    def bold(scores, *, comparable=True):
        return [i for i, cell in enumerate(score_cells(scores, comparable=comparable)) if "<strong>" in cell]

    assert bold(near) == []
    assert bold(far) == [2]
    assert bold(errors) == [0]
    assert bold(far, comparable=False) == []
    assert bold([far[0], Score(name="top-1", value=0.99)]) == []
    assert bold([far[0]]) == []


def test_what_was_not_scored_alike_is_told(reports):
    knn = reports[1].result("knn")
    other = replace(knn, settings=knn.settings | {"temperature": 0.1})
    mixed = [reports[0], replace(reports[1], results=(other,))]
    (section,) = [one for one in sections(mixed) if one.key == "knn"]
    assert section.remarks[-1].endswith("the models were not scored alike in temperature.")
    alike = [one for one in sections(reports) if one.key == "knn"]
    assert f"have the digest {knn.digest}: numbers" in alike[0].remarks[-1]
    row = next(row for row in summary(mixed).rows if row[0] == "knn: top-1")
    assert "<strong>" not in "".join(row)
    assert "-" in next(row for row in summary(mixed).rows if row[0] == "depth: rmse")


def test_many_classes_are_listed_where_they_cannot_be_drawn():
    many = made_up("many", quality=0.8, registers=0, seed=3, classes=tuple(f"class {i}" for i in range(100)))
    assert not [one for one in eval_figures([many]) if "confusion" in one.name]
    (table,) = [t for s in sections([many]) if s.key == "knn" for t in s.tables if t.title == "Largest confusions"]
    counts = np.array(many.result("knn").confusion)
    np.fill_diagonal(counts, 0)
    true, called = np.unravel_index(counts.argmax(), counts.shape)
    assert table.rows[0][1:4] == (f"class {true}", f"class {called}", str(counts.max()))


def test_found_boxes_are_shown_beside_the_true_ones():
    picture = SimpleNamespace(name="a", image=Image.new("RGB", (8, 6)), boxes=np.array([[0, 0, 4, 4]]))
    found = DiscoveryScore(
        setting=Setting(),
        chosen_on="given",
        corloc=Share.of(1, 2),
        names=("none", "a", "b"),
        boxes=np.arange(12.0).reshape(3, 4),
        hits=np.array([np.nan, 1, 0]),
        tried={},
    )
    (example,) = box_examples(found, [None, picture, picture], most=1)
    assert example.name == "a"
    assert example.predicted.tolist() == [[4, 5, 6, 7]]
    assert example.truth.tolist() == [[0, 0, 4, 4]]


def test_one_model_without_anything_makes_a_page():
    report = EvalReport(
        model=EvaluatedModel(name=HOSTILE, num_params=1, num_registers=0, img_size=None, preprocessing="none"),
        results=(
            ProtocolResult(
                protocol="knn",
                test=DataFacts(name=HOSTILE, num_images=1),
                settings={},
                scores=(Score(name=HOSTILE, value=0.5),),
            ),
        ),
    )
    text = render([report], eval_figures([report]))
    assert_self_contained(text)
    assert HOSTILE in walk(text).text
    assert not walk(text).all("figure")
    assert "device" not in cells(text)


def test_pages_of_scores_and_of_artifacts_link_to_each_other(reports, tmp_path):
    analysis, out = tmp_path / "an analysis", tmp_path / "scores" / "report"
    analysis.mkdir()
    nav = '<!DOCTYPE html><nav><a href="#about">About</a></nav>'
    (analysis / "report.html").write_text(nav, encoding="utf-8")
    write_report(reports[:1], out, artifacts=analysis)
    assert_self_contained((out / "report.html").read_text(encoding="utf-8"), links=("../../an%20analysis/report.html",))
    there = (analysis / "report.html").read_text(encoding="utf-8")
    assert '<a href="../scores/report/report.html">Scores of Vision Transformers</a></nav>' in there
    with pytest.raises(DataError, match="is no page of an analysis"):
        write_report(reports[:1], tmp_path / "other", artifacts=out / "report.json")
    with pytest.raises(DataError, match="cannot be read as the page of an analysis"):
        write_report(reports[:1], tmp_path / "other", artifacts=tmp_path / "missing")
    with pytest.raises(BundleError, match="exists"):
        write_report(reports[:1], out, artifacts=analysis)
    assert (analysis / "report.html").read_text(encoding="utf-8") == there


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as opened:
        yield opened


@pytest.mark.parametrize("width", [400, 1280])
def test_browser_shows_everything_without_a_network(browser, folder, width):
    with offline_tab(browser, folder / "report.html", width=width) as tab:
        assert_shown(tab, width)
