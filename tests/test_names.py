"""What a user may type for a model: one parser, and one sentence for each mistake."""

import os

import pytest

from vitreg_hub.analysis import analyze_all
from vitreg_hub.any_vit import open_vit
from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle.doors import bundle_folder, verify
from vitreg_hub.bundle.info import describe
from vitreg_hub.conversion import convert, export
from vitreg_hub.errors import BundleError, HubRefusedError, VitregError
from vitreg_hub.hub import plan
from vitreg_hub.names import ModelName


def facts(given):
    name = ModelName.parse(given)
    return name.path and str(name.path), name.repo_id, name.revision, name.arch, name.tag


def test_forms(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "vit_nano_reg4.digits").write_text("")
    assert facts("hf-hub:org/name") == (None, "org/name", None, "", "")
    assert facts("hf-hub:org/name@v1") == (None, "org/name", "v1", "", "")
    assert facts("folder") == ("folder", None, None, "", "")
    assert facts(tmp_path / "folder") == (str(tmp_path / "folder"), None, None, "", "")
    assert facts("vit_base_patch16_224") == (None, None, None, "vit_base_patch16_224", "")
    assert facts("vit_small_reg4.dinov2_lvd142m") == (None, None, None, "vit_small_reg4", "dinov2_lvd142m")
    assert facts("vit_nano_reg4.digits") == ("vit_nano_reg4.digits", None, None, "", "")  # what is there comes first
    assert facts("org/name") == (None, None, None, "org/name", "")


@pytest.mark.parametrize("name", ["vit_nano_reg4.digits", "vit_small_reg4.dinov2_lvd142m"])
def test_an_architecture_without_a_tag_means_its_weights(name):
    bare = name.partition(".")[0]
    with_tag, without = ModelName.parse(name), ModelName.parse(bare)
    assert (without.full, without.tag, without.shipped) == (with_tag.full, with_tag.tag, with_tag.shipped)
    assert without.has_weights()
    assert not ModelName.parse(bare.replace("4", "8")).has_weights()


@pytest.mark.parametrize("taker", ["load", "info", "open", "export", "verify", "push"])
def test_every_command_takes_the_same_weights_for_a_bare_name(taker, tmp_path, monkeypatch):
    """DINOv2's are not in the package and there is no network, so that whoever asks for them says so."""
    monkeypatch.chdir(tmp_path)
    says = []
    for name in ("vit_small_reg4.dinov2_lvd142m", "vit_small_reg4"):
        try:
            says.append(str(TAKERS[taker](name)))
        except VitregError as error:
            says.append(str(error).replace(f"{name} ", "NAME "))
    assert says[0] == says[1]


def test_weights_that_are_in_the_package():
    assert ModelName.parse("vit_nano_reg4").shipped.name == "vit_nano_reg4.digits"
    for name in ("vit_nano_reg8", "vit_nano_reg4.other", "vit_small_reg4", "vit_small_reg4.dinov2_lvd142m", "folder"):
        assert ModelName.parse(name).shipped is None


TAKERS = {
    "load": ModelBundle.load,
    "info": describe,
    "open": open_vit,
    "analyze": lambda name: analyze_all([name], "digits"),
    "export": lambda name: export(name, "out.pth", format="dinov2"),
    "verify": verify,
    "push": lambda name: plan(name, "lab/x"),
    "convert": lambda name: convert(name, "out"),
}
"""Whatever takes a name of a model."""


@pytest.mark.parametrize("taker", TAKERS)
def test_repository_without_a_revision_after_the_at(taker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(HubRefusedError, match="hf-hub:org/name@ has nothing after the @: add a branch, tag or commit"):
        TAKERS[taker]("hf-hub:org/name@")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("taker", TAKERS)
@pytest.mark.parametrize("name", ["", "x" * 300])
def test_name_that_no_system_takes(taker, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BundleError, match=r"is not a folder: give|cannot be used .File name too long"):
        TAKERS[taker](name)
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("taker", ["load", "info", "open", "analyze", "export"])
def test_unknown_names_are_refused_in_the_same_words(taker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, says in {
        "vit_nano_reg5": "there is no folder and no architecture 'vit_nano_reg5'; closest: vit_nano_reg",
        "org/name": "a Hub repository needs the prefix 'hf-hub:'",
        "vit_nano_reg4.letters": "vit_nano_reg4 has no weights 'letters'; it has digits.",
    }.items():
        with pytest.raises(VitregError, match=says) as caught:
            TAKERS[taker](name)
        assert "\n" not in str(caught.value)


def test_a_folder_is_asked_for_where_only_a_folder_will_do():
    with pytest.raises(BundleError, match="hf-hub:lab/x is not a folder: fetch a published bundle with `vitreg pull`"):
        bundle_folder("hf-hub:lab/x")
    for name in ("vit_small_reg4.dinov2_lvd142m", "vit_small_reg4"):
        with pytest.raises(
            BundleError, match=r"ModelBundle.load\('vit_small_reg4.dinov2_lvd142m'\).save\(folder\) writes"
        ):
            bundle_folder(name)
