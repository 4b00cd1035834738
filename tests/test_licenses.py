"""Which license weights go on under: what sources tell, what users say, and what conversions and exports make of it."""

import json
import struct

import pytest
import timm
import torch
from checkpoints import DINOV2, GOLDEN, tensors_of
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, ModelCardData
from models import random_bundle
from safetensors import safe_open
from safetensors.torch import save_file

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.conversion import convert, export
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import LicenseError
from vitreg_hub.licenses import IDENTIFIERS, UNKNOWN, is_noncommercial, metadata, settle, stated_licenses

NONCOMMERCIAL = {
    "apple-amlr",
    "deepfloyd-if-license",
    "fair-noncommercial-research-license",
    "h-research",
    "intel-research",
}


def test_which_identifiers_forbid_commercial_use():
    assert len(IDENTIFIERS) == 83
    creative = {name for name in IDENTIFIERS if name.startswith("cc-by-nc")}
    assert len(creative) == 8
    assert {name for name in IDENTIFIERS if is_noncommercial(name)} == NONCOMMERCIAL | creative


def test_names_that_the_hub_does_not_list():
    forbid = ("CC-BY-NC-4.0", "nvidia-source-code-license-nc", "my-non-commercial-1.0", "seer-license")
    assert all(map(is_noncommercial, forbid))
    assert not any(map(is_noncommercial, ("dinov3-license", "apple-ascl", "nvidia-open-model-license", "ncsa", "sync")))


def test_every_license_that_timm_names_is_one_that_a_source_may_tell():
    named = {timm.get_pretrained_cfg(name).license for name in timm.list_pretrained()} - {None, "", "unknown", "other"}
    assert {"apache-2.0", "cc-by-nc-4.0", "dinov3-license", "mit"} <= named
    for license in named:
        assert settle(license, license, called="x") == license


SETTLED = [
    ("mit", None, "mit"),
    ("MIT", None, "mit"),
    (" Apache-2.0 ", None, "apache-2.0"),
    ("mit", "MIT", "mit"),
    ("mit", "unknown", "mit"),
    (None, "mit", "mit"),
    (None, "unknown", None),
    ("", "Apache-2.0", "apache-2.0"),
    ("unknown", "mit", "mit"),
    ("other", "my-license", "my-license"),
    (None, "mit-0", "mit-0"),
    ("Public Domain", "cc0-1.0", "cc0-1.0"),
    ("none", "unknown", None),
    (None, "cc-by-nc-4.0", "cc-by-nc-4.0"),
    ("cc-by-nc-4.0", "CC-BY-NC-4.0", "cc-by-nc-4.0"),
    ("odd name", "odd_name", "odd-name"),
    (None, "Apache 2.0", "apache-2.0"),
    ("cc-by-nc 4.0", "CC_BY-NC 4.0", "cc-by-nc-4.0"),
    (("cc by 4.0", "cc-by-4.0"), None, "cc-by-4.0"),
    (("mit", "apache-2.0"), "apache-2.0", "apache-2.0"),
    (("MIT", "mit"), None, "mit"),
    ((), "unknown", None),
]


@pytest.mark.parametrize(("told", "given", "settled"), SETTLED)
def test_settled(told, given, settled):
    assert settle(told, given, called="x") == settled


REFUSED = [
    (None, None, "no license is stated for FOLDER: give it with --license"),
    ("", "", "--license '' names no license"),
    ("mit", " ", "--license '' names no license"),
    ("unknown", None, "no license is stated for FOLDER"),
    ("other", None, "no license is stated for FOLDER"),
    ((), None, "no license is stated for FOLDER"),
    ("cc-by-nc-4.0", None, "is cc-by-nc-4.0, which does not allow every use: go on with --license cc-by-nc-4.0"),
    ("cc-by-nc-4.0", "unknown", "which does not allow every use"),
    ("cc-by-nc-4.0", "mit", "the license of FOLDER is cc-by-nc-4.0, not mit"),
    ("apache-2.0", "mit", "the license of FOLDER is apache-2.0, not mit"),
    (("mit", "apache-2.0"), None, "FOLDER names several licenses, apache-2.0, mit: say with --license which"),
    (("mit", "cc-by-nc-4.0"), "unknown", "FOLDER names several licenses, cc-by-nc-4.0, mit"),
    (None, "apache2", "did you mean apache-2.0?"),
    (None, "apache-2.0!", "'apache-2.0!' is not a license identifier"),
    (None, "mit-license", "did you mean mit?"),
    (None, "cc-by-nc-4", "did you mean cc-by-nc-4.0?"),
    (None, "gpl3", "did you mean gpl-3.0?"),
    *((None, word, "names no license") for word in ("other", "none", "NULL", "n/a", "Unlicensed")),
    *((None, word, "names no license") for word in ("public domain", "Creative Commons")),
    ("none", None, "no license is stated for FOLDER"),
    ("mit", "apach-2.0", "the license of FOLDER is mit, not apach-2.0"),
]


@pytest.mark.parametrize(("told", "given", "sentence"), REFUSED)
def test_refused(told, given, sentence):
    with pytest.raises(LicenseError) as caught:
        settle(told, given, called="FOLDER")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


SPELLINGS = (
    "cc-by-nc 4.0",
    "CC BY-NC 4.0",
    "cc_by_nc_4.0",
    "CC BY\u2013NC 4.0",
    "cc-by-nc4.0",
    "CC BY/NC",
    "non commercial",
    "Non_Commercial use only",
    "not for commercial use",
    "no commercial use",
)


@pytest.mark.parametrize("license", SPELLINGS)
def test_however_it_is_spelled_a_noncommercial_license_is_not_settled_in_silence(license, tmp_path):
    assert is_noncommercial(license)
    with pytest.raises(LicenseError, match="does not allow every use"):
        settle(license, None, called="x")
    (tmp_path / "README.md").write_text(f"---\nlicense: {license}\n---\n", encoding="utf-8")
    (told,) = stated_licenses({"pretrained_cfg": {"license": license.upper()}}, tmp_path / "README.md")
    assert settle(told, license, called="x") == told


@pytest.mark.parametrize("license", ["apache-2.0", "my-license", None])
def test_the_hub_takes_the_metadata(license, tmp_path):
    """It refuses a card whose `license` is not on its list, and wants a name beside `other`."""
    data = ModelCardData(**metadata(license))
    assert data.license in IDENTIFIERS
    assert (data.license == "other") == (data.license_name is not None)
    (tmp_path / "README.md").write_text(f"---\n{data.to_yaml()}\n---\n")
    assert stated_licenses({}, tmp_path / "README.md") == ((license,) if license else ())


MANY = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 28))
CARDS = {
    "---\nlicense: MIT\n---\n# Model\n": ("mit",),
    "---\nlicense:\n- mit\n- apache-2.0\n---\n": ("mit", "apache-2.0"),
    "---\nlicense: other\nlicense_name: dinov3-license\n---\n": ("dinov3-license",),
    "---\nlicense: other\n---\n": (),
    "---\nlicense: unknown\n---\n": (),
    "---\nlicense: none\n---\n": (),
    "---\nlicense: other\nlicense_name: other\n---\n": (),
    "---\nlicense: 3\n---\n": (),
    "---\nlicense: {a: b}\n---\n": (),
    "---\nlicense: [\n---\n": (),
    "---\n- mit\n---\n": (),
    "# Model\n\nlicense: mit\n": (),
    "---\nlicense: &l mit\nlicense_name: *l\n---\n": ("mit",),
    f"---\nlicense: mit\nmore: {'[' * 5_000}\n---\n": (),
    f"---\nlicense: mit\nmore: {'[' * 200}{']' * 200}\n---\n": (),
    f"---\nlicense: mit\nmore:\n{'- x' * 10**6}\n---\n": (),
    f"---\nlicense: mit\n{MANY}---\n": (),
    "": (),
}


@pytest.mark.timeout(60)  # for ever, without a bound
@pytest.mark.parametrize("card", CARDS, ids=lambda card: repr(card[:40]))
def test_what_a_card_tells(card, tmp_path):
    (tmp_path / "README.md").write_text(card)
    assert stated_licenses({}, tmp_path / "README.md") == CARDS[card]


def test_what_other_files_tell(tmp_path):
    card = tmp_path / "README.md"
    assert stated_licenses({}, card) == ()
    assert stated_licenses({"pretrained_cfg": {"license": "mit"}}, card) == ("mit",)
    assert stated_licenses({"pretrained_cfg": 3, "vitreg": {"provenance": [1]}}, card) == ()
    assert stated_licenses({"pretrained_cfg": {"license": 3}, "vitreg": {"provenance": {"license": "MIT"}}}, card) == (
        "mit",
    )
    assert stated_licenses({}, card, header={"format": "pt", "license": "mit"}) == ("mit",)
    card.write_bytes(b"---\nlicense: apache-2.0\n---\n\xff\xfe")
    assert stated_licenses({"pretrained_cfg": {"license": "mit"}}, card) in (("mit",), ("mit", "apache-2.0"))


@pytest.fixture
def source(tmp_path):
    """A folder with weights alone, in Meta's names."""
    (tmp_path / "source").mkdir()
    save_file(tensors_of("dinov2_vit_mlp_hub"), tmp_path / "source/weights.safetensors")
    return tmp_path / "source"


def card_of(source, license: str) -> None:
    (source / "README.md").write_text(f"---\nlicense: {license}\n---\n")


def test_a_bare_file_needs_a_license(source, refused, folder):
    for weights in source, source / "weights.safetensors":
        assert "no license is stated for" in refused(weights, LicenseError, license=None, **DINOV2)
    bundle = convert(source, folder, license="Apache-2.0", **DINOV2)
    report = ConversionReport.of(bundle)
    assert bundle.provenance.license == report.license == "apache-2.0"
    assert "the license is as asked for: the source tells none" in report.notes
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["license"] == "apache-2.0"
    assert ModelCard.load(folder / "README.md").data.license == "apache-2.0"


def test_nobody_knows_the_license(source):
    bundle = convert(source, license=UNKNOWN, **DINOV2)
    assert bundle.provenance.license is ConversionReport.of(bundle).license is None
    assert "license      unknown\n" in str(ConversionReport.of(bundle))
    assert "license" not in bundle.to_json()["pretrained_cfg"]


def test_the_license_of_the_card_beside_the_weights(source):
    card_of(source, "mit")
    for weights in source, source / "weights.safetensors":
        bundle = convert(weights, **DINOV2)
        assert bundle.provenance.license == "mit"
        assert not any("license" in note for note in ConversionReport.of(bundle).notes)


def test_a_noncommercial_source_is_said_so(source, refused):
    card_of(source, "cc-by-nc-4.0")
    assert "is cc-by-nc-4.0, which does not allow every use" in refused(source, LicenseError, license=None, **DINOV2)
    assert "which does not allow every use" in refused(source, LicenseError, license="unknown", **DINOV2)
    assert "is cc-by-nc-4.0, not mit" in refused(source, LicenseError, license="mit", **DINOV2)
    assert convert(source, license="cc-by-nc-4.0", **DINOV2).provenance.license == "cc-by-nc-4.0"


def test_files_that_differ(tmp_path, refused):
    model = timm.create_model("vit_small_patch14_reg4_dinov2", depth=1, embed_dim=64, num_heads=2, img_size=56)
    args = {"depth": 1, "embed_dim": 64, "num_heads": 2, "img_size": 56}
    timm.models.save_for_hf(model, tmp_path / "timm", model_args=args)
    assert convert(tmp_path / "timm").provenance.license == "apache-2.0"
    card_of(tmp_path / "timm", "mit")
    assert "names several licenses, apache-2.0, mit" in refused(tmp_path / "timm", LicenseError, license=None)
    bundle = convert(tmp_path / "timm", license="mit")
    assert bundle.provenance.license == "mit"
    assert "the license is as asked for: the source names apache-2.0 and mit" in ConversionReport.of(bundle).notes


def test_other_faults_are_told_first(source, refused):
    assert "no format 'nothing'" in refused(source, license=None, format="nothing")
    assert "give --num-heads" in refused(source, license="apache2")
    assert "did you mean apache-2.0?" in refused(source, LicenseError, license="apache2", **DINOV2)


def test_a_license_is_asked_for_before_weights_are_read(source, monkeypatch):
    monkeypatch.setattr(
        "vitreg_hub.conversion.checkpoint.opening.Checkpoint.read", lambda *args: pytest.fail("weights were read")
    )
    with pytest.raises(LicenseError):
        convert(source, **DINOV2)


def test_a_bundle_keeps_its_license_when_it_is_converted_again(folder):
    bundle = random_bundle()
    provenance = Provenance(origin="somewhere", license="cc-by-sa-4.0")
    ModelBundle.from_timm(bundle.build(), arch=bundle.arch, provenance=provenance).save(folder)
    assert convert(folder).provenance.license == "cc-by-sa-4.0"


def put(repo: str, files: dict[str, bytes]) -> str:
    api = HfApi()
    api.create_repo(repo)
    return api.create_commit(
        repo, [CommitOperationAdd(name, data) for name, data in files.items()], commit_message="files"
    ).oid


def test_the_license_and_the_commit_of_a_repository(hub, source, folder):
    weights, card = (source / "weights.safetensors").read_bytes(), b"---\nlicense: cc-by-nc-4.0\n---\n"
    commit = put("lab/source", {"weights.safetensors": weights, "README.md": card})
    with pytest.raises(LicenseError, match=r"the license of hf-hub:lab/source is cc-by-nc-4\.0"):
        convert("hf-hub:lab/source", folder, **DINOV2)
    bundle = convert("hf-hub:lab/source@main", folder, license="cc-by-nc-4.0", **DINOV2)
    assert bundle.provenance.origin == f"converted from hf-hub:lab/source@{commit} (Meta's DINOv2)"
    assert ConversionReport.of(bundle).source == f"hf-hub:lab/source@{commit}"
    data = ModelCard.load(folder / "README.md").data
    assert (data.license, data.base_model) == ("cc-by-nc-4.0", "lab/source")


def licensed(case: str, license: str | None) -> ModelBundle:
    path = GOLDEN / case / "checkpoint.pth"
    return convert(path, license=license, num_heads=4 if case == "dinov2_reg4" else 2)


def test_an_exported_folder_tells_license_and_origin(folder):
    exported = licensed("dinov2_reg4", "cc-by-nc-4.0")
    export(exported, folder, format="hf-dinov2-with-registers")
    card = ModelCard.load(folder / "README.md")
    assert card.data.license == "cc-by-nc-4.0"
    assert exported.provenance.origin in card.text
    with pytest.raises(LicenseError, match=r"cc-by-nc-4\.0"):
        convert(folder)
    assert convert(folder, license="cc-by-nc-4.0").provenance.license == "cc-by-nc-4.0"


def test_an_exported_safetensors_file_tells_license_and_origin(tmp_path):
    exported = licensed("dinov2_reg4", "mit")
    path = export(exported, tmp_path / "exported.safetensors", format="dinov2")
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "license": "mit", "origin": exported.provenance.origin}
    assert convert(path, num_heads=4).provenance.license == "mit"
    (size,) = struct.unpack("<Q", path.read_bytes()[:8])
    assert size % 8 == 0


def test_an_exported_pickle_cannot_tell_a_license_and_says_so(tmp_path, caplog):
    export(licensed("dinov2_reg4", "mit"), tmp_path / "a.pth", format="dinov2")
    assert not caplog.records
    export(licensed("dinov2_reg4", "cc-by-nc-4.0"), tmp_path / "b.pth", format="dinov2")
    assert "does not tell the license of these weights, which is cc-by-nc-4.0" in caplog.text
    names = [set(torch.load(tmp_path / name, weights_only=True)) for name in ("a.pth", "b.pth")]
    assert names[0] == names[1]
