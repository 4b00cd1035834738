"""The command line: what it prints, and one sentence for each mistake."""

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from models import random_bundle

from vitreg_hub.arch import ARCHS
from vitreg_hub.bundle.doors import DOORS, bundle_folder
from vitreg_hub.cli import main
from vitreg_hub.conversion.exporter import EXPORTS
from vitreg_hub.conversion.formats.detect import FORMATS
from vitreg_hub.hub import Pushed

ROOT = Path(__file__).parents[2]


def test_list_prints_the_table(capsys):
    main(["list", "vit_*_reg4"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split() == ["name", "params", "width/depth/heads", "patch", "size", "tags"]
    facts = {row.split()[0]: row.split()[1:] for row in rows}
    assert facts["vit_large_reg4"] == ["304.4M", "1024/24/16", "14", "518", "dinov2_lvd142m"]
    assert facts["vit_nano_reg4"] == ["0.8M", "128/4/4", "4", "32", "digits"]
    assert len(facts) == 6


def test_list_without_a_pattern_prints_all(capsys):
    main(["list"])
    assert [row.split()[0] for row in capsys.readouterr().out.splitlines()[1:]] == list(ARCHS)


def test_version_and_help(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out.strip() == f"vitreg_hub {version('vitreg_hub')}"
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    assert "examples:\n  vitreg quickstart " in capsys.readouterr().out


@pytest.mark.parametrize(("formats", "command"), [(FORMATS, "convert"), (EXPORTS, "export")])
def test_help_names_every_format(formats, command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert ",".join(formats) in "".join(capsys.readouterr().out.split())


UNREADABLE = {
    "vitreg: there is no command trian: did you mean train? `vitreg --help` lists all.\n": ["trian"],
    "vitreg: there is no command zzz: `vitreg --help` lists all.\n": ["zzz", "--help"],
    "vitreg: give a command: `vitreg --help` lists all.\n": [],
    "usage: vitreg verify folder\n": ["verify"],
    "error: unrecognized arguments: --zzz\n": ["list", "--zzz"],
    "invalid choice: 'int' (choose from 'float32', 'bfloat16', 'float16')\n": ["analyze", "x", "--dtype", "int"],
}


@pytest.mark.parametrize("says", UNREADABLE)
def test_arguments_that_cannot_be_read(says, capsys):
    with pytest.raises(SystemExit) as done:
        main(UNREADABLE[says])
    assert done.value.code == 2
    out, err = capsys.readouterr()
    assert says in err
    assert not out


def test_module_is_the_command():
    run = subprocess.run([sys.executable, "-m", "vitreg_hub", "list", "vit_giant_reg0"], capture_output=True, text=True)
    assert run.returncode == 0
    assert "1536/40/24" in run.stdout
    assert not run.stderr


def test_weights_in_the_package_are_verified_and_published_by_their_name(capsys):
    main(["verify", "vit_nano_reg4.digits"])
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == list(DOORS)
    assert bundle_folder("vit_nano_reg4.digits") == ROOT / "vitreg_hub" / "weights" / "vit_nano_reg4.digits"


def test_a_push_tells_what_it_sent_and_what_it_deleted(monkeypatch, capsys):
    done = Pushed(repo_id="lab/x", commit="c", url="the address", private=False, sent=("a",), deleted=("b", "c"))
    monkeypatch.setattr("vitreg_hub.hub.publish.push", lambda *args, **options: done)
    main(["push", "folder", "lab/x"])
    assert capsys.readouterr().out == "lab/x: a, deleted b, deleted c\nthe address\n"


def test_reader_of_the_output_may_stop():
    listing = subprocess.Popen(
        [sys.executable, "-m", "vitreg_hub", "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    listing.stdout.close()
    assert listing.stderr.read() == b""
    assert listing.wait() == 0


MISTAKES = {
    "no architecture matches 'vit_hug'; '*vit_hug*' would, and `vitreg list` prints all 147.": ["list", "vit_hug"],
    "{tmp}/nothing is not a folder: fetch a published bundle": ["verify", "{tmp}/nothing"],
    "{tmp} is not a bundle: it has no config.json, but there is {tmp}/broken.": ["verify", "{tmp}"],
    "no architecture matches 'reg4'; '*reg4*' would, and `vitreg list` prints all 147.": ["list", "reg4"],
    "there is no folder and no architecture '{tmp}/brokne'; closest: {tmp}/broken. ": ["info", "{tmp}/brokne"],
    "{tmp}/brokne is not a folder: did you mean {tmp}/broken.": ["push", "{tmp}/brokne", "lab/x", "--dry-run"],
    "hf-hub:lab/x is not a folder: fetch": ["push", "hf-hub:lab/x", "lab/y", "--dry-run"],
    "vit_small_reg4.dinov2_lvd142m is not a folder: ModelBundle.load('vit_small_reg4.dinov2_lvd142m').save(folder) w": [
        "push",
        "vit_small_reg4.dinov2_lvd142m",
        "lab/x",
        "--dry-run",
    ],
    "'' is not a folder: give '.' for the current one.": ["push", "", "lab/x", "--dry-run"],
    " '' is not a folder: give '.' for the current one.": ["info", ""],
    "/ is not a bundle: it has no config.json.": ["push", "/", "lab/x", "--dry-run"],
    "x cannot be used (File name too long): look at its name": ["info", "x" * 300],
    "x: File name too long.": ["pull", "lab/x", "{tmp}/" + "x" * 300],
    "cannot write to {tmp}/broken/config.json/new: Not a directory.": [
        "quickstart",
        "--out",
        "{tmp}/broken/config.json/new",
    ],
    "{tmp} exists and holds no run: choose another folder.": ["quickstart", "--out", "{tmp}"],
    "'a/b/c' is not a repository id: give it as organisation/name.": ["pull", "a/b/c", "{tmp}/new"],
    "R6: there is no model.safetensors": ["verify", "{tmp}/broken"],
}


@pytest.mark.parametrize("says", MISTAKES)
def test_mistake_is_one_sentence(says, tmp_path, capsys):
    random_bundle().save(tmp_path / "broken")
    (tmp_path / "broken" / "model.safetensors").unlink()
    with pytest.raises(SystemExit) as done:
        main([argument.format(tmp=tmp_path) for argument in MISTAKES[says]])
    sentence = done.value.code  # sys.exit prints it to stderr and exits with status 1
    assert sentence.startswith("vitreg: ")
    assert says.format(tmp=tmp_path) in sentence
    assert "\n" not in sentence
    assert not capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"broken"}
