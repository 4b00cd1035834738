"""Figures show the numbers of the report, read back from what is drawn."""

import io
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection, QuadMesh
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from models import random_bundle
from PIL import Image
from reports import SIMILARITY_BINS, examples, report, with_cutoff
from torch.testing import assert_close

from vitreg_hub.analysis.figures.attention import attention_mass_figure
from vitreg_hub.analysis.figures.comparison import comparison_figure
from vitreg_hub.analysis.figures.maps import attention_figure, examples_figure, outline, token_figure
from vitreg_hub.analysis.figures.norms import (
    location_figure,
    norm_distribution_figure,
    norms_by_block_figure,
    outlier_share_figure,
    outliers_per_image_figure,
)
from vitreg_hub.analysis.figures.probes import global_information_figure, local_information_figure, redundancy_figure
from vitreg_hub.analysis.figures.report import report_figures
from vitreg_hub.analysis.meters.examples import pca_maps
from vitreg_hub.analysis.meters.histogram import edges
from vitreg_hub.analysis.results import QUANTILES, Cutoff, NormHistogram
from vitreg_hub.errors import DataError
from vitreg_hub.plotting import CLASS, DPI, NORMAL, OUTLIER, REGISTER, png

PLAIN, CLEAN = report("plain"), report("clean", outliers=False, registers=4, depth=24, seed=1)
NO_CLASS = report("no class", outliers=False, class_tokens=0, labels=False, grid=(8, 8), depth=4)


def panel(figure: Figure, name: str):
    (found,) = [axis for axis in figure.axes if axis.get_title() == name]
    return found


def texts(axis) -> str:
    return " ".join(" ".join(text.get_text().split()) for text in axis.texts)


def colour_of(artist) -> str:
    return to_hex(artist.get_facecolor()).upper()


def line_of(axis, colour: str) -> list[list[float]]:
    return [list(line.get_ydata()) for line in axis.lines if to_hex(line.get_color()).upper() == colour]


def test_norms_by_block_shows_medians_means_cutoffs_and_shares():
    figure = norms_by_block_figure([PLAIN, CLEAN])
    for name, shown in (("plain", PLAIN), ("clean", CLEAN)):
        axis = panel(figure, name)
        assert line_of(axis, NORMAL) == [[block.quantiles[QUANTILES.index(0.5)] for block in shown.blocks]]
        assert line_of(axis, CLASS) == [[block.class_norms[0] for block in shown.blocks]]
        per_register = list(map(list, zip(*(block.register_norms for block in shown.blocks), strict=True)))
        assert line_of(axis, REGISTER) == per_register
        drawn = [segment for c in axis.collections if isinstance(c, LineCollection) for segment in c.get_segments()]
        expected = [(i, value) for i, value in enumerate(shown.cutoff) if value is not None]
        assert [(segment[:, 0].mean(), segment[0, 1]) for segment in drawn] == expected
        (mesh,) = (c for c in axis.collections if isinstance(c, QuadMesh))
        shares = mesh.get_array()
        np.testing.assert_allclose(shares.sum(axis=0), 1)  # every block's tokens are all there
        heights = mesh.get_coordinates()[:, 0, 1]
        low, high = shown.blocks[-1].quantiles[0], shown.blocks[-1].quantiles[-1]
        filled = np.flatnonzero(~np.ma.getmaskarray(shares)[:, -1])
        assert heights[filled[0]] <= low <= heights[filled[0] + 1]
        assert heights[filled[-1]] <= high <= heights[filled[-1] + 1]
    assert panel(figure, "plain").get_ylim() == panel(figure, "clean").get_ylim()


def test_norm_distribution_counts_tokens_on_both_sides_of_the_cutoff():
    figure = norm_distribution_figure([PLAIN, CLEAN])
    axis, block = panel(figure, "plain"), PLAIN.blocks[PLAIN.block]
    heights = {
        colour: sum(b.get_height() for b in axis.patches if colour_of(b) == colour) for colour in (NORMAL, OUTLIER)
    }
    tokens = 64 * 16 * 16
    assert heights[OUTLIER] == round(block.outlier_fraction * tokens)
    assert heights[NORMAL] == tokens - heights[OUTLIER]
    at = edges(block.histogram)
    middles = np.sqrt(at[:-1] * at[1:])
    for bar in axis.patches:
        inside = (middles > bar.get_x()) & (middles < bar.get_x() + bar.get_width())
        inside &= (middles > block.cutoff.value) == (colour_of(bar) == OUTLIER)
        assert bar.get_height() == np.array(block.histogram.counts)[inside].sum()
    assert all(
        bar.get_x() >= block.cutoff.value / 1.1
        for bar in axis.patches
        if colour_of(bar) == OUTLIER and bar.get_height()
    )
    (cutoff,) = axis.lines
    assert set(cutoff.get_xdata()) == {block.cutoff.value}
    assert texts(axis) == f"{100 * block.outlier_fraction:.3g} % above {block.cutoff.value:.3g}"
    assert len({bar.get_x() for bar in axis.patches if bar.get_height()}) > 40  # and not a few wide ones
    clean = panel(figure, "clean")
    assert not clean.lines
    assert texts(clean) == "no outliers"
    assert not [bar for bar in clean.patches if colour_of(bar) == OUTLIER and bar.get_height()]
    assert (clean.get_xlim(), clean.get_ylim()) == (axis.get_xlim(), axis.get_ylim())


def test_given_cutoff_is_drawn_even_if_nothing_is_above():
    given = with_cutoff(CLEAN, Cutoff(value=400.0, source="given", why="given"))
    axis = panel(norm_distribution_figure([given]), "clean")
    assert set(axis.lines[0].get_xdata()) == {400.0}
    assert axis.get_xlim()[0] < 400 < axis.get_xlim()[1]
    assert texts(axis) == "no outliers above 400"


def test_outlier_share_is_one_bar_per_block():
    figure = outlier_share_figure([PLAIN])
    assert tuple(bar.get_height() for bar in panel(figure, "plain").patches) == PLAIN.outlier_fraction


@pytest.mark.parametrize("grid", [(8, 8), (37, 37), (12, 16)])
def test_location_map_is_the_share_per_position(grid):
    figure = location_figure([report("model", grid=grid)])
    (picture,) = panel(figure, "model").images
    expected = np.array(report("model", grid=grid).places.per_position)
    np.testing.assert_array_equal(picture.get_array(), expected)
    assert picture.get_clim() == (0, expected.max())


def test_outliers_per_image_is_one_bar_per_number():
    axis = panel(outliers_per_image_figure([PLAIN]), "plain")
    assert tuple(bar.get_height() for bar in axis.patches) == PLAIN.places.per_image
    assert [bar.get_x() + bar.get_width() / 2 for bar in axis.patches] == pytest.approx(range(len(axis.patches)))


def test_redundancy_is_a_density_of_each_group():
    axis = panel(redundancy_figure([PLAIN]), "plain")
    for colour, group in ((NORMAL, PLAIN.redundancy.normal), (OUTLIER, PLAIN.redundancy.outlier)):
        curve = next(p for p in axis.patches if to_hex(p.get_edgecolor()).upper() == colour and not p.get_fill())
        values, at, _ = curve.get_data()
        assert (values * np.diff(at)).sum() == pytest.approx(1)
        middles = -1 + 2 * (np.arange(SIMILARITY_BINS) + 0.5) / SIMILARITY_BINS
        share_above = sum(n for n, middle in zip(group.counts, middles, strict=True) if middle > at[-5])
        assert (values * np.diff(at))[-4:].sum() == pytest.approx(share_above / group.num_patches)
        (mean,) = (line for line in axis.lines if to_hex(line.get_color()).upper() == colour)
        assert set(mean.get_xdata()) == {group.mean}


def test_local_information_marks_values_and_chance():
    figure = local_information_figure([PLAIN, CLEAN])
    for title, value, chance in (
        ("Place found exactly", "position_accuracy", "chance_accuracy"),
        ("Distance to the true place", "position_distance", "chance_distance"),
        ("Error of the pixels", "pixel_error", "chance_error"),
    ):
        axis = panel(figure, title)
        probes = [
            (NORMAL, PLAIN.local_information.normal),
            (OUTLIER, PLAIN.local_information.outlier),
            (NORMAL, CLEAN.local_information.normal),
        ]
        bars = [(colour_of(bar), bar.get_width()) for bar in axis.patches]
        assert bars == [(colour, getattr(probe, value)) for colour, probe in probes]
        marks = [c.get_segments()[0][0, 0] for c in axis.collections if c.get_gid() == "chance"]
        assert marks == [getattr(probe, chance) for _, probe in probes]
        assert not [text for text in axis.texts if "measured" in text.get_text()]


def test_global_information_is_coloured_by_kind_of_token():
    tokens = report("sixteen", registers=16)
    axis = panel(global_information_figure([tokens]), "sixteen")
    found = tokens.global_information
    assert [bar.get_width() for bar in axis.patches] == [token.accuracy for token in found.tokens]
    assert [label.get_text() for label in axis.get_yticklabels()] == [token.token for token in found.tokens]
    assert [colour_of(bar) for bar in axis.patches] == [CLASS, NORMAL, OUTLIER] + 16 * [REGISTER]
    (chance,) = axis.collections
    assert chance.get_segments()[0][:, 0].tolist() == [found.chance] * 2


def test_attention_mass_stands_below_the_share_of_tokens():
    shown = report("four", registers=4)
    axis = panel(attention_mass_figure([shown]), "four")
    rows = [[bar.get_width() for bar in axis.patches[start : start + 4]] for start in range(0, 24, 4)]
    outliers = sum(n * count for n, count in enumerate(shown.places.per_image)) / 64
    assert rows[0] == pytest.approx([1 / 261, 4 / 261, (256 - outliers) / 261, outliers / 261])
    masses = [[m.to_class, m.to_registers, m.to_normal, m.to_outliers] for m in shown.attention]
    np.testing.assert_allclose(rows[1:], masses, rtol=1e-12)
    assert [colour_of(bar) for bar in axis.patches[4:8]] == [CLASS, REGISTER, NORMAL, OUTLIER]


def test_what_is_said_stands_clear_of_the_cutoff_and_the_bars():
    for outlier_norm in (2.5, 4, 40):
        cutoff = Cutoff(value=PLAIN.chosen.cutoff.value * outlier_norm / 5, source="found", why="")
        figure = norm_distribution_figure([with_cutoff(PLAIN, cutoff), CLEAN])
        figure.draw_without_rendering()
        for axis in figure.axes:
            inside = axis.get_window_extent()
            assert not any(text.get_window_extent().overlaps(inside) for text in axis.texts)
            assert not axis.texts[0].get_window_extent().overlaps(axis.title.get_window_extent())


@pytest.mark.parametrize("registers", [0, 4, 16])
def test_examples_show_every_map(registers):
    shown = report(registers=registers)
    images = examples(shown, 2)
    figure = examples_figure(images, name="model")
    expected = []
    for example in images:
        expected += [example.image, example.norms, example.components, example.class_attention.mean(axis=0)]
        expected += [attention.mean(axis=0) for attention in example.register_attention]
    drawn = [axis.images[0].get_array() for axis in figure.axes]
    assert len(drawn) == len(expected)
    for picture, values in zip(drawn, expected, strict=True):
        np.testing.assert_array_equal(picture, values)
    norms = [axis for axis in figure.axes if axis.collections]
    assert len(norms) == 2
    assert norms[0].images[0].get_clim() == norms[1].images[0].get_clim()
    assert len(norms[0].collections[0].get_segments()) >= 4
    titles = [axis.get_title() for axis in figure.axes][: 4 + registers]
    assert titles == [
        "input",
        "patch norms",
        "components",
        "class token",
        *(f"register {i + 1}" for i in range(registers)),
    ]


def test_attention_figure_goes_head_by_head():
    (example,) = examples(report(registers=4), 1, heads=6)
    figure = attention_figure([example], heads=True)
    assert len(figure.axes) == 1 + 1 + 4 + 6
    np.testing.assert_array_equal(figure.axes[-1].images[0].get_array(), example.class_attention[5])
    assert figure.axes[-1].get_title() == "class, head 6"
    assert len(attention_figure([example]).axes) == 6
    (without,) = examples(report(registers=2, class_tokens=0), 1, heads=3)
    assert attention_figure([without], heads=True).axes[-1].get_title() == "register 1, head 3"
    with pytest.raises(DataError, match="neither class token nor registers"):
        attention_figure(examples(NO_CLASS, 1))


def test_outline_encloses_the_mask():
    mask = np.zeros((3, 4), bool)
    mask[1, 2] = mask[1, 3] = True
    sides = {tuple(map(tuple, line)) for line in outline(mask).tolist()}
    above = {((x, y), (x + 1, y)) for x in (1.5, 2.5) for y in (0.5, 1.5)}
    assert sides == above | {((x, 0.5), (x, 1.5)) for x in (1.5, 3.5)}


def test_comparison_over_steps_and_over_sizes():
    run = [report(f"step {s}", step=s, outliers=s > 1000, seed=s) for s in (3000, 1000, 2000)]
    shares, norms, depths = comparison_figure(run).axes
    assert list(shares.lines[0].get_xdata()) == [1000, 2000, 3000]
    in_order = [run[1], run[2], run[0]]
    assert list(shares.lines[0].get_ydata()) == [r.outlier_fraction[r.block] for r in in_order]
    assert list(norms.lines[-1].get_ydata()) == [r.blocks[r.block].quantiles[-1] for r in in_order]
    filled = [list(line.get_ydata()) for line in depths.lines if line.get_gid() == "with outliers"]
    assert filled == [[], [8, 9, 10, 11], [8, 9, 10, 11]]
    sizes = [report("large", num_params=300_000_000), report("small", num_params=22_000_000, outliers=False)]
    shares, _, depths = comparison_figure(sizes).axes
    assert [label.get_text() for label in shares.get_xticklabels()] == ["small  22 M", "large  300 M"]
    assert shares.lines[0].get_ydata()[0] == 0 < shares.lines[0].get_ydata()[1]


MEASURES = (
    norms_by_block_figure,
    norm_distribution_figure,
    outlier_share_figure,
    location_figure,
    outliers_per_image_figure,
    redundancy_figure,
    local_information_figure,
    global_information_figure,
    attention_mass_figure,
    comparison_figure,
)


@pytest.mark.parametrize(
    ("draw", "num_models"),
    [*((draw, n) for draw in MEASURES for n in (1, 3)), (comparison_figure, 12), (local_information_figure, 12)],
)
def test_nothing_is_cut_off_or_drawn_over(draw, num_models):
    shown = [
        report(f"vit_{i}" * (1 + 3 * (i % 3)), registers=(16, 0, 4)[i % 3], depth=12 + 12 * (i % 2))
        for i in range(num_models)
    ]
    figure = draw(shown)
    figure.set_dpi(DPI)
    figure.draw_without_rendering()
    whole, width, height = figure.get_tightbbox(), *figure.get_size_inches()
    assert min(whole.x0, whole.y0) >= -0.01
    assert (whole.x1 <= width + 0.01, whole.y1 <= height + 0.01) == (True, True)
    for axis in figure.axes:
        for labels in (axis.get_xticklabels(), axis.get_yticklabels()):
            boxes = [label.get_window_extent() for label in labels if label.get_text() and not label.get_rotation()]
            inside = [box for box in boxes if box.width]
            assert not any(one.overlaps(other) for one, other in pairwise(inside)), [
                label.get_text() for label in labels
            ]
    titles = [axis.title.get_window_extent() for axis in figure.axes if axis.get_title()]
    assert not any(one.overlaps(other) for one, other in pairwise(titles))


def test_figures_without_data_are_left_out():
    kinds = {figure.name for figure in report_figures([replace(NO_CLASS, examples=tuple(examples(NO_CLASS, 1)))])}
    assert kinds == {"norms_by_block", "norm_distribution", "redundancy", "local_information", "examples_1"}
    kinds = [figure.name for figure in report_figures([PLAIN, NO_CLASS])]
    assert kinds == [
        "comparison",
        "norms_by_block",
        "norm_distribution",
        "outlier_share",
        "locations",
        "outliers_per_image",
        "redundancy",
        "local_information",
        "global_information",
        "attention_mass",
    ]


def test_models_without_data_have_no_panel():
    copy = replace(NO_CLASS, model=replace(NO_CLASS.model, name="plain"))
    drawn = {figure.name: figure.alt.partition(": ")[2] for figure in report_figures([copy, PLAIN])}
    assert drawn["norm_distribution"] == "plain, plain (2)"
    for name in ("outlier_share", "locations", "outliers_per_image", "global_information", "attention_mass"):
        assert drawn[name] == "plain (2)", name


def test_any_name_can_be_drawn():
    odd = ["$\\frac{$", "_hidden", "", "two\nlines", "x" * 200, "x" * 200]
    shown = [report(name, grid=(4, 4), depth=3, num_images=8) for name in odd]
    titles = [axis.get_title() for axis in outlier_share_figure(shown).axes]
    assert titles[:4] == [r"\$\frac{\$", "_hidden", "unnamed", "two lines"]
    assert titles[5] == f"{titles[4]} (2)"
    for draw in (outlier_share_figure, local_information_figure, comparison_figure):
        with Image.open(io.BytesIO(png(draw(shown)))) as picture:
            assert len(picture.convert("RGB").getcolors(picture.width * picture.height)) > 10
    png(examples_figure(examples(shown[0], 1), name=odd[0]))


def test_drawing_touches_no_global_state():
    before, backend = dict(matplotlib.rcParams), matplotlib.get_backend()
    png(norms_by_block_figure([PLAIN]))
    assert (dict(matplotlib.rcParams), matplotlib.get_backend()) == (before, backend)


def test_same_report_same_bytes():
    assert png(location_figure([PLAIN])) == png(location_figure([PLAIN]))


def test_histograms_of_one_bin_can_be_drawn():
    block = replace(CLEAN.blocks[0], histogram=NormHistogram(first_bin=1000, counts=(64,)))
    constant = replace(CLEAN, blocks=(block,) * 24)
    (bar,) = (
        b
        for b in panel(norm_distribution_figure([constant]), "clean").patches
        if b.get_height() and colour_of(b) == NORMAL
    )
    assert bar.get_height() == 64
    assert bar.get_x() <= edges(block.histogram)[0] * (1 + 1e-6)
    png(norms_by_block_figure([constant]))


def test_token_figure_draws_what_the_model_does(tmp_path):
    vit = random_bundle().build().eval()
    images = torch.randn(2, *vit.pretrained_cfg["input_size"])
    file = token_figure(vit, images, file=tmp_path / "tokens.png")
    with Image.open(file) as picture:
        assert picture.width > 1000


def test_principal_components_equal_those_of_a_direct_decomposition():
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(3, 20, 8, generator=generator) * torch.tensor([9.0, 5, 3, 1, 1, 1, 1, 1])
    tokens = patches.reshape(-1, 8).double().numpy()
    centred = tokens - tokens.mean(axis=0)
    directions = np.linalg.svd(centred, full_matrices=False)[2][:3]
    directions *= np.sign(directions[np.arange(3), np.abs(directions).argmax(axis=1)])[:, None]
    scores = centred @ directions.T
    low, high = np.quantile(scores, 0.01, axis=0), np.quantile(scores, 0.99, axis=0)
    expected = ((scores - low) / (high - low)).clip(0, 1).reshape(3, 4, 5, 3)
    assert_close(torch.from_numpy(pca_maps(patches, (4, 5))), torch.from_numpy(expected).float(), rtol=0, atol=1e-6)


def test_principal_components_of_little_variety_are_grey():
    assert (pca_maps(torch.ones(2, 4, 8), (2, 2)) == 0.5).all()
    line = torch.linspace(0, 1, 8).reshape(2, 4, 1) * torch.ones(8)
    maps = pca_maps(line, (2, 2))
    assert (np.diff(maps[..., 0].ravel()) >= 0).all()
    assert maps[..., 0].max() == 1
    assert (maps[..., 1:] == 0.5).all()
    assert pca_maps(torch.randn(1, 4, 2), (2, 2)).shape == (1, 2, 2, 3)


@pytest.mark.parametrize(
    ("patches", "problem"), [(torch.ones(1, 5, 3), "5 patches"), (torch.full((1, 4, 3), torch.nan), "not finite")]
)
def test_principal_components_refuse(patches, problem):
    with pytest.raises(DataError, match=problem):
        pca_maps(patches, (2, 2))
