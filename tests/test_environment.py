"""By what something is made: the command without folders and secrets, the commit, versions, hardware, the time."""

import os
import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from vitreg_hub.environment import command, commit, duration, hardware, now, public_text, versions
from vitreg_hub.errors import VitregError

ROOT = Path(__file__).parents[1]
SHOWN = {
    "plain": "plain",
    "runs/base": "runs/base",
    "./here": "./here",
    "/home/me/secret project/weights.pth": "weights.pth",
    "/home/me/run/": "run",
    "~/run": "run",
    "~me/run": "run",
    "../../home/me/run": "run",
    "a/../../other/run": "run",
    "--out=/home/me/run": "--out=run",
    "--data.train=[/data/a,/data/b]": "'--data.train=[a,b]'",
    "{'train': '/data/my photos/a', \"test\": ~/b}": "'{'\"'\"'train'\"'\"': '\"'\"'a'\"'\"', \"test\": b}'",
    "/data/shards-{000..099}.tar": "'shards-{000..099}.tar'",
    "file:///home/me/a": "file:a",
    "hf-hub:org/name@main": "hf-hub:org/name@main",
    "https://huggingface.co/org/name": "https://huggingface.co/org/name",
    "https://me:pass@host/a/b": "'https://***@host/a/b'",
    "https://host/a?token=hf_0123456789abcdefghij": "'https://host/a?***'",
    "https://host/a/{00..99}.tar?X-Amz-Signature=abc,def&x=/y": "'https://host/a/{00..99}.tar?***'",
    "https://host/a#key=abc": "'https://host/a?***'",
    "https://host/hf_0123456789abcdefghij/a": "'https://host/***/a'",
    "--data.train=[s3://host/a,/home/me/b,hf_abc]": "'--data.train=[s3://host/a,b,***]'",
    "--data.train=pipe:curl -H Authorization:Bearer\nSECRET https://host/a": "'--data.train=pipe:***'",
    "hf_abc": "'***'",
    "--hub=hf_abc": "'--hub=***'",
    "x-hf_0123456789abcdefghij": "'x-***'",
    "--hub.token=abc": "'--hub.token=***'",
    "--API_KEY=/a/b": "'--API_KEY=***'",
    "vit_*_reg4": "'vit_*_reg4'",
    "": "''",
}


TEXTS = {
    "/home/me/my photos/": "my photos",
    "runs/../../photos": "photos",
    "/home/me/train-{0000..0099}.tar": "train-{0000..0099}.tar",
    "{/home/me/a,/mnt/b}/c/train.tar": "{a,b}/train.tar",
    "data/a.tar,/home/me/b.tar": "data/a.tar,b.tar",
    "local-dir:/home/me/model": "local-dir:model",
    "file:///home/me/train.tar": "file:train.tar",
    "https://me:secret@host/a/{00..99}.tar?X-Amz-Signature=secret": "https://***@host/a/{00..99}.tar?***",
    "pipe:curl -H Authorization:Bearer SECRET https://host/a.tar": "pipe:***",
}
HOME = (
    *("/home/jane", "/Users/jane", "~", "~jane", "../../home/jane", "/root/jane/x y"),
    *("C:\\Users\\jane", "c:/Users/jane", "\\\\server\\jane", "~\\jane", "..\\..\\jane", "file:///home/jane"),
)
AROUND = (
    "{}",
    "--out={}",
    "cat {}",
    "a|{}",
    "a | {}",
    "me@host:{}",
    "zip://x::{}",
    "a && {}",
    ">{}",
    "`{}`",
    "see <{}>",
    "{} {}",
)
SECRETS = (
    *("ghp_", "gho_", "github_pat_", "glpat-", "sk-", "sk-proj-", "AKIA", "xoxb-", "AIza", "hf_"),
    *(
        "--wandb-key ",
        "--wandb.key=",
        "--hub_token=",
        "--password ",
        "WANDB_API_KEY=",
        "api_key=",
        "Authorization: Bearer ",
    ),
)


@pytest.mark.parametrize("around", AROUND)
@pytest.mark.parametrize("home", HOME)
def test_no_home_is_seen_in_any_text(home, around):
    path = f"{home}{chr(92) if chr(92) in home else '/'}weights.pth"
    shown = public_text(around.replace("{}", path))
    assert "jane" not in shown
    assert "weights.pth" in shown
    assert public_text(shown) == shown
    assert "jane" not in command(["vitreg", "convert", around.replace("{}", path)])


@pytest.mark.parametrize("around", ["{}", "a {} b", "x={}", "https://host/{}/a", "[a,{}]", "a|{}"])
@pytest.mark.parametrize("secret", SECRETS)
def test_no_secret_is_seen_in_any_text(secret, around):
    told = "Q7" * 10
    shown = public_text(around.replace("{}", f"{secret}{told}"))
    assert told not in shown
    assert "***" in shown
    assert told not in command(["vitreg", "train", *f"{secret}{told}".split(" ")])


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "a\nb", "a\udcffb", "a\x07b", "a\u202eb"])
def test_text_of_others_does_not_move_the_cursor_and_can_be_written(text):
    for shown in (public_text(text), str(VitregError(text))):
        assert shown.isprintable()
        assert shown.encode().decode() == shown


def test_a_message_is_short_whatever_it_quotes():
    assert len(str(VitregError("x" * 60_000))) < 2_000


UNCHANGED = (
    *("photos/train", "./photos", "digits", "lab/photos:train", "hf-hub:lab/model@best", "...", "/", "", "vit_*_reg4"),
    *("vit_nano_reg4.digits", "shards/{a,b}/c/train-{0000..0099}.tar", "a photo of a {}.", "{a: b}/c"),
)


@pytest.mark.parametrize(("given", "shown"), [*TEXTS.items(), *zip(UNCHANGED, UNCHANGED, strict=True)])
def test_what_others_see_of_a_text(given, shown):
    assert public_text(given) == shown


@pytest.mark.parametrize(
    ("seconds", "words"), [(59.94, "59.9 seconds"), (300, "5.0 minutes"), (5400, "90.0 minutes"), (9000, "2.5 hours")]
)
def test_duration_in_words(seconds, words):
    assert duration(seconds) == words


@pytest.mark.parametrize("arg", SHOWN)
def test_what_others_see_of_an_argument(arg):
    assert command(["/usr/bin/vitreg", "convert", arg, "last"]) == f"vitreg convert {SHOWN[arg]} last"


def test_the_value_after_a_secret_option_is_hidden():
    shown = command(["vitreg", "push", "--token", "abc", "--password", "/a/b", "--pool", "token", "x"])
    assert shown == "vitreg push --token '***' --password '***' --pool token x"


@pytest.mark.parametrize(
    ("program", "name"),
    [
        ("/venv/bin/vitreg", "vitreg"),
        ("vitreg.exe", "vitreg"),
        (str(ROOT / "vitreg_hub/__main__.py"), "vitreg"),
        (str(ROOT / "training/__main__.py"), "python -m vitreg_hub.training"),
        (str(ROOT / "vitreg_hub/training/__main__.py"), "python -m vitreg_hub.training"),
        ("/elsewhere/training/__main__.py", None),
        ("/elsewhere/vitreg.py", None),
        ("/venv/bin/pytest", None),
        ("script.py", None),
        ("-c", None),
        ("", None),
    ],
)
def test_programs_of_this_package_and_others(program, name):
    assert command([program, "a"]) == (name and f"{name} a")
    assert command([program]) == name


def test_nobody_typed_a_command_of_ours_in_a_test():
    assert command() is None


@pytest.mark.parametrize(
    ("module", "name"), [("vitreg_hub", "vitreg"), ("vitreg_hub.training", "python -m vitreg_hub.training")]
)
def test_modules_where_python_finds_them(module, name):
    """`python -m` puts the path of this file into `sys.argv`."""
    assert command([find_spec(f"{module}.__main__").origin, "list", "/a/b"]) == f"{name} list b"


def git(folder: Path, *args: str) -> str:
    who = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    done = ["git", "-C", str(folder), *args]
    return subprocess.run(done, env=os.environ | who, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A checkout with this package's folders."""
    for name in ("vitreg_hub", "training"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    git(tmp_path, "tag", "v1")
    return tmp_path


def test_commit_of_a_checkout(checkout):
    head = git(checkout, "rev-parse", "HEAD")
    assert commit(checkout) == head
    (checkout / "notes.txt").write_text("not tracked")
    assert commit(checkout) == head
    (checkout / "training/__init__.py").write_text("changed = True\n")
    assert commit(checkout) == f"{head}-dirty"
    assert commit() == commit(ROOT)


def test_no_commit_outside_a_checkout(checkout):
    shutil.rmtree(checkout / ".git")
    assert commit(checkout) is None


def test_no_commit_of_the_project_that_a_wheel_was_installed_into(checkout):
    (checkout / "training").rename(checkout / "vitreg_hub/training")
    assert commit(checkout) is None


def test_no_commit_without_git_or_with_a_broken_repository(checkout, monkeypatch):
    with monkeypatch.context() as path:
        path.setenv("PATH", str(checkout))
        assert commit(checkout) is None
    assert commit(checkout) is not None
    (checkout / ".git/HEAD").write_text("nonsense")
    assert commit(checkout) is None


def test_versions_are_those_that_are_installed():
    found = versions("safetensors")
    assert found.pop("python") == ".".join(map(str, sys.version_info[:3]))
    assert found == {name: version(name) for name in ("vitreg_hub", "torch", "timm", "safetensors")}


def test_hardware_on_a_cpu():
    torch.set_num_threads(1)
    one = hardware()
    assert one.endswith(", 1 thread")
    assert len(one) > len(", 1 thread")
    assert hardware(torch.device("cpu"), num_processes=4) == f"{one} in each of 4 processes"
    torch.set_num_threads(2)
    assert hardware().endswith(", 2 threads")


def test_hardware_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert hardware(torch.device("cuda", 3), num_processes=8) == "8 x GPU 3"


def test_time_is_in_utc_to_the_second():
    told = datetime.fromisoformat(now())
    assert told.utcoffset() == timedelta(0)
    assert told.microsecond == 0
    assert abs(datetime.now(UTC) - told) < timedelta(minutes=1)
