"""What `verify` says of a bundle that does not open, and of folders and files that cannot be read."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from models import random_bundle, randomised
from pushers import plan

from vitreg_hub.bundle import plain_doors
from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.info import describe
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError
from vitreg_hub.hub import pull


@pytest.fixture
def saved(folder: Path) -> Path:
    return random_bundle().save(folder)


@pytest.mark.usefixtures("warm")
def test_verify_refuses_what_is_no_number(folder):
    bundle = random_bundle()
    bundle.state_dict["head.bias"][0] = float("nan")
    bundle.save(folder)
    with pytest.raises(
        BundleError, match=r"the logits of .*bundle hold infinities or NaN, so its weights .*: make it again"
    ):
        verify(folder)


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda outputs: outputs.pop("logits"),
            r"bundle gives \['pooled', 'tokens'\] in transformers\+vitreg_hub, but",
        ),
        (
            lambda outputs: outputs.update(logits=outputs["logits"][:, :3]),
            r"the logits of .*bundle have shape \[2, 3\] in transformers\+vitreg_hub, but \[2, 10\] as a bundle",
        ),
    ],
)
def test_verify_names_the_door_that_gives_something_else(change, says, saved, monkeypatch):
    real = plain_doors.transformers_outputs

    def changed(*args, **kwargs):
        outputs = real(*args, **kwargs)
        change(outputs)
        return outputs

    monkeypatch.setattr(plain_doors, "transformers_outputs", changed)
    with pytest.raises(BundleError, match=says):
        verify(saved)


@pytest.mark.usefixtures("warm")
def test_verify_sees_a_difference(saved, monkeypatch):
    other = random_bundle()
    other = ModelBundle.from_timm(
        randomised(other.build(), seed=1), arch=other.arch, provenance=other.provenance, label_names=other.label_names
    )
    monkeypatch.setattr(ModelBundle, "load", lambda source: other)
    with pytest.raises(BundleError, match="outputs differ by door"):
        verify(saved)


@pytest.mark.usefixtures("warm")
def test_verify_reports_a_door_that_does_not_open(saved, monkeypatch):
    monkeypatch.setattr("vitreg_hub.bundle.doors.ModelBundle.load", lambda source: random_bundle())
    (saved / "config.json").unlink()
    with pytest.raises(
        BundleError, match=r"does not open in plain timm and plain transformers: .*Config file not found"
    ):
        verify(saved)


@contextmanager
def nobody() -> Iterator[None]:
    """Be someone whom the permissions of files concern."""
    before = os.geteuid()
    os.seteuid(65534 if before == 0 else before)
    try:
        yield
    finally:
        os.seteuid(before)


@pytest.fixture(scope="module")
def unreadable() -> Iterator[Path]:
    """A folder with bundles of which a part cannot be read; pytest's own folders nobody may enter."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        root.chmod(0o755)
        for name in ("config.json", "model.safetensors", "README.md"):
            random_bundle().save(root / name, card="---\nlicense: mit\n---\n")
            (root / name / name).chmod(0)
        random_bundle().save(root / "closed" / "below")
        random_bundle().save(root / "no entry")
        closed = (root / "closed", root / "no entry")
        for folder, mode in zip(closed, (0, 0o444), strict=True):
            folder.chmod(mode)
        yield root
        for folder in closed:
            folder.chmod(0o755)


@pytest.mark.parametrize(
    ("opens", "name", "file"),
    [
        *((opens, "config.json", "config.json/config.json") for opens in (describe, ModelBundle.load, verify, plan)),
        *((opens, "closed", "closed") for opens in (describe, ModelBundle.load, verify, plan)),
        *((opens, "closed/below", "closed/below") for opens in (describe, ModelBundle.load, verify, plan)),
        *((opens, "no entry", "no entry/config.json") for opens in (describe, ModelBundle.load, verify)),
        *((opens, "model.safetensors", "model.safetensors/model.safetensors") for opens in (ModelBundle.load, plan)),
        (plan, "README.md", "README.md/README.md"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(opens, name, file, unreadable):
    arguments = ("lab/x",) if opens is plan else ()
    with pytest.raises(BundleError) as caught, nobody():
        opens(unreadable / name, *arguments)
    assert str(caught.value).startswith(f"{unreadable / file}")
    assert "cannot be used (Permission denied): look at its name, its permissions and its disk." in str(caught.value)


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_fetched(hub, unreadable):
    for target in (unreadable / "closed" / "new", unreadable / "closed" / "new" / "model"):
        with pytest.raises(BundleError, match=f"cannot write {target}: Permission denied"), nobody():
            pull("lab/x", target)
    assert not hub.requests
