"""What is written whole is on the disk before it has its name, and a failure is told as what it was."""

import os
from pathlib import Path

import pytest

from vitreg_hub.errors import BundleError
from vitreg_hub.files import new_folder, replace_files, replaced_folder, whole_file


@pytest.fixture
def order(monkeypatch, tmp_path) -> list[tuple[str, str]]:
    """What was synced and what was renamed, in their order: names, the folder of the test being "."."""
    done: list[tuple[str, str]] = []
    fsync = os.fsync

    def record_sync(descriptor):
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(("sync", "." if path == tmp_path else path.name.partition("-")[0]))
        fsync(descriptor)

    def recording(move):
        def record(self, target):
            done.append(("rename", Path(target).name))
            return move(self, target)

        return record

    monkeypatch.setattr(os, "fsync", record_sync)
    for name in ("rename", "replace"):
        monkeypatch.setattr(Path, name, recording(getattr(Path, name)))
    return done


def write(folder: Path) -> None:
    (folder / "inner").mkdir()
    (folder / "inner" / "file").write_text("x")


def test_a_new_folder_is_synced_before_and_after_it_gets_its_name(order, tmp_path):
    with new_folder(tmp_path / "folder") as staging:
        write(staging)
    assert sorted(order[:-2]) == [("sync", ".folder"), ("sync", "file"), ("sync", "inner")]
    assert order[-2:] == [("rename", "folder"), ("sync", ".")]


def test_new_parents_are_synced_too(order, tmp_path):
    with new_folder(tmp_path / "a" / "b" / "folder"):
        pass
    assert order == [("sync", "a"), ("sync", "."), ("sync", ".folder"), ("rename", "folder"), ("sync", "b")]


def test_a_replaced_folder_is_on_the_disk_before_the_old_one_is_deleted(order, tmp_path, monkeypatch):
    (tmp_path / "folder").mkdir()
    seen = []
    monkeypatch.setattr("shutil.rmtree", lambda path, **_: seen.append((Path(path).name, order[-1])))
    with replaced_folder(tmp_path / "folder") as staging:
        write(staging)
    assert order[-3:] == [("rename", "old"), ("rename", "folder"), ("sync", ".")]
    assert seen == [(".folder-swap", ("sync", "."))]


def test_a_file_is_synced_before_and_after_it_gets_its_name(order, tmp_path):
    for _ in range(2):
        with whole_file(tmp_path / "file", replace=True) as file:
            file.write_text("x")
        assert order == [("sync", "file"), ("rename", "file"), ("sync", ".")]
        order.clear()
    replace_files(tmp_path, {"one": b"1", "two": b"2"})
    assert order == [("sync", "one"), ("sync", "two"), ("rename", "one"), ("rename", "two"), ("sync", ".")]


def test_a_file_system_that_cannot_sync_folders_is_taken_and_a_broken_disk_is_not(tmp_path, monkeypatch):
    def fails(error):
        def fail(descriptor):
            raise error

        monkeypatch.setattr(os, "fsync", fail)

    fails(OSError(22, "Invalid argument"))
    with new_folder(tmp_path / "folder") as staging:
        write(staging)
    fails(OSError(5, "Input/output error"))
    with (
        pytest.raises(BundleError, match=r"cannot write .*: Input/output error"),
        new_folder(tmp_path / "b") as staging,
    ):
        write(staging)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize("how", [new_folder, replaced_folder, whole_file])
def test_the_first_error_is_told_though_others_use_the_new_parent(how, tmp_path):
    def fill(*_):
        (tmp_path / "parent" / "of another").mkdir()
        raise OSError(28, "No space left on device")

    with (
        pytest.raises(BundleError, match=r"cannot write .*: No space left on device"),
        how(tmp_path / "parent" / "a") as new,
    ):
        fill(new)
    assert "of another" in [path.name for path in (tmp_path / "parent").iterdir()]


@pytest.mark.parametrize("how", [new_folder, whole_file])
def test_nothing_is_left_of_new_parents(how, tmp_path):
    with pytest.raises(ZeroDivisionError), how(tmp_path / "a" / "b" / "target"):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["caf\udce9", "a\0b", "x" * 300])
@pytest.mark.parametrize("how", [new_folder, whole_file])
def test_names_that_cannot_be(how, name, tmp_path):
    with pytest.raises(BundleError) as caught, how(tmp_path / name):
        pass
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
