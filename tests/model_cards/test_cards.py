"""What cards say, read back by huggingface_hub and looked up in the bundle; their code, executed."""

import re
from dataclasses import replace

import pytest
import yaml
from cards import KINDS, MADE, METRICS, analysed, best_of_its_run, licensed, made_otherwise, sections, telling, trained
from golden_cases import ARGUMENTS, convert, source
from golden_cases import bundle as golden
from huggingface_hub import ModelCard
from models import ONE_OF_EACH_KIND, random_bundle
from reports import report
from training_runs import TINY, lines

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.files import EXTRA_FILES
from vitreg_hub.licenses import IDENTIFIERS
from vitreg_hub.model_cards.artifacts import summary
from vitreg_hub.model_cards.card import render, with_doors
from vitreg_hub.model_cards.metadata import base_model
from vitreg_hub.objectives import Objective, Score
from vitreg_hub.training.loop import train

REPO = "lab/some-model"
SECTIONS = [
    "Usage",
    "Registers",
    "Intended use and limits",
    "Training",
    "Conversion",
    "Results",
    "Artifacts",
    "Environment",
    "Citation",
]


@pytest.fixture(scope="module", params=KINDS)
def bundle(request) -> ModelBundle:
    return KINDS[request.param]()


@pytest.fixture(scope="module")
def card(bundle) -> str:
    return render(bundle, repo=REPO)


def test_every_section_is_there_and_holds_something(bundle, card):
    found = sections(card)
    run, conversion = bundle.provenance.run, bundle.provenance.conversion
    absent = set() if run and run.facts.batch_size else {"Training"}
    absent |= set() if conversion else {"Conversion"}
    assert list(found) == [title for title in SECTIONS if title not in absent]
    assert all(found.values())
    assert "None" not in card
    assert "your-name" not in card
    assert "your-name/" in render(bundle)


def test_metadata_are_what_the_hub_takes(bundle, card):
    data = ModelCard(card).data
    assert data.library_name == "timm"
    assert data.license in IDENTIFIERS
    told = bundle.provenance.license
    assert (data.get("license_name") if data.license == "other" else data.license) == (told or "unknown")
    registers = bundle.state_dict["reg_token"].shape[1] if "reg_token" in bundle.state_dict else 0
    assert {"timm", "transformers", "vision-transformer", "vitreg", bundle.arch} <= set(data.tags)
    assert ("registers" in data.tags) == bool(registers)
    assert data.to_dict().keys() <= {
        *("base_model", "datasets", "library_name", "license", "license_name", "pipeline_tag", "tags", "model-index")
    }
    told = {result.metric_name: result.metric_value for result in data.eval_results or ()}
    assert sorted(told.values()) == sorted(bundle.provenance.metrics.values())


def test_facts_of_the_network_are_those_of_its_tensors(bundle, card):
    weights, found = bundle.state_dict, sections(card)
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    width, channels, patch, _ = weights["patch_embed.proj.weight"].shape
    head = re.sub(r"<!--.*?-->", "", card).partition("## Usage")[0]
    assert f"`{bundle.arch}`" in head
    assert f"{depth} blocks of width {width:,} with" in head
    assert f"patches of {patch} pixels" in head
    number = sum(x.numel() for x in weights.values())
    assert (f"{number / 1e6:.1f} M parameters" if number >= 1e6 else f"{number / 1e3:.1f} K parameters") in head
    assert f"multiples of {patch} pixels" in found["Intended use and limits"]
    assert f"with {channels} channel" in found["Intended use and limits"]
    has = "reg_token" in weights
    assert ("**This model has none.**" in found["Registers"]) == (not has)
    if has:
        first = sum(name in weights for name in ("cls_token", "dist_token"))
        last = first + weights["reg_token"].shape[1] - 1
        said = f"token {first} of" if first == last else f"tokens {first} to {last} of"
        assert said in found["Registers"]
        assert f"`tokens[:, {last + 1}:]`" in found["Registers"]
    limits = found["Intended use and limits"]
    assert (f"{bundle.residual_scale:,g} times larger" in limits) == (bundle.residual_scale != 1)
    assert ("float16" in limits) == (bundle.residual_scale != 1)
    assert ("with antialiasing" in limits) == bundle.positions.antialias
    rule = bundle.positions
    assert ("timm's way" in limits) == (not rule.antialias or rule.offset > 0 or rule.keep_equal_count)


def test_what_was_not_measured_is_not_claimed(bundle, card):
    origin, found = bundle.provenance, sections(card)
    assert ("**Measured:** not measured" in card) == (not origin.metrics)
    assert found["Results"].startswith("Not measured.") == (not origin.metrics)
    assert found["Artifacts"].startswith("Not measured.") == (origin.artifacts is None)
    assert "vitreg_hub: not measured." in found["Results"]  # the doors
    untrained = origin.conversion and origin.conversion.untrained_registers
    assert ("they can cost accuracy until they are trained; how much was not measured" in card) == bool(untrained)
    recorded = [x for x in (origin.command, origin.commit, origin.created, origin.hardware, origin.versions) if x]
    recorded += [] if origin.seconds is None else [origin.seconds]
    assert found["Environment"].count("not recorded") == 6 - len(recorded)
    for text in (origin.command, origin.commit, origin.created, origin.hardware):
        assert text is None or text in found["Environment"]


OUTPUTS = {
    "hf_clip_vision": ("embeddings", 24),
    "openclip_full_plain": ("embeddings", 16),
    "openclip_timm_tower": ("embeddings", 20),
    "openclip_vision_gelu": ("embeddings", 24),
    "ttr_clip": ("embeddings", 20),
    "deit3_ls_head10": ("logits", 10),
    "deit_distilled": ("logits", 12),
    "dinov2_reg4": ("features", 32),
}
"""What the official implementation of a recorded checkpoint gives of an image, and its width."""


def require_output(card: str, name: str, width: int) -> None:
    found = sections(card)
    limits = found["Intended use and limits"]
    assert re.findall(r"(\w+) = model\(images\)  # (.*)", found["Usage"]) == [(name, f"[1, {width}]")]
    classifies = name == "logits"
    tag = "image-classification" if classifies else "image-feature-extraction"
    assert ModelCard(card).data.pipeline_tag == tag
    assert (f"Classifies images into {width} classes" in limits) == classifies
    assert ("no classification head" in limits) == (not classifies)
    embeds = name == "embeddings"
    assert (f"embeddings of width {width}" in limits) == embeds
    assert (f"onto embeddings of width {width}." in card.partition("## Usage")[0]) == embeds


@pytest.mark.parametrize("case", OUTPUTS)
def test_output_of_converted_models_is_what_their_source_gives(case):
    require_output(render(golden(case)), *OUTPUTS[case])


def test_output_of_other_models():
    clip = random_bundle("vit_base_reg8_clip", **ONE_OF_EACH_KIND["vit_base_reg8_clip"])
    require_output(render(clip), "logits", 10)  # it has names of classes
    nameless = replace(clip, label_names=None)
    require_output(render(nameless), "embeddings", 10)
    told = trained(TINY["supervised"]).provenance
    require_output(render(replace(nameless, provenance=told)), "logits", 10)
    require_output(render(replace(random_bundle(), label_names=None)), "logits", 10)
    require_output(render(random_bundle(num_classes=0)), "features", 128)
    for task in METRICS:
        require_output(render(trained(TINY[task])), *(("logits", 10) if task == "supervised" else ("features", 128)))


@pytest.mark.parametrize("task", METRICS)
def test_scores_of_every_task_are_told_in_words_and_to_the_hub(task):
    bundle = trained(TINY[task], metrics=METRICS[task], **MADE)
    card = render(bundle, repo=REPO)
    index = yaml.safe_load(card.split("---\n")[1])["model-index"]
    assert [model["name"] for model in index] == ["some-model"]
    kinds = {
        "knn_accuracy": ("image-classification", "accuracy", "k-NN accuracy"),
        "accuracy": ("image-classification", "accuracy", "top-1 accuracy"),
        "zero_shot_accuracy": ("zero-shot-image-classification", "accuracy", "zero-shot accuracy"),
        "patch_cosine": ("image-feature-extraction", "cosine_similarity", "patch cosine to the teacher"),
    }
    results = {result.metric_name: result for result in ModelCard(card).data.eval_results}
    assert len(results) == len(METRICS[task])
    for name, value in METRICS[task].items():
        kind, metric, words = kinds[name]
        result = results[words]
        assert (result.task_type, result.metric_type, result.metric_value) == (kind, metric, value)
        assert (result.dataset_type, result.dataset_split) == (TINY[task].data.train, "test")
        assert (result.source_name, result.source_url) == ("vitreg_hub", f"https://huggingface.co/{REPO}")
        watch = TINY[task].watch
        how = {"max_images": watch.eval_images}
        if name == "knn_accuracy":
            how |= {"max_neighbors": watch.knn_neighbors, "temperature": watch.knn_temperature}
            how |= {"max_reference_images": watch.eval_images}
        assert result.metric_args == how
        assert f"| {words} | {value:.4f} |" in card
    assert f"the held-out part of {TINY[task].data.train}, at most {watch.eval_images} images; k-NN among" in card
    assert f"k-NN among at most {watch.eval_images} training images, with up to {watch.knn_neighbors} neighbors" in card


@pytest.mark.parametrize("task", METRICS)
def test_a_run_that_tells_its_objective_has_the_card_of_an_older_one(task):
    older = trained(TINY[task], metrics=METRICS[task])
    assert older.provenance.run.objective is None
    assert render(made_otherwise(older, objective=TINY[task].task.objective)) == render(older)


def test_an_objective_is_told_in_its_own_words():
    objective = Objective(
        words="sorting",
        score=Score(name="sorted", words="share sorted", task="object-sorting", metric="share"),
        text_tower=True,
    )
    bundle = made_otherwise(trained(TINY["distill"], metrics={"sorted": 0.5}), objective=objective)
    card = render(best_of_its_run(bundle, "sorted"), repo=REPO)
    assert "- Objective: sorting, from the teacher" in card
    assert "| share sorted | 0.5000 |" in card
    assert "the best of the run's evaluations by share sorted" in card
    assert "### open_clip" in card
    (result,) = ModelCard(card).data.eval_results
    assert (result.task_type, result.metric_type, result.metric_name) == ("object-sorting", "share", "share sorted")


@pytest.mark.parametrize("kind", KINDS)
def test_card_is_the_same_from_memory_and_from_the_disk(kind, tmp_path):
    bundle = KINDS[kind]()
    folder = bundle.save(tmp_path / "model")
    assert render(ModelBundle.load(folder), repo=REPO) == render(bundle, repo=REPO)


def test_training_section_says_what_was_done():
    recipe = TINY["dinov2"]
    recipe = replace(
        recipe,
        batch_size=2048,
        seed=3,
        data=replace(recipe.data, test="org/held-out:test"),
        model=replace(recipe.model, start="vit_nano_reg4.digits", trainable="registers+norms"),
        optim=replace(recipe.optim, opt="adamw", lr=4e-3, lr_batch=1024, weight_decay=0.04, weight_decay_end=0.2),
    )
    found = sections(render(trained(recipe, metrics={"knn_accuracy": 0.5}), files=EXTRA_FILES))
    assert found["Training"].splitlines() == [
        "- Recipe `tiny_dinov2`: 9 steps of 2,048 images, seed 3.",
        "- Data: digits (scikit-learn's load_digits: Optical Recognition of Handwritten Digits, UCI Machine Learning "
        "Repository).",
        "- Started from vit_nano_reg4.digits; trained: registers and norms.",
        "- Optimiser: adamw, peak learning rate 0.004 for 1,024 images, scaled by the square root of the batch size; "
        "weight decay 0.04 to 0.2.",
        "- Objective: self-distillation as in DINOv2.",
        "- Images were augmented by DINOv2's multi-crop.",
        "- Every setting: [recipe.yaml](recipe.yaml).",
        "- Every measurement on the way: [metrics.jsonl](metrics.jsonl).",
        "",
        "![Curves of the run](curves.png)",
    ]
    assert "Measured on org/held-out:test, at most 32 images" in found["Results"]


def test_files_that_are_not_there_are_not_shown():
    bundle = analysed(trained(TINY["supervised"]))
    card = render(bundle)
    assert not any(name in card for name in EXTRA_FILES)
    shown = render(bundle, files=EXTRA_FILES)
    assert re.findall(r"!\[[^]]+\]\((.*)\)", shown) == ["curves.png", "artifacts.png"]
    assert set(re.findall(r"\]\(([\w.]+)\)", shown)) == set(EXTRA_FILES)


def test_unfinished_run_says_so():
    section = sections(render(trained(TINY["supervised"], step=4)))["Training"]
    assert "**4 of 9 steps, not finished**" in section
    assert "Started" not in section
    assert "scaled" not in section


@pytest.mark.parametrize("score", ["accuracy", "knn_accuracy"])
def test_best_of_a_run_says_so_and_by_which_score(score):
    words = {"accuracy": "top-1 accuracy", "knn_accuracy": "k-NN accuracy"}[score]
    card = render(best_of_its_run(trained(TINY["supervised"], metrics={score: 0.5}, step=4), score))
    found = sections(card)
    assert f"the best of the run's evaluations by {words}, after 4 of 9 steps of 8 images" in found["Training"]
    assert "not finished" not in card
    assert f"evaluations by {words}, chosen on the same images that it was measured on" in found["Results"]
    assert "optimistic" in found["Results"]
    assert "optimistic" not in render(trained(TINY["supervised"], metrics={score: 0.5}))


@pytest.mark.parametrize("revision", ["best", "runs/a"])
def test_card_of_a_branch_loads_that_branch(revision):
    bundle = best_of_its_run(trained(TINY["supervised"], metrics={"accuracy": 0.5}, step=4))
    card = render(bundle, repo=REPO, revision=revision)
    usage = sections(card)["Usage"]
    assert re.findall(r'create_model\("(.*?)"', usage) == [f"hf-hub:{REPO}@{revision}"]
    assert re.findall(r"from_pretrained\((.*?)\)", usage) == [f'"{REPO}", revision="{revision}"'] * 6
    (result,) = ModelCard(card).data.eval_results
    assert result.source_url == f"https://huggingface.co/{REPO}/tree/{revision}"
    assert render(bundle, repo=REPO, revision="main") == render(bundle, repo=REPO) != card


def test_teacher_is_told_by_its_name():
    for teacher, name in (("/home/me/teacher", "teacher"), ("../me/t", "t"), ("hf-hub:org/name", "hf-hub:org/name")):
        recipe = replace(TINY["distill"], task=replace(TINY["distill"].task, teacher=teacher))
        found = sections(render(trained(recipe)))["Training"]
        assert f"- Objective: distillation of tokens, from the teacher {name}.\n" in found
        assert "me/" not in found


def test_contrastive_card_names_the_towers():
    usage = sections(render(trained(TINY["contrastive"]), repo=REPO))["Usage"]
    assert "zero-shot classification" in usage
    assert f"`{REPO}-open_clip`." in usage
    on_branch = sections(render(trained(TINY["contrastive"]), repo=REPO, revision="best"))["Usage"]
    assert f"`{REPO}-open_clip` (branch `best`)." in on_branch
    others = [task for task in METRICS if task != "contrastive"]
    assert not any("open_clip" in render(trained(TINY[task]), repo=REPO) for task in others)


def test_towers_are_named_where_they_are():
    kept = {"text tower; kept beside the bundle, in open_clip's own form": ("a",)}
    converted = made_otherwise(KINDS["embeddings"](), dropped=kept)
    for bundle in (converted, trained(TINY["contrastive"]), random_bundle()):
        assert f"`{REPO}-open_clip`" in render(bundle, repo=REPO, towers=True)
        assert "-open_clip`" not in render(bundle, repo=REPO, towers=False)
        assert ("-open_clip`" in render(bundle, repo=REPO)) == (
            bundle.provenance.conversion is not None or "Contrastive" in str(bundle)
        )


def test_what_was_on_in_training_is_told():
    task = replace(TINY["supervised"].task, loss="ce", smoothing=0.1, mixup=0.2, cutmix=1.0, ema=0.98)
    card = render(trained(replace(TINY["supervised"], task=task)))
    on = "label smoothing 0.1, mixup of alpha 0.2, cutmix of alpha 1, weights averaged with decay 0.98 per step"
    assert f"- Objective: classification, {on}.\n- Images were augmented by random resized crops.\n" in card
    task = replace(task, smoothing=0.0, mixup=0.0, cutmix=0.0, publish="raw")
    for other in (task, replace(task, ema=None, publish="averaged")):
        assert "- Objective: classification.\n" in render(trained(replace(TINY["supervised"], task=other)))


@pytest.mark.parametrize("task", ["supervised", "dinov2"])
def test_number_of_evaluated_images_is_the_one_that_was_recorded(task):
    bundle = trained(TINY[task], metrics=METRICS[task])
    card = render(made_otherwise(bundle, evaluated=1359), repo=REPO)
    assert "the held-out part of digits, 1,359 images; k-NN among at most 32 training images" in card
    for result in ModelCard(card).data.eval_results:
        assert result.metric_args["num_images"] == 1359
        assert "max_images" not in result.metric_args


TOLD = {
    "photos/val": ("photos/val", "custom", None),
    "../x/test": ("test", "custom", None),
    "/home/me/held-out": ("held-out", "custom", None),
    "shards/{000..009}.tar": ("shards/{000..009}.tar", "custom", None),
    "org/name:val": ("org/name", "org/name", "val"),
    "hf-hub:org/name:val": ("org/name", "org/name", "val"),
    "hf-hub:org/name": ("org/name", "org/name", None),
    "scenes": ("scenes", "scenes", "test"),
}
"""Name, identifier and split in a model-index of the images that a run was told to evaluate on."""


@pytest.mark.parametrize("test", TOLD)
def test_only_data_that_are_on_the_hub_get_its_identifiers(test):
    recipe = replace(TINY["supervised"], data=replace(TINY["supervised"].data, test=test))
    (result,) = ModelCard(render(trained(recipe, metrics={"accuracy": 0.5}))).data.eval_results
    assert (result.dataset_name, result.dataset_type, result.dataset_split) == TOLD[test]


def test_reports_keep_no_folders_of_another_machine():
    for told, kept in (("/home/me/photos", "photos"), ("data/photos", "data/photos"), ("org/name:val", "org/name:val")):
        found = report()
        found = replace(found, images=replace(found.images, name=told))
        assert summary(found).images == kept


def test_run_without_a_full_report_points_to_its_telemetry():
    tiny = TINY["supervised"]
    watched, unwatched = (trained(replace(tiny, watch=replace(tiny.watch, artifact_images=many))) for many in (8, 0))
    told = sections(render(watched, files=EXTRA_FILES))["Artifacts"]
    assert "Not measured" not in told
    assert "No full report was made; " in told
    assert "[metrics.jsonl](metrics.jsonl), drawn in [curves.png](curves.png)." in told
    assert "curves.png" not in sections(render(watched, files=["metrics.jsonl"]))["Artifacts"]
    for other in (render(watched), render(unwatched, files=EXTRA_FILES), render(random_bundle(), files=EXTRA_FILES)):
        assert sections(other)["Artifacts"].startswith("Not measured.")


def test_nameless_license_is_not_known():
    assert "is not known" in sections(render(licensed(random_bundle(), "other")))["Intended use and limits"]


def test_text_of_others_cannot_leave_its_line():
    evil = "a\n\n## Results\n\n- all is well"
    bundle = analysed(trained(TINY["distill"], **MADE | {"command": evil, "license": evil}))
    bundle = replace(random_bundle(), label_names=(evil,) * 10, provenance=bundle.provenance)
    bundle = telling(bundle, origin=evil, artifacts=replace(bundle.provenance.artifacts, verdict=evil))
    recipe = bundle.provenance.run.recipe
    recipe = recipe | {"name": evil, "task": recipe["task"] | {"teacher": evil}}
    card = render(made_otherwise(bundle, recipe=recipe))
    assert "all is well" in card
    assert card.count("\n## Results\n") == 1
    assert "\n- all is well" not in card.partition("---\n\n")[2]


def test_folders_of_a_machine_are_not_told():
    recipe = TINY["dinov2"]
    data = replace(recipe.data, train="/home/me/photos", test="/home/me/held-out")
    recipe = replace(recipe, data=data, model=replace(recipe.model, start="/home/me/runs/start", trainable="registers"))
    card = render(trained(recipe, metrics={"knn_accuracy": 0.5}, **MADE))
    assert "/home" not in card
    assert "Started from start; trained: registers." in card
    assert "Measured on held-out, at most 32 images" in card
    assert ModelCard(card).data.eval_results[0].dataset_name == "held-out"
    recipe = replace(recipe, data=replace(data, test=None, held_out=0.2))
    card = render(trained(recipe, metrics={"knn_accuracy": 0.5}, **MADE))
    assert "Measured on the held-out part of photos, at most 32 images" in card


def test_data_sets_and_base_models_are_named_where_the_hub_has_them():
    recipe = TINY["supervised"]
    assert ModelCard(render(trained(recipe))).data.datasets is None
    on_hub = replace(trained(recipe), provenance=Provenance(origin="x", dataset="org/photos:train"))
    assert ModelCard(render(on_hub)).data.datasets == ["org/photos"]
    folder = replace(on_hub, provenance=Provenance(origin="x", dataset="data/photos"))
    assert ModelCard(render(folder)).data.datasets is None
    for start in ("hf-hub:org/start", "hf-hub:org/start@main"):
        bundle = trained(replace(recipe, model=replace(recipe.model, start=start)))
        assert ModelCard(render(bundle)).data.base_model == "org/start"
    assert base_model(trained(replace(recipe, model=replace(recipe.model, start="vit_nano_reg4.digits")))) is None
    converted = made_otherwise(KINDS["converted"](), source="hf-hub:org/a.b-c@" + "0" * 40)
    assert base_model(converted) == "org/a.b-c"
    published = Provenance(origin="weights of hf-hub:timm/vit_small_patch14_reg4_dinov2.lvd142m")
    assert base_model(replace(random_bundle(), provenance=published)) == "timm/vit_small_patch14_reg4_dinov2.lvd142m"


def test_scores_of_other_data_are_not_told_as_scores_of_the_training_data():
    recipe = replace(TINY["supervised"], data=replace(TINY["supervised"].data, test="org/held-out:val"))
    (result,) = ModelCard(render(trained(recipe, metrics={"accuracy": 0.5}))).data.eval_results
    assert (result.dataset_type, result.dataset_split) == ("org/held-out", "val")


def test_conversion_section_is_the_report():
    bundle = convert(source("dinov2_teacher_checkpoint"), **ARGUMENTS["dinov2_teacher_checkpoint"])
    report = bundle.provenance.conversion
    section = sections(render(bundle))["Conversion"]
    for digest in report.sha256.values():
        assert digest in section
    assert f"`{report.format}`: {report.num_mapped} tensors mapped" in section
    assert len(report.dropped) == section.count("- Dropped: ") > 0
    assert sum(map(int, re.findall(r"Dropped: (\d+) tensor", section))) == sum(map(len, report.dropped.values()))


def test_parity_is_what_was_measured():
    bundle = KINDS["compared with the source"]()
    assert bundle.provenance.conversion.measured["reference"] in sections(render(bundle))["Results"]
    measured = {"tokens": 1.5e-6, "output": 0.25, "reference": "theirs on images of 8x8"}
    results = sections(render(made_otherwise(bundle, measured=measured)))["Results"]
    assert "difference of outputs: tokens 1.5e-06, output 0.25, to theirs on images of 8x8." in results
    unnamed = sections(render(made_otherwise(bundle, measured={"tokens": 0.5})))["Results"]
    assert "tokens 0.5, to a reference." in unnamed
    assert "source's implementation: not measured." in sections(render(KINDS["converted"]()))["Results"]
    doors = {"timm": 0.0, "transformers+vitreg_hub": 0.5}
    checked = sections(render(with_doors(bundle, doors)))["Results"]
    assert "Checked by `vitreg verify`" in checked
    assert checked.endswith("timm 0, transformers+vitreg_hub 0.5.")


def test_artifacts_are_those_of_the_report():
    bundle = analysed(random_bundle())
    found = bundle.provenance.artifacts
    section = sections(render(bundle))["Artifacts"]
    assert section.startswith(found.verdict)
    shares = re.search(r"block by block: (.*)\.$", section, re.MULTILINE)[1].split(", ")
    assert [float(share.removesuffix(" %")) / 100 for share in shares] == pytest.approx(
        found.outlier_fraction, rel=0.01
    )
    assert section.count("- Attention of ") == len(found.attention)


def test_licenses_that_restrict_are_limits():
    limits = {name: sections(render(licensed(random_bundle(), name)))["Intended use and limits"] for name in
              ("mit", "cc-by-nc-4.0", None)}  # fmt: skip
    assert "commercial use is excluded" in limits["cc-by-nc-4.0"]
    assert "is not known" in limits[None]
    assert "The license is mit." in limits["mit"]


def test_time_is_told_in_words():
    assert "- Time: 90.0 minutes." in render(trained(TINY["dinov2"], **MADE | {"seconds": 5400}))


def test_text_of_others_cannot_end_a_block():
    evil = "here\n<!-- /vitreg:summary -->\n<!-- vitreg:usage -->"
    card = render(replace(random_bundle(), provenance=Provenance(origin=evil)))
    assert card.count("<!-- vitreg:usage -->") == 1
    assert card.count("<!-- /vitreg:summary -->") == 1


EVIL = ("<script>alert(1)</script>", "<img src=x onerror=alert(1)>", "![x](http://host/x.png)", "a\x1b[2J`b`", "[a](b)")


def test_text_of_others_is_text():
    told = Provenance(origin=EVIL[0], dataset=EVIL[1], command="<svg onload=x>", hardware="</details>")
    card = render(replace(random_bundle(num_classes=5), label_names=EVIL, provenance=told))
    body = card.partition("\n---\n")[2]
    assert not re.search(r"<(?!!-- )[a-zA-Z/!?]", re.sub(r"<!-- /?vitreg:\w+ -->|<!-- {.*} -->", "", body))
    assert "![x]" not in body
    assert "[a](b)" not in body
    assert "\x1b" not in card


def test_card_of_a_real_run_tells_its_last_evaluation(tmp_path):
    train(TINY["distill"], tmp_path / "run")
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    last = lines(tmp_path / "run")[-1]
    told = {result.metric_name: result.metric_value for result in ModelCard(card).data.eval_results}
    assert told["patch cosine to the teacher"] == last["eval/patch_cosine"]
    assert told["k-NN accuracy"] == last["eval/knn_accuracy"]
    assert sections(card)["Training"].startswith(
        "- Recipe `tiny_distill`: 4 steps of 8 images, seed 0.\n- Data: digits ("
    )
    assert "![Curves of the run](curves.png)" in card
    assert (tmp_path / "run" / "model" / "curves.png").is_file()
