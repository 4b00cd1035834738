"""Importing one module behind another, with small packages in place of timm and transformers."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

HELPERS = """
import importlib.util, sys
from vitreg_hub.import_hook import import_after

def waiting():
    return sum(type(finder).__module__ == "vitreg_hub.import_hook" for finder in sys.meta_path)

others = waiting()  # for timm and transformers
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A folder with a package, `big.part`, and a module that is to follow it."""
    (tmp_path / "big").mkdir()
    (tmp_path / "big/__init__.py").write_text("")
    (tmp_path / "big/part.py").write_text("names = ['theirs']")
    (tmp_path / "big/other.py").write_text("")
    (tmp_path / "follower.py").write_text("from big.part import names\nnames.append('ours')")
    return tmp_path


def python(code: str, path: Path) -> None:
    code = f"import sys\nsys.path.insert(0, {str(path)!r})\n{HELPERS}\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "order",
    [
        "import_after('big.part', 'follower'); import big.part",
        "import_after('big.part', 'follower'); from big.part import names",
        "import_after('big.part', 'follower'); import big.other; assert waiting() > others; from big import part",
        "import big.part; import_after('big.part', 'follower')",
        "import big; import_after('big.part', 'follower')",
        "import_after('big.part', 'follower'); import follower",
        "import_after('big.part', 'follower'); import_after('big.part', 'follower'); import big.part",
    ],
)
def test_every_order_gives_the_names_once_and_leaves_nothing_behind(site, order):
    python(f"{order}\nassert sys.modules['big.part'].names == ['theirs', 'ours']\nassert waiting() == others", site)


def test_the_module_sees_its_own_loader_only(site):
    (site / "big/part.py").write_text("names = []\nseen = __loader__, __spec__.loader")
    python(
        """if True:
        from importlib.machinery import SourceFileLoader
        import_after("big.part", "follower")
        assert "names" in importlib.util.find_spec("big.part").loader.get_source("big.part")  # asking imports nothing
        assert "big.part" not in sys.modules
        import big.part
        assert {type(x) for x in (*big.part.seen, big.part.__loader__, big.part.__spec__.loader)} == {SourceFileLoader}
        """,
        site,
    )


def test_a_failed_import_can_be_repeated(site):
    (site / "big/part.py").write_text("import sys\nsys.ready\nnames = ['theirs']")
    python(
        """if True:
        import_after("big.part", "follower")
        try:
            import big.part
        except AttributeError:
            assert not {"big.part", "follower"} & sys.modules.keys()
        sys.ready = True
        import big.part
        assert big.part.names == ["theirs", "ours"]
        """,
        site,
    )


def test_a_module_that_is_not_there_stays_missing(site):
    python(
        """if True:
        import_after("big.missing", "follower")
        import big
        assert importlib.util.find_spec("big.missing") is None
        try:
            import big.missing
        except ModuleNotFoundError as error:
            assert error.name == "big.missing"
        else:
            raise AssertionError
        """,
        site,
    )


def test_modules_in_a_zip_file_and_beside_other_finders(site, tmp_path):
    archive = tmp_path / "site.zip"
    with zipfile.ZipFile(archive, "w") as packed:
        for file in site.rglob("*.py"):
            packed.write(file, file.relative_to(site))
    python(
        """if True:
        asked = []

        class Another:  # that waits too, and asks all finders from the first on
            def find_spec(self, name, path=None, target=None):
                if name == "big.part" and name not in asked:
                    asked.append(name)
                    return importlib.util.find_spec(name)

        sys.meta_path.insert(0, Another())
        import_after("big.part", "follower")
        sys.meta_path.insert(0, Another())
        import big.part
        assert asked and big.part.names == ["theirs", "ours"]
        assert waiting() == others
        """,
        archive,
    )


@pytest.mark.parametrize("begun", ["follower", "big.part"])
def test_threads_do_not_wait_for_each_other(site, begun):
    (site / "big/part.py").write_text("import time\ntime.sleep(0.3)\nnames = ['theirs']")
    python(
        f"""if True:
        import threading, time
        errors = []
        threading.excepthook = lambda args: errors.append(repr(args.exc_value))
        import_after("big.part", "follower")

        def second():
            time.sleep(0.15)
            import {begun}
            assert sys.modules["big.part"].names == ["theirs", "ours"]

        threads = [threading.Thread(target=exec, args=("import big.part",)), threading.Thread(target=second)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors
        assert waiting() == others
        """,
        site,
    )


def test_a_library_that_another_thread_is_importing_is_waited_for(site):
    (site / "big/__init__.py").write_text(
        "import time\ntime.sleep(0.3)\nfrom big import part\ntime.sleep(0.3)\nwhole = True"
    )
    python(
        """if True:
        import threading, time
        thread = threading.Thread(target=exec, args=("import big",))
        thread.start()
        time.sleep(0.15)
        import_after("big.part", "follower")
        assert sys.modules["big"].whole
        assert sys.modules["big.part"].names == ["theirs", "ours"]
        assert waiting() == others
        thread.join()
        """,
        site,
    )
