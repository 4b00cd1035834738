"""`vitreg info`: facts against models that timm builds by name, and config.json as json reads it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from checkpoints import GOLDEN, convert
from huggingface_hub import CommitOperationAdd, HfApi
from models import ONE_OF_EACH_KIND, random_bundle
from torch import nn

from vitreg_hub.arch import ARCHS
from vitreg_hub.bundle.info import describe
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import BestModel, Foreign, Provenance, TrainingRun, Transformation
from vitreg_hub.cli import main
from vitreg_hub.errors import BundleError, HubError, UnknownArchError, VitregError

SHIPPED = Path(__file__).parents[2] / "vitreg_hub/weights/vit_nano_reg4.digits"
FULL = Provenance(
    origin="a test",
    license="cc-by-sa-4.0",
    dataset="digits",
    metrics={"accuracy": 0.98765},
    made=TrainingRun(
        recipe={"name": "supervised", "batch_size": 32, "optim": {"opt": "adamw"}}, step=10, total_steps=20
    ),
    versions={"torch": "2.0"},
    command="vitreg train supervised",
    commit="c" * 40,
    created="2025-01-02T03:04:05+00:00",
    hardware="a CPU",
    seconds=3725.4,
)


def table(text: object) -> dict[str, list[str]]:
    """The printed rows by their first word or words."""
    rows: dict[str, list[str]] = {}
    for line in str(text).splitlines():
        key, _, value = line.partition("  ")
        rows.setdefault(key, []).append(value.strip())
    return rows


def saved(provenance: Provenance, folder: Path, *args, **kwargs) -> Path:
    bundle = random_bundle(*args, **kwargs)
    return ModelBundle.from_timm(bundle.build(), arch=bundle.arch, provenance=provenance).save(folder)


@pytest.mark.parametrize("arch", ["vit_nano_reg8", "vit_tiny_reg2_plain", "vit_tiny_reg0_deit_distilled"])
def test_facts_are_those_of_the_model_that_timm_builds(arch):
    model, facts = timm.create_model(arch, num_classes=0).eval(), describe(arch).architecture
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    with torch.no_grad():
        tokens = model.forward_features(torch.zeros(1, 3, *facts["image_size"]))
    assert list(tokens.shape[1:]) == [facts["tokens"], facts["width"]]
    assert facts["tokens"] == facts["class_tokens"] + facts["registers"] + facts["patches"]
    assert facts["class_tokens"] == (2 if "distilled" in arch else 1)
    assert facts["depth"] == len(model.blocks)
    assert facts["norm_epsilon"] == model.norm.eps
    assert facts["pooling"] == model.global_pool
    assert describe(arch).provenance is None


@pytest.mark.parametrize("arch", ["vit_giant_reg4", "vit_large_reg8_clip", "vit_huge_reg1_deit3"])
def test_facts_of_large_ones(arch):
    model, facts = timm.create_model(arch, num_classes=0, device="meta"), describe(arch).architecture
    assert facts["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert facts["registers"] == model.reg_token.shape[1]
    assert facts["mlp_hidden"] == model.blocks[0].mlp.fc1.weight.shape[0]
    assert facts["activation"] == ("silu" if isinstance(model.blocks[0].mlp.act, nn.SiLU) else "gelu")
    assert (facts["mlp"] == "SwiGLU") == (facts["activation"] == "silu")
    assert (facts["layer_scale"] is None) == isinstance(model.blocks[0].ls1, nn.Identity)
    assert facts["num_heads"] == model.blocks[0].attn.num_heads


def test_every_architecture_can_be_described():
    for name in ("vit_nano_reg1", *[arch for arch in ARCHS if arch.startswith("vit_base")]):
        assert describe(name).architecture["parameters"] == ARCHS[name].num_params


@pytest.mark.parametrize("arch", ONE_OF_EACH_KIND)
def test_a_bundle_with_its_own_settings(arch, folder):
    model = saved(Provenance(origin="x"), folder, arch, **ONE_OF_EACH_KIND[arch])
    built, facts = ModelBundle.load(model).build(), describe(model).architecture
    assert facts["parameters"] == sum(parameter.numel() for parameter in built.parameters())
    assert facts["image_size"] == list(built.patch_embed.img_size)
    assert facts["num_classes"] == 10
    assert facts["preprocess"]["mean"] == built.pretrained_cfg["mean"]


def test_the_epsilon_of_a_network_that_is_stored_scaled(folder):
    convert(GOLDEN / "hf_vit_eps_probe/model", folder)
    assert describe(folder).architecture["norm_epsilon"] == pytest.approx(1e-12, rel=0.05)


def test_provenance_is_that_of_the_config(folder, capsys):
    saved(FULL, folder)
    main(["info", str(folder)])
    rows = table(capsys.readouterr().out)
    assert rows["origin"] == ["a test"]
    assert rows["license"] == ["cc-by-sa-4.0"]
    assert rows["data set"] == ["digits"]
    assert rows["measured"] == ["accuracy 0.9877"]
    assert rows["training"] == ["recipe supervised, steps 10 of 20, batch size 32, optimiser adamw"]
    assert rows["versions"] == ["torch 2.0"]
    assert [rows[key] for key in ("command", "commit", "created", "hardware")] == [
        ["vitreg train supervised"],
        ["c" * 40],
        ["2025-01-02T03:04:05+00:00"],
        ["a CPU"],
    ]
    assert rows["time"] == ["62.1 minutes"]
    assert "conversion" not in rows
    assert rows["doors"] == ["not measured"]
    assert "settings" not in rows


def test_doors_are_told_and_are_no_training(folder):
    doors = {"timm": 0.0, "transformers": 0.25}
    saved(Provenance(origin="x", doors=doors), folder)
    told = describe(folder)
    rows = table(told)
    assert rows["doors"] == ["largest absolute difference 0 in timm, 0.25 in transformers"]
    assert "training" not in rows
    assert told.provenance == Provenance(origin="x", doors=doors)


def test_settings_of_others_are_no_training(folder):
    settings = {"seed": 3, "notes": "mine"}
    saved(Provenance(origin="x", made=Foreign(settings=settings)), folder)
    told = describe(folder)
    assert told.provenance.made.settings == settings
    assert "training" not in table(told)
    assert set(table(told)["settings"][0].split(", ")) == {"seed", "notes"}


def test_the_best_of_a_run_is_told(folder):
    saved(replace(FULL, best=BestModel(score="knn_accuracy", step=10)), folder)
    assert table(describe(folder))["training"] == [
        "recipe supervised, steps 10 of 20, batch size 32, optimiser adamw, best of its run by knn_accuracy"
    ]


def test_a_transformation_is_told(folder):
    saved(Provenance(origin="x", made=Transformation(source="y", what="4 registers added to a copy")), folder)
    assert table(describe(folder))["made"] == ["4 registers added to a copy of y"]


def test_json_is_the_same(folder, capsys):
    saved(FULL, folder)
    main(["info", str(folder), "--json"])
    told = json.loads(capsys.readouterr().out)
    written = json.loads((folder / "config.json").read_text())["vitreg"]["provenance"]
    assert told["architecture"]["architecture"] == "vit_nano_reg4"
    assert told["architecture"]["tokens"] == 69
    assert {key: told["provenance"][key] for key in written} == written


def test_a_conversion_is_told(folder, tmp_path):
    convert(GOLDEN / "dinov2_vit_mlp_hub/checkpoint.pth", folder, num_heads=2, num_registers=4)
    report = json.loads((folder / "config.json").read_text())["vitreg"]["provenance"]["made"]
    rows = table(describe(folder))
    assert rows["source"] == ["checkpoint.pth, read as dinov2"]
    assert rows["sha256"] == [f"{report['sha256']['checkpoint.pth']}  checkpoint.pth"]
    assert rows["mapped"] == [f"{report['num_mapped']} tensors"]
    assert [row.rpartition(": ")[2] for row in rows["dropped"]] == list(report["dropped"])
    assert rows["registers"] == ["4 of 4 drawn at random, untrained"]
    assert rows["license"] == ["unknown"]
    assert rows["difference"] == ["not measured"]
    assert rows["command"] == ["not recorded"]  # nobody typed one
    assert "training" not in rows
    for key in "created", "hardware", "time", "versions":
        assert rows[key] != ["not recorded"]


def test_what_an_older_bundle_does_not_have():
    """The shipped weights may be older than the fields: those that their config.json lacks are told so."""
    config = json.loads((SHIPPED / "config.json").read_text())["vitreg"]["provenance"]
    told = describe("vit_nano_reg4.digits")
    rows = table(told)
    for key in "command", "commit", "created", "hardware":
        assert rows[key] == [config.get(key) or "not recorded"]
    assert told.provenance.metrics == config["metrics"]
    assert table(describe(SHIPPED)) | {"model": ["vit_nano_reg4.digits"]} == rows


def test_published_weights_of_others():
    told = describe("vit_large_reg4.dinov2_lvd142m")
    assert told.provenance.origin == "weights of hf-hub:timm/vit_large_patch14_reg4_dinov2.lvd142m"
    assert told.provenance.license == timm.get_pretrained_cfg("vit_large_patch14_reg4_dinov2.lvd142m").license
    assert describe("vit_large_reg4") == told


def put(hub, repo: str, files: dict[str, bytes]) -> str:
    api = HfApi()
    api.create_repo(repo)
    added = [CommitOperationAdd(name, data) for name, data in files.items()]
    return api.create_commit(repo, added, commit_message="files").oid


def test_of_a_repository_only_the_config_is_fetched(hub, folder):
    saved(FULL, folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    commit = put(hub, "lab/model", files)
    told = describe("hf-hub:lab/model")
    assert told.name == f"hf-hub:lab/model@{commit}"
    assert told.provenance == describe(folder).provenance
    assert told.architecture == describe(folder).architecture
    fetched = {str(request) for request in hub.requests if "/resolve/" in str(request)}
    assert any("config.json" in request for request in fetched)
    assert not any("model.safetensors" in request for request in fetched)


def strange(change):
    """The bytes of a bundle's config.json after a change."""
    config = json.loads((SHIPPED / "config.json").read_text())
    change(config)
    return json.dumps(config)


MISTAKES = [
    ("vit_nano_reg5", UnknownArchError, "no architecture 'vit_nano_reg5'; closest: vit_nano_reg"),
    ("vit_nano_reg4.letters", UnknownArchError, "vit_nano_reg4 has no weights 'letters'; it has digits."),
    ("vit_tiny_reg4.digits", UnknownArchError, "vit_tiny_reg4 has no weights 'digits'; it has none."),
    ("org/name", UnknownArchError, "a Hub repository needs the prefix 'hf-hub:'"),
    ("{tmp}", BundleError, "is not a bundle: it has no config.json"),
]


@pytest.mark.parametrize(("source", "error", "sentence"), MISTAKES)
def test_mistakes(source, error, sentence, tmp_path):
    with pytest.raises(error) as caught:
        describe(source.format(tmp=tmp_path))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_repositories_without_a_bundle(hub):
    with pytest.raises(HubError, match="no repository lab/nothing"):
        describe("hf-hub:lab/nothing")
    put(hub, "lab/notes", {"notes.txt": b"nothing"})
    with pytest.raises(BundleError, match="hf-hub:lab/notes is not a bundle"):
        describe("hf-hub:lab/notes")


STRANGE = [
    (lambda c: c["vitreg"]["provenance"].update(command=["a"]), "provenance.command must be text, not ['a']"),
    (lambda c: c["vitreg"]["provenance"].update(seconds="long"), "provenance.seconds must be a number, not 'long'"),
    (lambda c: c["model_args"].update(img_size=[33, 32]), "33"),
    (lambda c: c["model_args"].update(mlp_ratio="wide"), "timm cannot build the model of"),
]


@pytest.mark.parametrize(("change", "sentence"), STRANGE)
def test_broken_configs_end_in_a_sentence(change, sentence, tmp_path):
    (tmp_path / "config.json").write_text(strange(change))
    with pytest.raises(VitregError) as caught:
        describe(tmp_path)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_stranger_cannot_move_the_cursor(tmp_path):
    evil = "a\nlicense  mit\x1b[2J"
    (tmp_path / "config.json").write_text(strange(lambda c: c["vitreg"]["provenance"].update(origin=evil)))
    printed = str(describe(tmp_path))
    assert "\x1b" not in printed
    assert table(printed)["license"] == ["apache-2.0"]
