"""Provenance as JSON: what older versions wrote is read for ever, and what does not fit ends in one sentence."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from cards import sections
from models import random_bundle
from reports import report

from vitreg_hub.bundle.info import describe
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import (
    BestModel,
    Foreign,
    Provenance,
    SourceOfRun,
    Transformation,
    migrate,
    provenance_from_json,
    provenance_to_json,
)
from vitreg_hub.cli import main
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import BundleError
from vitreg_hub.hub.publish import push
from vitreg_hub.model_cards.artifacts import record, record_doors
from vitreg_hub.model_cards.card import render

RECORDED = {path.stem: path for path in Path(__file__).with_name("recorded").glob("*.json")}
"""The config.json of bundles that were made before what made them had a type."""
SHIPPED = {path.name: path / "config.json" for path in (Path(__file__).parents[2] / "vitreg_hub/weights").iterdir()}
DOORS = dict.fromkeys(("timm", "timm+vitreg_hub", "transformers", "transformers+vitreg_hub"), 0.0)


def entry(name: str) -> dict[str, Any]:
    if name == "new":
        return {"origin": "x"}
    return json.loads((RECORDED | SHIPPED)[name].read_text())["vitreg"]["provenance"]


@pytest.mark.parametrize("name", RECORDED | SHIPPED)
def test_recorded_ones_lose_nothing(name):
    old = entry(name)
    told = provenance_from_json(old)
    assert provenance_from_json(provenance_to_json(told)) == told
    settings = old.pop("settings")
    assert {key: getattr(told, key) for key in old} == old
    kept = provenance_to_json(told)
    new = kept | kept["made"] | kept["made"].get("recipe", kept["made"].get("settings", {}))
    for key, value in settings.items():
        match key:
            case "conversion":
                assert value == {name: kept["made"][name] for name in value}
            case "data":
                assert value == new["data"] | {"evaluated": told.run.evaluated} if "evaluated" in value else new["data"]
            case "opt" | "lr" | "weight_decay":
                assert value == new["optim"][key]
            case _:
                assert value == new[key]


def test_recorded_ones_are_of_their_kinds():
    told = {name: provenance_from_json(entry(name)) for name in RECORDED | SHIPPED}
    assert {name: found.made.kind for name, found in told.items()} == {
        **dict.fromkeys(("converted", "measured", "untrained_registers"), "conversion"),
        **dict.fromkeys(("trained", "best", "flat", *SHIPPED), "training"),
        **dict.fromkeys(("transformers", "somewhere"), "foreign"),
    }
    assert told["converted"].conversion.format == "hf-dinov2-with-registers"
    assert told["converted"].conversion.differences.keys() == {"tokens"}
    assert told["untrained_registers"].conversion.untrained_registers == 4
    assert told["best"].best == BestModel(score="patch_cosine", step=4)
    assert told["trained"].best is None
    assert told["trained"].run.evaluated == 32
    assert told["trained"].run.sources["task.teacher"] == SourceOfRun(
        name="vit_nano_reg4.digits",
        license="apache-2.0",
        sha256=entry("trained")["settings"]["sources"]["task.teacher"]["sha256"],
    )
    assert told["measured"].doors == DOORS
    assert told["measured"].artifacts.num_images == 64
    assert told["vit_nano_reg4.digits"].run.facts.lr == 0.004
    assert (told["flat"].run.facts.opt, told["flat"].run.facts.lr) == ("nadamuon", 0.002)


def test_an_older_bundle_is_told_and_written_in_the_new_form(tmp_path):
    bundle = random_bundle()
    config = bundle.to_json()
    config["vitreg"]["provenance"] = entry("measured")
    folder = bundle.save(tmp_path / "model")
    (folder / "config.json").write_text(json.dumps(config))
    report = ConversionReport.of(ModelBundle.load(folder))
    assert "format       hf-dinov2-with-registers" in str(report)
    found = sections(render(ModelBundle.load(folder)))
    assert "read as format `hf-dinov2-with-registers`" in found["Conversion"]
    assert "not measured" not in found["Results"]
    record_doors(folder, {"timm": 0.5})
    written = json.loads((folder / "config.json").read_text())["vitreg"]["provenance"]
    assert written == migrate(written)
    assert written["doors"] == {"timm": 0.5}
    assert ConversionReport.of(ModelBundle.load(folder)) == report


def test_settings_of_strangers_are_kept_and_can_be_told():
    settings = {"model": {"start": 5}, "task": 5, "step": "x", "watch": [1], "notes": None}
    told = provenance_from_json({"origin": "x", "settings": settings})
    assert told == Provenance(origin="x", made=Foreign(settings=settings))


def test_every_kind_comes_back():
    told = Provenance(origin="x", made=Transformation(source="hf-hub:lab/model", what="4 registers added to a copy"))
    assert provenance_from_json(json.loads(json.dumps(provenance_to_json(told)))) == told


def changed(data: Any, place: str, value: Any) -> Any:
    """A copy of an entry in which something else is in one place."""
    key, _, rest = place.partition("/")
    return data | {key: changed(data.get(key, {}), rest, value) if rest else value}


STRANGE = [
    ("trained", "settings", 3, "vitreg.provenance.settings must be an object, not 3"),
    ("trained", "settings/model", 5, "made.recipe.model must be an object, not 5"),
    ("trained", "settings/model/start", 5, "made.recipe.model.start must be text, not 5"),
    ("trained", "settings/task/kind", 5, "made.recipe.task.kind must be text, not 5"),
    ("trained", "settings/task/teacher", 5, "made.recipe.task.teacher must be text, not 5"),
    ("trained", "settings/data/train", 5, "made.recipe.data.train must be text, not 5"),
    ("trained", "settings/data/evaluated", "x", "made.evaluated must be a whole number, not 'x'"),
    ("trained", "settings/data", [1], "made.recipe.data must be an object, not [1]"),
    ("trained", "settings/optim", 3, "made.recipe.optim must be an object, not 3"),
    ("trained", "settings/optim/lr", "x", "made.recipe.optim.lr must be a number, not 'x'"),
    ("trained", "settings/step", "x", "made.step must be a whole number, not 'x'"),
    ("trained", "settings/step", True, "made.step must be a whole number, not True"),
    ("trained", "settings/batch_size", "x", "made.recipe.batch_size must be a whole number, not 'x'"),
    ("trained", "settings/watch/eval_images", "x", "made.recipe.watch.eval_images must be a whole number, not 'x'"),
    ("trained", "settings/sources", [1], "made.sources must be an object, not [1]"),
    ("trained", "settings/sources/task.teacher/name", 5, "made.sources.task.teacher.name must be text, not 5"),
    ("best", "settings/best", 5, "best must be an object, not 5"),
    ("best", "settings/best", {"score": "accuracy"}, "provenance.best.step is missing"),
    ("best", "settings/best/score", 5, "best.score must be text, not 5"),
    ("measured", "settings/doors", 3, "doors must be an object, not 3"),
    ("measured", "settings/doors/timm", "x", "doors.timm must be a number, not 'x'"),
    ("measured", "settings/artifacts", [1], "artifacts must be an object, not [1]"),
    ("measured", "settings/artifacts", {"verdict": "x"}, "artifacts.images is missing"),
    ("converted", "settings/conversion", 3, "settings.conversion must be an object, not 3"),
    ("converted", "settings/conversion", {"source": "x"}, "made.sha256 is missing"),
    ("converted", "settings/conversion/dropped", {"why": 3}, "made.dropped.why must be a list, not 3"),
    ("converted", "settings/conversion/untrained_registers", "x", "made.untrained_registers must be a whole number"),
    ("converted", "settings/conversion/more", 1, "made holds ['more']; a newer vitreg_hub may know them"),
    ("new", "made", {"kind": "magic"}, "made must be of the kind 'conversion', 'training', "),
    ("new", "made", {"source": "y"}, "vitreg.provenance.made must be an object with the key 'kind', not {"),
    ("new", "made", 3, "made must be an object, not 3"),
    ("somewhere", "made", {"kind": "foreign"}, "holds ['settings']; a newer"),
    ("somewhere", "origin", "\ud800", "vitreg.provenance cannot be read (Invalid JSON: "),
]
"""A change of a recorded entry, and what is said about it."""
for _key in ("verdict", "images", "image_size", "outlier_fraction", "attention", "notes", "block"):
    for _wrong in (None, 5.5, [None], [1, 2, None], {"a": 1}):
        STRANGE.append(("measured", f"settings/artifacts/{_key}", _wrong, f"artifacts.{_key}"))
for _key in ("sha256", "format", "num_mapped", "dropped", "network", "notes", "measured"):
    for _wrong in (None, 5.5, [1], [{"a": 1}]):
        STRANGE.append(("converted", f"settings/conversion/{_key}", _wrong, f"made.{_key}"))


@pytest.mark.parametrize(("name", "place", "value", "said"), STRANGE, ids=str)
def test_what_does_not_fit_ends_in_a_sentence(name, place, value, said):
    with pytest.raises(BundleError, match=re.escape(said)) as caught:
        provenance_from_json(changed(entry(name), place, value))
    assert str(caught.value).startswith("vitreg.provenance")
    assert "\n" not in str(caught.value)


def pushed(folder: Path) -> None:
    push(folder, "lab/x")


def measured_again(folder: Path) -> None:
    record(folder, report())


@pytest.mark.parametrize("opens", [ModelBundle.load, describe, pushed, measured_again])
def test_wherever_it_is_opened(opens, hub, tmp_path):
    bundle = random_bundle()
    config = bundle.to_json()
    config["vitreg"]["provenance"] = changed(entry("trained"), "settings/optim/lr", "x\n")
    folder = bundle.save(tmp_path / "model", card=render(bundle))
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        BundleError, match=r"vitreg\.provenance\.made\.recipe\.optim\.lr must be a number, not"
    ) as caught:
        opens(folder)
    assert "\n" not in str(caught.value)
    with pytest.raises(SystemExit, match=r"^vitreg: .*optim\.lr must be a number"):
        main(["info", str(folder)])
