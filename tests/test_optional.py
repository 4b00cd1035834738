"""Libraries that refuse each other: found in what they say themselves, and then a skip with that reason."""

import subprocess
import sys
from importlib.metadata import version

import optional
import pytest


@pytest.fixture
def neighbours(tmp_path, monkeypatch):
    """Pretend that a project is installed that wants something."""

    def install(name: str, *wants: str) -> None:
        folder = tmp_path / f"{name}-0.1.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", "Version: 0.1", *(f"Requires-Dist: {w}" for w in wants)]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        (tmp_path / f"{name}.py").write_text("known = True\n")

    monkeypatch.syspath_prepend(str(tmp_path))
    return install


def test_neighbour_of_another_version_is_refused(neighbours):
    neighbours("lonely", "numpy<1", "torch>=1")
    assert optional.refusal("lonely") == f"lonely 0.1 wants numpy<1, not {version('numpy')}"
    with (
        pytest.warns(UserWarning, match=r"lonely 0\.1 wants numpy<1"),
        pytest.raises(pytest.skip.Exception, match=r"lonely 0\.1 wants numpy<1"),
    ):
        optional.usable("lonely")


def test_neighbours_that_fit_and_those_of_extras_do_not_count(neighbours):
    neighbours("friendly", "numpy>=1", 'torch<1; extra == "test"')
    assert optional.refusal("friendly") is None
    assert optional.usable("friendly").known


def test_transformers_is_asked_too(neighbours):
    neighbours("peft", "numpy>=1")  # 0.1, which is too old for transformers
    code = f"import sys; sys.path[:0] = {sys.path!r}; import optional; print(optional.refusal('peft'))"
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.startswith(f"transformers {version('transformers')}: peft>=")


def test_missing_library_is_an_error_and_not_a_skip():
    with pytest.raises(ModuleNotFoundError):
        optional.usable("no_such_library")
