"""Tests are sealed: caches of their own, no network but 127.0.0.1, no state left behind."""

import io
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

# Read once, when huggingface_hub and datasets are imported: must stand before any of them is.
_CACHE = tempfile.TemporaryDirectory(prefix="vitreg-tests-")
os.environ |= {"HF_HOME": _CACHE.name, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
os.environ.pop("HF_TOKEN", None)
# Workers that share the cores, each with a thread per core, would wait for each other most of the time.
_THREADS = max(1, (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")))
os.environ["OMP_NUM_THREADS"] = str(_THREADS)
# Spawned processes look a test's functions up under its name, tests.room.test_file. Last, so that it hides nothing.
sys.path.append(str(Path(__file__).parents[1]))

import datasets
import pytest
import torch
from checkpoints import convert, files_below
from hub_server import Blob, HubServer, Repository, User
from huggingface_hub import constants
from models import random_bundle
from pictures import data_set
from pushers import push
from safetensors.torch import save_file
from skips import pytest_runtest_makereport  # noqa: F401  (a hook)
from warm_python import WarmPython

import vitreg_hub  # noqa: F401  (registers the models)
from vitreg_hub.errors import ConversionError, VitregError

HUB_TOKENS = {"hf_good": User("alice", orgs=("lab",)), "hf_reader": User("alice", ("lab",), read_only=True)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow: run with --slow")
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    torch.set_num_threads(_THREADS)


@pytest.fixture(scope="session")
def warm_python() -> Iterator[WarmPython]:
    with tempfile.TemporaryDirectory(prefix="vitreg-python-") as folder, WarmPython(Path(folder)) as python:
        yield python


@pytest.fixture
def warm(warm_python: WarmPython, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this process starts by `sys.executable` starts at once."""
    monkeypatch.setattr(sys, "executable", str(warm_python.executable))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder that does not exist yet."""
    return tmp_path / "bundle"


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """Write tensors, or anything that torch.save takes, to a file."""

    def save(content, name: str = "weights.pth", **how) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path, **how)
        return path

    return save


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Convert what must be refused, look that nothing was written, and give the sentence."""

    def convert_in_vain(source, error: type[VitregError] = ConversionError, out: Path | None = None, **options) -> str:
        before = files_below(tmp_path)
        with pytest.raises(error) as caught:
            convert(source, out or tmp_path / "out", **options)
        assert files_below(tmp_path) == before
        text = str(caught.value)
        assert "\n" not in text
        return text

    return convert_in_vain


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[HubServer]:
    """A Hub for this process and those that it starts; the token may publish below lab/."""
    with HubServer(HUB_TOKENS) as server:
        for name, value in server.env("hf_good").items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield server


@pytest.fixture
def data_set_hub(hub, monkeypatch, tmp_path):
    """The Hub with a data set of two splits in the place of a model."""

    def as_model(request):
        request.path = request.path.replace("/api/datasets/", "/api/models/").replace("/datasets/", "/", 1)

    def parquet(count):
        buffer = io.BytesIO()
        data_set(count).to_parquet(buffer)
        return Blob(buffer.getvalue())

    hub.fault = as_model
    hub.repos["lab/set"] = Repository()
    files = {"train-00000-of-00001.parquet": parquet(3), "test-00000-of-00001.parquet": parquet(7)}
    hub.repos["lab/set"].commit("main", "files", files)
    for name, value in {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": False,
        "HUB_DATASETS_URL": hub.endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_DATASETS_CACHE": tmp_path / "data sets",
    }.items():
        monkeypatch.setattr(datasets.config, name, value)
    return hub


@pytest.fixture
def waited(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nothing waits between one try and the next; the seconds that it would have."""
    seconds: list[float] = []
    monkeypatch.setattr("time.sleep", seconds.append)
    return seconds


@pytest.fixture(scope="session")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle's folder."""
    return random_bundle().save(tmp_path_factory.mktemp("old") / "bundle")


@pytest.fixture(scope="session")
def new(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a bundle of another network."""
    return random_bundle("vit_nano_reg8").save(tmp_path_factory.mktemp("new") / "bundle")


@pytest.fixture
def published(hub: HubServer, old: Path) -> str:
    """The commit that holds the old bundle, in lab/model."""
    return push(old, "lab/model").commit
