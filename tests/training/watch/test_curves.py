"""The picture of a run: what is drawn of what was written down."""

import json
import math

import numpy as np
import pytest
from PIL import Image

from vitreg_hub.plotting import DPI
from vitreg_hub.training.watch.curves import draw_curves, panels_of, read_history


def written(tmp_path, *entries):
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f"{json.dumps({'time': 1.0, **entry})}\n" for entry in entries))
    return file


def artifacts(block, *, registers=0, share=0.0, norms=(1.0, 2.0, 3.0)):
    found = {"outlier_fraction": share, **dict(zip(("norm_q50", "norm_q99", "norm_q100"), norms, strict=True))}
    found |= {f"register_{i}_norm": 10.0 + i for i in range(1, registers + 1)}
    return {f"artifacts/block_{block}/{name}": value for name, value in found.items()}


def shown(file):
    """Titles and curves of the panels that are not empty."""
    return {panel.title: dict(panel.curves) for panel in panels_of(read_history(file)) if panel.curves}


def test_steps_of_training_are_counted_when_done_like_those_of_evaluations(tmp_path):
    file = written(
        tmp_path,
        {"step": 0, "eval/accuracy": 0.1},
        {"step": 1, "loss": 3.0, "loss_dino": 2.0, "loss_koleo": 1.0, "lr": 0.1, "memory_gib": 5.0, "grad_norm": 7.0},
        {"step": 2, "loss": 2.0, "loss_dino": 1.5, "loss_koleo": 0.5, "lr": 0.2},
        {"step": 2, "eval/accuracy": 0.4, "eval/knn_accuracy": 0.3, "raw/accuracy": 0.5, "best": True},
    )
    assert shown(file) == {
        "Loss": {"loss": {1: 3.0, 2: 2.0}, "dino": {1: 2.0, 2: 1.5}, "koleo": {1: 1.0, 2: 0.5}},
        "Learning rate": {"learning rate": {1: 0.1, 2: 0.2}},
        "Scores on held-out images": {"accuracy": {0: 0.1, 2: 0.4}, "knn accuracy": {2: 0.3}, "raw accuracy": {2: 0.5}},
    }
    assert read_history(file).best == 2


def test_artifacts_of_the_last_block_and_the_most_of_any(tmp_path):
    both = artifacts(0, share=0.02) | artifacts(11, share=0.01, registers=2, norms=(5.0, 6.0, 700.0))
    found = shown(written(tmp_path, {"step": 0, **artifacts(0), **artifacts(11)}, {"step": 8, **both}))
    assert found["Outliers among the patch tokens"] == {
        "most of any block": {0: 0.0, 8: 0.02},
        "block 11": {0: 0.0, 8: 0.01},
    }
    norms = found["Norms of patch tokens, block 11"]
    assert norms == {"largest": {0: 3.0, 8: 700.0}, "99 % quantile": {0: 2.0, 8: 6.0}, "median": {0: 1.0, 8: 5.0}}
    assert found["Norms of registers, block 11"] == {"register 1": {8: 11.0}, "register 2": {8: 12.0}}


def test_what_is_no_number_or_cut_short_is_left_out(tmp_path):
    file = written(tmp_path, {"step": 1, "loss": 1.0, "lr": "nan"}, {"step": 2, "loss": "inf", "lr": "nan"})
    with file.open("a") as open_file:
        open_file.write('{"step": 3, "lo')
    assert shown(file) == {"Loss": {"loss": {1: 1.0}}}


def test_many_terms_are_not_drawn(tmp_path):
    terms = {f"loss_{i}": 1.0 for i in range(7)}
    assert shown(written(tmp_path, {"step": 1, "loss": 7.0, **terms}))["Loss"] == {"loss": {1: 7.0}}


@pytest.mark.parametrize("entries", [(), ({"step": 3, "loss": "nan"},), ({"step": 3, "data_wait": 0.5},)])
def test_nothing_to_draw(entries, tmp_path):
    assert draw_curves(written(tmp_path, *entries), tmp_path / "curves.png", title="x") is None
    assert draw_curves(tmp_path / "none.jsonl", tmp_path / "curves.png", title="x") is None
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


pytestmark = pytest.mark.filterwarnings("error::UserWarning")  # of matplotlib

LONG = [{"step": step, "loss": math.exp(-step / 300), "lr": 0.1} for step in range(3000)]
SIXTEEN = {"step": 0, **artifacts(3, registers=16), "eval/accuracy": 0.0}


@pytest.mark.parametrize(
    ("entries", "panels"),
    [
        ([{"step": 0, "loss": 1.0}], (1, 1)),
        ([{"step": 0, "eval/accuracy": 0.0}], (1, 1)),
        ([{"step": 0, "loss": -1.0, "lr": 0.0}], (1, 2)),
        ([SIXTEEN, {**SIXTEEN, "step": 0}], (2, 2)),
        ([{"step": 0, **artifacts(0, norms=(0.0, 0.0, 0.0))}], (1, 2)),
        ([*LONG, SIXTEEN, {**SIXTEEN, "step": 3000, "best": True}], (2, 3)),
    ],
)
def test_picture_has_a_place_for_each_panel(entries, panels, tmp_path):
    """Also of the shortest runs, where curves are single points, and without a warning."""
    rows, columns = panels
    file = draw_curves(written(tmp_path, *entries), tmp_path / "curves.png", title="5 $ and 6 $")
    assert draw_curves(tmp_path / "metrics.jsonl", file, title="again, over the old one") == file
    with Image.open(file) as picture:
        assert picture.size == (round(3.5 * columns * DPI), round((2.5 * rows + 0.5) * DPI))
        pixels = np.asarray(picture.convert("L")).astype(float)
    width = pixels.shape[1]
    body = pixels[round(0.5 * DPI) :]
    for row in range(rows):
        for column in range(columns):
            part = body[row * len(body) // rows : (row + 1) * len(body) // rows]
            part = part[:, column * width // columns : (column + 1) * width // columns]
            assert 0.002 < (part < 200).mean() < 0.5, (row, column)
