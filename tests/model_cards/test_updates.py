"""Cards brought up to date: what is ours changes, what is the author's keeps every character."""

import json
import re
from dataclasses import replace

import pytest
import yaml
from cards import KINDS, METRICS, analysed, licensed, trained
from huggingface_hub import EvalResult, ModelCard, metadata_load
from huggingface_hub.utils import yaml_dump
from models import random_bundle
from PIL import Image
from reports import report
from training_runs import TINY

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError
from vitreg_hub.model_cards import merging
from vitreg_hub.model_cards.artifacts import record, record_doors
from vitreg_hub.model_cards.card import render, update
from vitreg_hub.model_cards.merging import merge

REPO = "lab/some-model"
OLD = trained(TINY["supervised"], metrics={"accuracy": 0.25, "knn_accuracy": 0.5})
NEW = analysed(trained(TINY["supervised"], metrics={"accuracy": 0.5}))
CARD, RENEWED = render(OLD, repo=REPO), render(NEW, repo=REPO)
OTHERS = {
    "task": {"type": "image-classification"},
    "dataset": {"type": "imagenet-1k", "name": "ImageNet"},
    "metrics": [{"type": "accuracy", "value": 0.8}],
}


def block(card: str, name: str) -> str:
    """What stands between the marks of a block, and the marks."""
    return re.search(rf"<!-- vitreg:{name} -->\n.*?<!-- /vitreg:{name} -->\n", card, re.DOTALL)[0]


def yaml_of(card: str) -> str:
    return card.split("---\n")[1]


def data_of(card: str) -> dict:
    return yaml.safe_load(yaml_of(card))


def with_yaml(card: str, text: str) -> str:
    return card.replace(yaml_of(card), text, 1)


def with_data(card: str, **changes) -> str:
    """A card whose author has set keys; None removes one."""
    data = {key: value for key, value in (data_of(card) | changes).items() if value is not None}
    return with_yaml(card, yaml_dump(json.loads(json.dumps(data)), sort_keys=False))  # a copy: no anchors


@pytest.mark.parametrize("kind", KINDS)
def test_own_card_becomes_the_card_of_another_bundle(kind):
    bundle = KINDS[kind]()
    card = render(bundle, repo=REPO)
    assert update(CARD, bundle, repo=REPO) == card
    assert update(card, OLD, repo=REPO) == CARD
    assert update(card, bundle, repo=REPO) == card
    files = ("artifacts.png", "curves.png", "recipe.yaml")
    assert update(card, bundle, repo=REPO, files=files) == render(bundle, repo=REPO, files=files)


def test_the_repository_is_the_one_that_the_card_tells():
    assert update(CARD, NEW) == RENEWED
    assert update(render(OLD), NEW) == render(NEW)
    assert update(render(OLD), NEW, repo=REPO) == RENEWED
    assert update(CARD, NEW, repo="lab/other") == render(NEW, repo="lab/other")


def test_text_around_blocks_keeps_every_character():
    ours = {name: f"<!-- /vitreg:{name} -->\n" for name in ("summary", "usage", "artifacts", "metadata")}
    texts = [f"\n  Héllo 🌍 {name}\t \n```\n<b>---</b>\n```\n\n\n" for name in ours]
    card, expected = CARD, RENEWED
    for (name, mark), text in zip(ours.items(), texts, strict=True):
        card, expected = (side.replace(mark, mark + text) for side in (card, expected))
        assert text in card, name
    card, expected = (side.replace("---\n\n<!--", "---\n\nFirst of all.\n<!--", 1) for side in (card, expected))
    assert update(card, NEW) == expected
    assert update(expected, NEW) == expected


def test_text_in_blocks_is_ours():
    assert update(CARD.replace("## Usage\n", "## How to use it\n"), NEW) == RENEWED


@pytest.mark.parametrize("name", ["summary", "usage", "registers", "results", "artifacts", "citation"])
def test_deleted_block_stays_deleted(name):
    without = CARD.replace(block(CARD, name), "")
    changed = update(without, NEW, repo=REPO)
    assert changed == RENEWED.replace(block(RENEWED, name), "")
    assert f"vitreg:{name} -->" not in changed


@pytest.mark.parametrize("card", ["# Mine\n", "---\nlicense: mit\n---\n# Mine\n", "---\nlicense: [\n---\n# Mine"])
def test_card_without_blocks_is_the_authors(card):
    assert update(card, NEW, repo=REPO) == card
    quoted = f"{card}\nIts blocks begin with `<!-- vitreg:usage -->`.\n"
    assert update(quoted, NEW, repo=REPO) == quoted


FRONT = "---\nlicense: mit\nlanguage: en   # mine\n---"


@pytest.mark.parametrize("empty", [FRONT, f"{FRONT}\n", f"{FRONT}\n\n \n", f"\ufeff{FRONT}\n"])
def test_card_of_metadata_alone_gets_blocks_and_metadata(empty):
    for text, card in ((empty, render(NEW, repo=REPO)), (empty.replace("\n", "\r\n"), None)):
        changed = update(text, NEW, repo=REPO)
        assert update(changed, NEW, repo=REPO) == changed
        if card is None:
            assert "\n" not in changed.replace("\r\n", "")
            card, changed = render(NEW, repo=REPO), changed.replace("\r\n", "\n")
        assert changed.partition("---\n\n")[2] == card.partition("---\n\n")[2]
        assert changed.startswith("\ufeff") == empty.startswith("\ufeff")
        assert "license: mit\nlanguage: en   # mine\n" in changed
        assert data_of(changed) == data_of(card) | {"language": "en"}


def test_empty_card_becomes_a_fresh_one():
    assert update("", NEW, repo=REPO) == update(" \n", NEW, repo=REPO).strip(" ").lstrip("\n") == RENEWED


MANY = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 28))])


@pytest.mark.timeout(60)  # for ever, without a bound
@pytest.mark.parametrize(
    "metadata", [f"a: {'[' * 5_000}", f"a: {'[' * 200}{']' * 200}", MANY], ids=["open", "deep", "many"]
)
def test_metadata_of_a_stranger_take_no_unbounded_work_and_stay(metadata):
    changed = update(CARD.replace("---\n", f"---\n{metadata}\n", 1), NEW)
    assert changed.startswith(f"---\n{metadata}\n")


def test_card_of_unreadable_metadata_alone_gets_blocks():
    changed = update("---\nlicense: [\n---\n", NEW, repo=REPO)
    assert changed.startswith("---\nlicense: [\n---\n\n<!-- vitreg:summary -->")
    mended = update(changed.replace("license: [", "license: mit"), NEW, repo=REPO)
    assert mended.partition("---\n\n")[2] == RENEWED.partition("---\n\n")[2]
    assert data_of(mended) == data_of(RENEWED)


def test_repository_in_the_authors_text_is_not_the_cards():
    mine = 'Compare with\n```python\ntimm.create_model("hf-hub:else/where@main", pretrained=True)\n```\n'
    for side in (CARD, render(OLD)):
        card = side.replace("---\n\n<!--", f"---\n\n{mine}<!--", 1)
        expected = RENEWED if side is CARD else render(NEW)
        assert update(card, NEW) == expected.replace("---\n\n<!--", f"---\n\n{mine}<!--", 1)


@pytest.mark.parametrize("revision", ["best", "runs/a"])
def test_branch_is_the_one_that_is_told_or_that_the_card_tells(revision):
    card = update(CARD, OLD, repo=REPO, revision=revision)
    assert card == render(OLD, repo=REPO, revision=revision) != CARD
    assert update(card, NEW) == render(NEW, repo=REPO, revision=revision)
    assert update(card, NEW, revision="main") == update(card, NEW, repo=REPO) == RENEWED
    assert update(card, NEW, repo=REPO, revision="other") == render(NEW, repo=REPO, revision="other")


def test_windows_line_ends():
    card = CARD.replace("\n", "\r\n")
    changed = update(card, NEW)
    assert changed == RENEWED.replace("\n", "\r\n")
    assert update(changed, NEW) == changed
    at_end = card.removesuffix("\r\n")
    assert update(at_end, NEW) == changed.removesuffix("\r\n")
    without = re.sub(r"\A---\r\n.*?---\r\n", "", card, count=1, flags=re.DOTALL)
    assert "\n" not in update(without, NEW).replace("\r\n", "")


def test_byte_order_mark_stays_first():
    assert update("\ufeff" + CARD, NEW) == "\ufeff" + RENEWED


def test_blocks_of_one_name_are_all_brought_up_to_date():
    twice = block(CARD, "results") * 2
    assert update(CARD.replace(block(CARD, "results"), twice), NEW) == RENEWED.replace(
        block(RENEWED, "results"), block(RENEWED, "results") * 2
    )


MARKS = [f"<!-- {end}vitreg:{name} -->" for name in ("summary", "results", "metadata", "novelty") for end in ("", "/")]


@pytest.mark.parametrize("mark", MARKS)
@pytest.mark.parametrize("damage", ["", "mine\n", "  {mark}\n", "{mark} mine\n"])
def test_card_that_lost_a_mark_is_refused(mark, damage):
    whole = CARD + "<!-- vitreg:novelty -->\nold\n<!-- /vitreg:novelty -->\n"
    broken = whole.replace(f"{mark}\n", damage.format(mark=mark))
    assert broken != whole
    for card in (broken, broken.replace("\n", "\r\n"), f"\ufeff{broken}"):
        with pytest.raises(BundleError) as caught:
            update(card, NEW)
        assert mark in str(caught.value)
        assert "put that line back, or delete this one" in str(caught.value)
        assert not set("\r\n") & set(str(caught.value))


@pytest.mark.parametrize("place", ["results", "usage"])
def test_mark_that_is_there_twice_is_refused(place):
    with pytest.raises(BundleError, match="has the line <!-- vitreg:results --> without <!-- /vitreg:results -->"):
        update(CARD.replace(block(CARD, place), "<!-- vitreg:results -->\nThis is mine.\n" + block(CARD, place)), NEW)


def test_record_leaves_a_folder_with_a_damaged_card_as_it_is(tmp_path):
    folder = random_bundle().save(tmp_path / "model", card=CARD.replace("<!-- /vitreg:results -->\n", ""))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(BundleError, match="without <!-- /vitreg:results -->"):
        record(folder, report())
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize("settled", [True, False])
def test_link_to_a_license_goes_with_the_license(settled):
    for old in (OLD, licensed(OLD, "their-license")):
        linked = with_data(render(old, repo=REPO), license_link="https://example.org/LICENSE-NC")
        same, other = (update(linked, of, settled_license=settled) for of in (old, licensed(NEW, "apache-2.0")))
        assert data_of(same)["license_link"] == "https://example.org/LICENSE-NC"
        told = {key: value for key, value in data_of(other).items() if key.startswith("license")}
        assert told == {"license": "apache-2.0"}
        assert metadata_of_license(update(linked, licensed(NEW, "my-own"), settled_license=settled)) == {
            "license": "other",
            "license_name": "my-own",
        }
    named = with_data(CARD, license_name="mit-of-ours", license_link="LICENSE")
    assert metadata_of_license(update(named, licensed(NEW, "apache-2.0"))) == {"license": "apache-2.0"}


def metadata_of_license(card: str) -> dict:
    return {key: value for key, value in data_of(card).items() if key.startswith("license")}


def test_merge_without_a_record_changes_the_license_alone():
    """As the card of both towers of a CLIP model is brought up to date, which has no record."""
    theirs = (
        "# mine\nlicense: mit   # as told\nlicense_link: LICENSE-NC\nlanguage: [en,   de]\ntags: [x,   y]\n"
        "model-index:\n- name: a\n  results:\n  - metrics:\n    - type: accuracy\n      value: 0.5\n"
    )
    told = {"library_name": "open_clip", "tags": ["open_clip", "clip"], "license": "apache-2.0"}
    card = f"---\n{theirs}---\n# Mine\n"
    merged = merge(card, old=told, new=told, settled_license=True)
    assert merged == card.replace(
        "license: mit   # as told\nlicense_link: LICENSE-NC\n", "license: apache-2.0   # as told\n"
    )
    assert merge(merged, old=told, new=told, settled_license=True) == merged


def test_comments_stay_but_for_those_inside_a_renewed_list():
    old = {"library_name": "timm", "tags": ["a", "b"], "license": "mit"}
    card = (
        "---\n# first\nlibrary_name: timm  # ours\n# before\nlicense: mit  # told\n\n# two\ntags:  # all\n"
        "- a  # one\n\n# inside\n- b\n# after\nlanguage: en  # mine\n---\n# Mine\n"
    )
    new = {"library_name": "timm", "tags": ["a", "c"], "license": "mit", "datasets": ["org/x"]}
    changed = card.replace("- a  # one\n\n# inside\n- b\n", "- a\n- c\n")
    changed = changed.replace("library_name", "datasets:\n- org/x\nlibrary_name", 1)
    assert merge(card, old=old, new=new) == changed
    back = card.replace("license: mit", "license: apache-2.0").replace("- a  # one\n\n# inside\n- b\n", "- a\n- b\n")
    assert merge(changed, old=new, new=old | {"license": "apache-2.0"}) == back


def test_record_holds_no_end_of_a_comment():
    data = {"license_name": "a-->b--c---d", "tags": ["x"], "model-index": [{"name": "y"}]}
    comment = merging.record(data)
    assert "--" not in comment.removeprefix("<!--").removesuffix("-->")
    assert merging.recorded(f"x\n{comment}\n") == data | {"model-index": []}


def test_blocks_of_a_newer_version_stay():
    unknown = "<!-- vitreg:novelty -->\nWhat is this?\n<!-- /vitreg:novelty -->\n"
    assert update(CARD + unknown, NEW) == RENEWED + unknown


def test_authors_metadata_stay_as_they_are_written():
    added = "# who we are\nlanguage: [en,   de]   # both\nmodel_creator: 'Ünï'\n"
    card = with_yaml(CARD, added + yaml_of(CARD) + "co2_eq_emissions:\n  emissions: 1.50   # kg\n# the end\n")
    changed = update(card, NEW)
    assert yaml_of(changed) == added + yaml_of(RENEWED) + "co2_eq_emissions:\n  emissions: 1.50   # kg\n# the end\n"
    assert ModelCard(changed).data.to_dict()["model_creator"] == "Ünï"


def test_tags_are_merged():
    tags = data_of(CARD)["tags"]
    mine = ["medical", *[tag for tag in tags if tag not in ("transformers", "vitreg")], "zebra"]
    found = data_of(update(with_data(CARD, tags=mine), random_bundle("vit_nano_reg8"), repo=REPO))["tags"]
    assert found == ["medical", "timm", "vision-transformer", "registers", "zebra", "vit_nano_reg8"]
    none = data_of(update(with_data(CARD, tags=mine), random_bundle("vit_nano_reg0"), repo=REPO))["tags"]
    assert none == ["medical", "timm", "vision-transformer", "zebra", "vit_nano_reg0"]


def test_what_is_no_list_becomes_one_where_something_is_added():
    card = with_data(CARD, tags="medical")
    without = card.replace(block(card, "metadata"), "")
    assert set(data_of(update(without, NEW))["tags"]) == {"medical", *data_of(RENEWED)["tags"]}


@pytest.mark.parametrize("bundle", [licensed(OLD, "apache-2.0"), licensed(OLD, None), licensed(OLD, "some-license")])
def test_license_follows_the_bundle_unless_the_author_has_changed_it(bundle):
    fresh = {key: data_of(render(bundle))[key] for key in ("license", "license_name") if key in data_of(render(bundle))}
    changed = data_of(update(CARD, bundle))
    assert {key: value for key, value in changed.items() if key.startswith("license")} == fresh
    for theirs in ({"license": "cc-by-4.0"}, {"license": "other", "license_name": "mine", "license_link": "LICENSE"}):
        changed = data_of(update(with_data(CARD, **theirs), bundle))
        assert {key: value for key, value in changed.items() if key.startswith("license")} == theirs
    removed = data_of(update(with_data(CARD, license=None), bundle))
    assert not [key for key in removed if key.startswith("license")]


@pytest.mark.parametrize("license", ["apache-2.0", "some-license", None])
@pytest.mark.parametrize(
    "theirs",
    [
        {"license": "MIT"},
        {"license": ["mit"]},
        {"license": "other", "license_name": "mine"},
        {"license": None},
        {},
    ],
    ids=str,
)
def test_settled_license_replaces_the_cards(license, theirs):
    bundle = licensed(OLD, license)
    fresh = {key: value for key, value in data_of(render(bundle)).items() if key.startswith("license")}
    without = CARD.replace(block(CARD, "metadata"), "")
    for side in (CARD, without):
        changed = data_of(update(with_data(side, **theirs), bundle, settled_license=True))
        assert {key: value for key, value in changed.items() if key.startswith("license")} == fresh
        assert changed["tags"] == data_of(CARD)["tags"]


def test_keys_that_the_author_has_changed_or_removed_stay_so():
    card = with_data(CARD, pipeline_tag="zero-shot-image-classification", library_name=None)
    changed = update(card, random_bundle(num_classes=0))
    assert data_of(changed)["pipeline_tag"] == "zero-shot-image-classification"
    assert "library_name" not in data_of(changed)
    assert data_of(update(CARD, random_bundle(num_classes=0)))["pipeline_tag"] == "image-feature-extraction"
    assert "model-index" not in data_of(update(with_data(CARD, **{"model-index": None}), NEW))


def test_without_a_record_missing_keys_are_filled_in_and_others_stay():
    card = with_data(CARD, license="gpl-3.0", pipeline_tag=None, **{"model-index": None})
    card = card.replace(block(card, "metadata"), "")
    found = data_of(update(card, NEW))
    assert found.pop("license") == "gpl-3.0"
    assert found == {key: value for key, value in data_of(RENEWED).items() if key != "license"}
    broken = CARD.replace('"license": "mit"', '"license": "mit')
    assert data_of(update(broken, NEW)) == data_of(RENEWED)


def test_no_metadata_at_all():
    body = CARD.partition("---\n\n")[2]
    assert update(body, NEW) == RENEWED
    empty = block(CARD, "metadata")
    assert update(f"---\n\n---\n\n{body}".replace(empty, ""), NEW) == RENEWED.replace(block(RENEWED, "metadata"), "")


@pytest.mark.parametrize(
    "text", ["license: [mit\n", "license: 'mit\n", "- a\n- b\n", "just words\n", "when: 2024-13-45\n"]
)
def test_metadata_that_cannot_be_read_stay_and_blocks_are_brought_up_to_date(text):
    changed = update(with_yaml(CARD, text), NEW)
    expected = with_yaml(RENEWED, text).replace(block(RENEWED, "metadata"), block(CARD, "metadata"))
    assert changed == expected
    assert update(changed, NEW) == changed


@pytest.mark.parametrize("text", ["{license: mit, tags: [a]}\n", "tags: &a [timm]\nx: *a\n", "x: &a [b]\ntags: *a\n"])
def test_metadata_in_forms_that_cannot_be_merged_stay(text):
    bundle = random_bundle("vit_nano_reg8")
    changed = update(with_yaml(CARD, text), bundle, repo=REPO)
    fresh = render(bundle, repo=REPO)
    assert changed == with_yaml(fresh, text).replace(block(fresh, "metadata"), block(CARD, "metadata"))
    assert update(changed, bundle, repo=REPO) == changed


def test_results_of_others_stay_and_ours_are_renewed():
    (model,) = data_of(CARD)["model-index"]
    ours = {"results": model["results"], "name": model["name"]}
    around = [{"name": "first", "results": [OTHERS]}, {**ours, "results": [OTHERS, *ours["results"], OTHERS]}]
    card = with_data(CARD, **{"model-index": [*around, {"name": "last", "results": [OTHERS]}]})
    changed = update(card, NEW)
    fresh = data_of(RENEWED)["model-index"][0]["results"]
    assert data_of(changed)["model-index"] == [
        {"name": "first", "results": [OTHERS]},
        {"name": model["name"], "results": [*fresh, OTHERS, OTHERS]},
        {"name": "last", "results": [OTHERS]},
    ]
    values = [result.metric_value for result in ModelCard(changed).data.eval_results]
    assert values == [0.8, 0.5, 0.8, 0.8, 0.8]
    assert data_of(update(changed, random_bundle()))["model-index"][1] == {
        "name": model["name"],
        "results": [OTHERS, OTHERS],
    }


def test_results_are_added_to_those_of_the_same_model():
    index = [{"name": "some-model", "results": [OTHERS]}, {"name": "else", "results": [OTHERS]}]
    card = with_data(render(random_bundle(), repo=REPO), **{"model-index": index})
    found = data_of(update(card, NEW))["model-index"]
    assert [(model["name"], len(model["results"])) for model in found] == [("some-model", 2), ("else", 1)]
    elsewhere = with_data(card, **{"model-index": index[1:]})
    found = data_of(update(elsewhere, NEW))["model-index"]
    assert [model["name"] for model in found] == ["else", "some-model"]


def test_results_written_by_the_hubs_own_class_are_kept():
    card = ModelCard(CARD)
    card.data.eval_results.append(
        EvalResult(
            task_type="image-classification",
            dataset_type="beans",
            dataset_name="Beans",
            metric_type="accuracy",
            metric_value=0.9,
        )
    )
    changed = ModelCard(update(str(card), NEW)).data.eval_results
    assert sorted(result.metric_value for result in changed) == [0.5, 0.9]


@pytest.mark.parametrize("task", METRICS)
def test_updating_twice_is_updating_once(task):
    bundle = trained(TINY[task], metrics=METRICS[task])
    card = with_data(
        CARD, tags=["x"], license="gpl-3.0", extra={"a": [1, 2]}, **{"model-index": [{"results": [OTHERS]}]}
    )
    once = update(card + "\nmine\n", bundle)
    assert once != card
    assert update(once, bundle) == once


def test_record_changes_everything_that_tells_and_nothing_else(tmp_path):
    bundle = trained(TINY["supervised"], metrics={"accuracy": 0.5})
    folder = bundle.save(tmp_path / "model", card=render(bundle, repo=REPO))
    (folder / "README.md").write_bytes((render(bundle, repo=REPO) + "\nMine.\n").replace("\n", "\r\n").encode())
    (folder / "recipe.yaml").write_text("name: x\n")
    weights = (folder / "model.safetensors").read_bytes()
    found = report(registers=2)
    assert record(folder, found) is True
    assert {path.name for path in folder.iterdir()} == {
        *("config.json", "model.safetensors", "README.md", "recipe.yaml", "artifacts.png")
    }
    assert (folder / "model.safetensors").read_bytes() == weights
    card = (folder / "README.md").read_bytes().decode()
    kept = ModelBundle.load(folder)
    expected = render(kept, repo=REPO, files=["artifacts.png", "recipe.yaml"]) + "\nMine.\n"
    assert card == expected.replace("\n", "\r\n")
    assert "![Norms of the tokens after every block](artifacts.png)" in card
    with Image.open(folder / "artifacts.png") as figure:
        assert figure.width > 600
    assert metadata_load(folder / "README.md")["tags"]
    drawn = (folder / "artifacts.png").read_bytes()
    assert record(folder, report(registers=2, outliers=False)) is True
    assert (folder / "artifacts.png").read_bytes() != drawn
    assert record_doors(folder, {"timm": 0.0}) is True
    assert "outputs to vitreg_hub's own: timm 0." in (folder / "README.md").read_text()
    told = json.loads((folder / "config.json").read_text())["vitreg"]["provenance"]
    assert told["doors"] == {"timm": 0.0}
    assert told["made"]["recipe"]["name"] == "tiny_supervised"


def test_record_leaves_an_authors_card_and_bytes_that_are_no_text(tmp_path):
    folder = random_bundle().save(tmp_path / "model", card="# mine\n")
    assert record(folder, report()) is False
    assert (folder / "README.md").read_text() == "# mine\n"
    assert (folder / "artifacts.png").is_file()
    latin = render(random_bundle()).encode() + "\nÜber mich\n".encode("latin-1")
    (folder / "README.md").write_bytes(latin)
    assert record(folder, report()) is True
    assert (folder / "README.md").read_bytes().endswith("\nÜber mich\n".encode("latin-1"))
    (folder / "README.md").write_text(CARD.replace(block(CARD, "artifacts"), ""))
    assert record(folder, report()) is False  # what its author has deleted


def test_record_without_a_card(tmp_path):
    folder = random_bundle().save(tmp_path / "model")
    assert record(folder, report(), card=False) is False
    assert not (folder / "README.md").exists()
    assert record(folder, report()) is True
    assert "![Norms" in (folder / "README.md").read_text()


@pytest.mark.parametrize("fails", ["artifacts.png", "config.json", "README.md"])
def test_record_changes_everything_or_nothing(fails, tmp_path, monkeypatch):
    folder = random_bundle().save(tmp_path / "model", card=render(random_bundle()))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    place = type(folder).replace

    def full(self, target):
        if target.name == fails:
            raise OSError(28, "No space left on device")
        return place(self, target)

    monkeypatch.setattr(type(folder), "replace", full)
    with pytest.raises(BundleError, match=r"cannot write to .*: No space left on device") as caught:
        record(folder, report())
    assert "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_record_needs_a_bundle(tmp_path):
    with pytest.raises(BundleError, match="is not a bundle"):
        record(tmp_path, report())
    assert not list(tmp_path.iterdir())
    folder = random_bundle().save(tmp_path / "model")
    (folder / "README.md").mkdir()
    with pytest.raises(BundleError, match="cannot read"):
        record(folder, report())
    assert not (folder / "artifacts.png").exists()


def test_card_of_a_replaced_bundle_has_no_results_of_the_old_one():
    changed = update(CARD, replace(NEW, provenance=random_bundle().provenance))
    assert "0.2500" not in changed
    assert "model-index" not in data_of(changed)
