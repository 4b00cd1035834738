"""The page is whole, says the numbers, and works in a browser without a network."""

import base64
import io
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from page_checks import assert_self_contained, assert_shown, offline_tab, opened_browser, walk
from PIL import Image
from playwright.sync_api import Browser
from reports import examples, report, with_cutoff

from vitreg_hub.analysis.figures.report import report_figures
from vitreg_hub.analysis.report.page import render
from vitreg_hub.analysis.results import Cutoff
from vitreg_hub.analysis.wording import names, verdict
from vitreg_hub.pages.wording import percent
from vitreg_hub.plotting import number

HOSTILE = """</title><script>alert('x')</script><img src="http://evil.example/x.png" onerror="a(1)" & $x$"""


@pytest.fixture(scope="module")
def models():
    shown = [
        report("plain", depth=24),
        report("clean", outliers=False, registers=4, depth=40, grid=(12, 16), num_params=1_136_000_000),
        report(HOSTILE, registers=16, labels=False, seed=3),
    ]
    return [replace(one, examples=tuple(examples(one, 2))) for one in shown]


@pytest.fixture(scope="module")
def page(models) -> str:
    return render(models, report_figures(models))


def test_page_is_well_formed_and_self_contained(page):
    assert_self_contained(page)


def test_images_open_and_are_described(page, models):
    pictures = walk(page).all("img")
    assert len(pictures) == 10 + len(models)
    for picture in pictures:
        assert picture["alt"]
        kind, _, data = picture["src"].partition(",")
        assert kind == "data:image/png;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as opened:
            opened.load()
            assert opened.width / opened.height == pytest.approx(
                int(picture["width"]) / int(picture["height"]), rel=0.01
            )


def test_numbers_of_the_report_are_in_the_tables(page, models):
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", page)
    plain = models[0]
    for block in plain.blocks:
        row = [f"{norm:.3g}" for norm in block.quantiles]
        starts = [i for i, cell in enumerate(cells) if cell == row[0]]
        assert any(cells[i : i + len(row)] == row for i in starts)
    for token in plain.global_information.tokens:
        assert f"{100 * token.accuracy:.3g} %" in cells
    for mass in models[1].attention:
        assert f"{100 * mass.to_normal:.3g} %" in cells
    probe = plain.local_information.outlier
    assert f"{probe.position_distance:.3g} ({probe.chance_distance:.3g})" in cells
    assert f"{plain.redundancy.outlier.mean:.3g}" in cells
    assert "1.14 B" in cells
    assert f"{max(max(row) for row in plain.places.per_position) * 100:.3g} %" in cells


def test_summary_and_verdicts_stand_side_by_side(page, models):
    seen = walk(page)
    share = f"{100 * models[0].outlier_fraction[23]:.3g} %"
    assert f"{share} of the patch tokens in block 23 are outliers" in seen.text
    assert "No outliers: in no block" in seen.text
    table = page[page.index("Models side by side") :]
    head, first = re.findall(r"<tr>(.*?)</tr>", table)[:2]
    assert head.count("<th") == 1 + len(models)
    assert re.findall(r"<td>(.*?)</td>", first) == ["86.6 M", "1.14 B", "86.6 M"]
    assert "Numbers are random." in seen.text
    assert "synthetic images" in seen.text
    assert "torch 2.9.0" in seen.text


def test_names_cannot_break_out(page):
    seen = walk(page)
    assert "<script" not in page
    assert '<img src="http' not in page
    assert HOSTILE in seen.text


def test_what_was_not_measured_is_explained(page):
    assert "The images have no labels." in walk(page).text


def test_one_model_without_anything_makes_a_page():
    alone = report("nano", outliers=False, class_tokens=0, labels=False, grid=(8, 8), depth=4)
    seen = walk(render([alone], report_figures([alone])))
    assert "comparison" not in [attributes.get("id") for _, attributes in seen.elements]
    assert len(seen.all("img")) == 4


def test_numbers_in_words():
    assert [percent(x) for x in (0.0, 1.0, 0.023, 1e-9, None)] == ["0 %", "100 %", "2.3 %", "under 0.001 %", "-"]
    assert [number(x) for x in (152.34, 12345.6, 0.5, None, float("nan"))] == ["152", "12,346", "0.5", "-", "-"]
    long = "hub/" + "x" * 60
    assert names([report("a"), report("a"), report(long)])[:2] == ("a", "a (2)")
    assert len(names([report(long)])[0]) < 40


def test_verdicts_in_words():
    plain, clean = report(), report(outliers=False, registers=4)
    block = plain.blocks[11]
    share, cutoff = f"{100 * block.outlier_fraction:.3g}", f"{block.cutoff.value:.3g}"
    assert verdict(plain) == (
        f"{share} % of the patch tokens in block 11 are outliers (norm above {cutoff}); they first appear in block 8."
    )
    assert verdict(clean).startswith(
        "No outliers: in no block do a few patch tokens stand out; in block 11, the norms have one mode. Its 4"
    )
    assert verdict(replace(plain, block=3)).startswith(
        f"No outliers in block 3, but {share} % of the patch tokens in block 8"
    )
    given = with_cutoff(clean, Cutoff(value=400.0, source="given", why="given"))
    assert verdict(given).startswith("No outliers: no patch token has a norm above the given cutoff of 400. Its 4")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with opened_browser() as opened:
        yield opened


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_browser_shows_everything_without_a_network(browser, page, tmp_path, width, scheme):
    file = Path(tmp_path, "report.html")
    file.write_text(page, encoding="utf-8")
    with offline_tab(browser, file, width=width, scheme=scheme) as tab:
        pictures = tab.locator("img").all()
        assert len(pictures) == 13
        assert_shown(tab, width)
        background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(22, 22, 22)"}[scheme]
