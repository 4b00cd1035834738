"""What a run writes and shows, how it measures itself, and the picture of its first batch."""

import io
import json
import logging
import math
import re

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from torch import nn

from vitreg_hub.errors import BundleError, RecipeError
from vitreg_hub.plotting import plain
from vitreg_hub.training.tasks.base import Batch
from vitreg_hub.training.watch.first_batch import draw_first_batch, first_batch_figure
from vitreg_hub.training.watch.logbook import Logbook, require_trackers
from vitreg_hub.training.watch.throughput import Throughput, peak_flops

CPU = torch.device("cpu")


@pytest.fixture
def accelerator():
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def book(tmp_path, accelerator):
    def make(**changes):
        measured = {"throughput": Throughput(batch_size=8, device=CPU)}
        return Logbook(**({"folder": tmp_path, "accelerator": accelerator, "total_steps": 20} | measured | changes))

    return make


def lines(folder):
    return [
        json.loads(line, parse_constant=pytest.fail) for line in (folder / "metrics.jsonl").read_text().splitlines()
    ]


def train(logbook, steps, loss=1.0):
    for step in steps:
        logbook.throughput.step_done()
        logbook.step_done()
        logbook.log(step, {"loss": loss, "lr": 1e-3})


def fail_after(work):
    work()
    raise KeyError


def test_every_line_is_json_with_step_time_and_measures(book, tmp_path):
    with book() as logbook:
        train(logbook, range(3))
        logbook.note(3, {"eval/knn_accuracy": 0.75})
        logbook.note(3, {})
        logbook.note(3, {"eval/knn_accuracy": 0.8}, best=True)
    first, second, third, note, best = lines(tmp_path)
    assert first.keys() == {"step", "time", "loss", "lr", "memory_gib"}
    assert second.keys() == third.keys() == first.keys() | {"images_per_second", "data_wait", "eta_seconds"}
    assert [line["step"] for line in (first, second, third)] == [1, 2, 3]  # as on the screen
    assert first["time"] <= second["time"] <= third["time"]
    assert note == {"step": 3, "time": note["time"], "eval/knn_accuracy": 0.75}
    assert best == {"step": 3, "time": best["time"], "eval/knn_accuracy": 0.8, "best": True}


def test_numbers_that_are_not_finite_are_words_in_json(book, tmp_path):
    with book() as logbook:
        logbook.note(0, {"a": math.nan, "b": math.inf, "c": -math.inf})
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")


def test_resumed_run_has_each_step_once(book, tmp_path):
    with book() as logbook:
        train(logbook, range(5))
    kept = (tmp_path / "metrics.jsonl").read_text().splitlines()[:3]
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "los')  # cut short by a kill, below the step that is resumed from
    with book(start_step=3) as logbook:
        assert (tmp_path / "metrics.jsonl").read_text().splitlines() == kept
        train(logbook, range(3, 6), loss=2.0)
    assert [(line["step"], line["loss"]) for line in lines(tmp_path)] == [(i, 1.0 + (i > 3)) for i in range(1, 7)]
    with book():
        assert lines(tmp_path) == []
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_resumed_run_of_an_older_version_has_each_step_once(book, tmp_path):
    """It counted the steps before a line of training, not those that were done."""
    told = [{"step": step, "loss": 1.0} for step in range(5)] + [{"step": 3, "eval/knn": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in told))
    with book(start_step=3) as logbook:
        assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2]
        train(logbook, range(3, 5))
    assert [line["step"] for line in lines(tmp_path)] == [0, 1, 2, 4, 5]


def test_without_a_terminal_there_are_log_lines(book, caplog):
    caplog.set_level(logging.INFO, "vitreg_hub.training")
    with book() as logbook:
        train(logbook, range(2), loss=0.123456)
        logbook.note(2, {"eval/knn_accuracy": 0.5, "artifacts/block_0/norm_q50": 3.0})
        logbook.note(2, {"eval/knn_accuracy": 0.75}, best=True)
        logbook.note(2, {"eval/accuracy": 0.5, "raw/accuracy": 0.75, "start/accuracy": 0.625}, best=True, below=0.625)
    first, second, note, best, below = caplog.messages
    assert re.fullmatch(r"step 1/20 \(5 %\)  loss 0\.1235  lr 0\.001  \d+\.\d GiB", first)
    measured = r"\S+ images/s  \d+% waiting for data  \d+\.\d GiB  ETA \d\d:\d\d"
    assert re.fullmatch(rf"step 2/20 \(10 %\)  loss 0\.1235  lr 0\.001  {measured}", second)
    assert note == "evaluation after 2 steps:  eval/knn_accuracy 0.5"
    assert best == "evaluation after 2 steps:  eval/knn_accuracy 0.75  (the best so far)"
    assert below.endswith("eval/accuracy 0.5  raw/accuracy 0.75  (the best so far, below the start: 0.625)")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_there_is_a_bar(book, caplog, monkeypatch):
    caplog.set_level(logging.INFO, "vitreg_hub.training")
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    with pytest.raises(KeyError), book(start_step=4, name="digits") as logbook:
        fail_after(lambda: train(logbook, range(4, 10), loss=0.25))
    assert not caplog.messages
    last = terminal.getvalue().rstrip("\n").split("\r")[-1]
    assert last.startswith("digits:  50%")
    assert "10/20" in last
    assert "loss 0.25" in last
    assert terminal.getvalue().endswith("\n")  # closed


class Recorder(GeneralTracker):
    name = "recorder"
    requires_logging_directory = True
    calls: list

    def __init__(self, run_name, logging_dir):
        self.calls = type(self).calls = [("init", run_name, logging_dir.name)]

    @property
    def tracker(self):
        return self

    def start(self):
        self.calls.append("start")

    def store_init_configuration(self, values):
        self.calls.append(values)

    def log(self, values, step=None, **kwargs):
        self.calls.append((step, values))
        if "break" in values:
            raise ConnectionError("no route to host")

    def finish(self):
        self.calls.append("finish")


def test_trackers_get_the_recipe_flat_and_every_line(book, monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    config = {"name": "x", "optim": {"lr": 0.1, "betas": [0.9, 0.99], "clip": None}}
    with pytest.raises(KeyError), book(trackers=["recorder"], name="run 1", config=config) as logbook:
        fail_after(lambda: logbook.note(0, {"score": 1.5}))
    flat = {"name": "x", "optim.lr": 0.1, "optim.betas": "[0.9, 0.99]", "optim.clip": None}
    assert Recorder.calls == [("init", "run 1", "trackers"), "start", flat, (0, {"score": 1.5}), "finish"]
    with book(trackers=["recorder"], name="run 1") as logbook:
        for step in range(3):
            logbook.note(step, {"break": step})
    assert Recorder.calls[3:] == [(0, {"break": 0}), "finish"]  # a tracker that fails is left out
    assert caplog.messages == ["tracker recorder failed and gets nothing more: no route to host"]
    assert len(lines(tmp_path)) == 3


def test_trackers_that_there_are_not_are_refused_in_a_sentence(book, tmp_path):
    with pytest.raises(RecipeError, match=r"no tracker 'tensorbord', did you mean 'tensorboard': choose from .*wandb"):
        book(trackers=["tensorbord"])
    with pytest.raises(RecipeError, match="wandb is not installed: install its package, or leave it out"):
        require_trackers(["wandb"], installed=list)
    require_trackers([])
    assert not list(tmp_path.iterdir())


def test_full_disk_is_one_sentence(book, tmp_path):
    with book() as logbook:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(BundleError, match=r"cannot write .*metrics\.jsonl: No space left on device; the last che"):
            logbook.note(0, {"loss": 1.0})
    (tmp_path / "file").write_text("")
    with pytest.raises(BundleError, match="cannot write"):
        book(folder=tmp_path / "file" / "run")


def test_other_processes_measure_and_write_nothing(tmp_path, caplog):
    class Second:
        is_main_process, device, mixed_precision = False, CPU, "no"

    caplog.set_level(logging.INFO)
    measured = Throughput(batch_size=2, device=CPU)
    with Logbook(folder=tmp_path / "run", accelerator=Second, total_steps=4, throughput=measured) as logbook:
        train(logbook, range(2))
        logbook.note(2, {"eval/score": 1.0})
    assert not list(tmp_path.iterdir())
    assert not caplog.messages


class Clock:
    """Seconds that pass when told to."""

    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now

    def tick(self, seconds):
        self.now += seconds


def test_rates_are_of_the_steps_between_two_readings():
    clock = Clock()
    throughput = Throughput(batch_size=32, device=CPU, clock=clock)

    def steps(number, *, wait, work):
        for _ in range(number):
            with throughput.waiting():
                clock.tick(wait)
            clock.tick(work)
            throughput.step_done()

    steps(1, wait=50, work=50)  # the first step is left out
    assert throughput.read().keys() == {"memory_gib"}
    steps(4, wait=0.5, work=1.5)
    with throughput.paused():
        clock.tick(1000)
    found = throughput.read(left=10)
    assert found["images_per_second"] == 16
    assert found["data_wait"] == 0.25
    assert found["eta_seconds"] == 2 * 10
    assert 0.01 < found["memory_gib"] < 100
    steps(2, wait=0, work=4)
    found = throughput.read(left=8)
    assert (found["images_per_second"], found["data_wait"]) == (8, 0)
    assert found["eta_seconds"] == pytest.approx((0.7 * 2 + 0.3 * 4) * 8)  # smoothed
    assert "mfu" not in found


@pytest.mark.parametrize("compiled", [False, True])
def test_utilisation_is_what_the_matrices_of_all_parts_of_a_step_take(compiled):
    clock, network = Clock(), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    if compiled:
        network.compile(backend="eager")
    throughput = Throughput(batch_size=10, device=CPU, peak=1e6, clock=clock)
    for _ in range(3):
        for part in (6, 4):
            with throughput.counting():
                network(torch.randn(part, 16)).sum().backward()
        clock.tick(0.5)
        throughput.step_done()
    forward = 2 * 10 * (16 * 32 + 32 * 8)
    backward = 2 * 10 * (16 * 32 + 2 * 32 * 8)  # no gradient of the input
    assert throughput.read()["mfu"] == (forward + backward) / 0.5 / 1e6


@pytest.mark.parametrize(
    ("name", "precision", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", 989.4e12),
        ("NVIDIA H100 PCIe", "fp16", 756e12),
        ("NVIDIA H100 80GB HBM3", "no", 66.9e12),
        ("NVIDIA A100-SXM4-80GB", "bf16", 312e12),
        ("NVIDIA L4", "bf16", 121e12),
        ("NVIDIA L40S", "bf16", 362e12),
        ("NVIDIA L40S", "no", None),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA GeForce RTX 4090 D", "bf16", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16", None),
        ("NVIDIA GH200 480GB", "bf16", None),
        ("Some Card 3000", "bf16", None),
        ("NVIDIA H100 80GB HBM3", "fp8", None),
    ],
)
def test_peaks_of_cards(name, precision, peak):
    assert peak_flops(name, precision) == peak


def test_no_peak_for_tf32():
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        assert peak_flops("NVIDIA A100-SXM4-80GB", "no") is None
        assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    finally:
        torch.set_float32_matmul_precision(before)


RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.1, 0.9)
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


def crops(number, size, colour):
    normalised = (torch.tensor(colour) - torch.tensor(MEAN)) / torch.tensor(STD)
    return normalised[None, :, None, None].expand(number, 3, size, size).clone()


def area(file, colour):
    """Share of a picture's pixels that have a colour."""
    pixels = np.asarray(Image.open(file).convert("RGB")) / 255
    return (np.abs(pixels - colour) < 0.01).all(axis=-1).mean()


@pytest.mark.parametrize(("views", "images", "rows"), [(1, 2, 2), (10, 12, 8), (3, 1, 1)])
def test_first_batch_shows_every_view_in_its_colours(views, images, rows, tmp_path):
    views_of = (crops(images, 32, RED), *[crops(images, 16, BLUE)] * (views - 1))
    batch = Batch(step=0, positions=torch.arange(images), names=("x",) * images, crops=views_of)
    file = draw_first_batch(batch, mean=MEAN, std=STD, file=tmp_path / "first_batch.png")
    assert file == draw_first_batch(batch, mean=MEAN, std=STD, file=file)  # again, over the old one
    width, height = Image.open(file).size
    red, blue = area(file, RED), area(file, BLUE)
    assert red > 0.05
    assert red * width * height / rows == pytest.approx((1.5 * 144) ** 2, rel=0.05)
    assert blue == pytest.approx(red * (views - 1), rel=0.02)


def test_texts_of_the_first_batch():
    def texts(*, label_names=None, **more):
        (axis,) = first_batch_figure(Batch(**batch, **more), mean=MEAN, std=STD, label_names=label_names).axes
        title, *of_images, size = (text.get_text() for text in axis.texts)
        assert (title, size) == ("First batch (step 1)", "view 1\n8 x 8")
        return of_images

    batch = {"step": 0, "positions": torch.arange(2), "names": ("a.png", "b.png"), "crops": (crops(2, 8, RED),)}
    labels = torch.tensor([1, -1])
    assert texts() == ["a.png", "b.png"]
    assert texts(labels=labels) == ["class 1", "b.png"]
    assert texts(labels=labels, label_names=["cat", "dog"]) == ["dog", "b.png"]
    short, long = texts(texts=("a $5 note", "word " * 99))
    assert short == plain("a $5 note")
    assert long.count("\n") == 7
    assert long.endswith("…")
