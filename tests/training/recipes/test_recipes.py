"""Named recipes against the published numbers, and recipes as files."""

import dataclasses
import json
from functools import partial

import pytest
import yaml

from vitreg_hub.arch import ARCHS, REGISTER_COUNTS
from vitreg_hub.errors import RecipeError
from vitreg_hub.training.recipes.files import (
    RECIPE_FILE,
    changed,
    public_settings,
    recipe_from_yaml,
    recipe_to_yaml,
    require_same_recipe,
    updated,
    with_kinds,
    write_recipe,
)
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.recipes.settings import MultiCrop, WatchSettings, require_start
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.dinov2.settings import DinoV2
from vitreg_hub.training.tasks.distill.settings import Distill
from vitreg_hub.training.tasks.supervised.settings import Supervised

# deit/README_revenge.md: image side, peak rate, drop path; 160 pixels of which the patches of 14 cover 154.
DEIT3 = {
    "small": (224, 4e-3, 0.05),
    "base": (192, 3e-3, 0.2),
    "large": (192, 3e-3, 0.45),
    "huge": (160 // 14 * 14, 3e-3, 0.6),
}
# The same file and the paper's tables: drop path of the second stage by side.
FINETUNE = {
    ("base", 224): 0.2,
    ("large", 224): 0.45,
    ("huge", 224): 0.55,
    ("small", 384): 0.0,
    ("base", 384): 0.15,
    ("large", 384): 0.4,
}
# dinov2/configs: three columns of one table.
DINOV2 = {
    "model.patch_size": (16, 14, 14),
    "model.drop_path": (0.3, 0.4, 0.4),
    "model.img_size": (224, 224, 224),
    "optim.lr": (4e-3, 2e-4, 2e-4),
    "optim.lr_batch": (1024, 1024, 1024),
    "optim.min_lr": (1e-6, 1e-6, 1e-6),
    "optim.warmup_epochs": (10, 80, 80),
    "optim.weight_decay": (0.04, 0.04, 0.04),
    "optim.weight_decay_end": (0.4, 0.2, 0.2),
    "optim.decay_rule": ("dinov2", "dinov2", "dinov2"),
    "optim.layer_decay": (0.9, 1.0, 1.0),
    "optim.patch_embed_lr": (0.2, 0.2, 0.2),
    "optim.betas": ((0.9, 0.999),) * 3,
    "optim.clip": (3.0, 3.0, 3.0),
    "optim.clip_per_module": (True, True, True),
    "task.momentum": ((0.992, 1.0), (0.994, 1.0), (0.994, 1.0)),
    "task.teacher_temperature": ((0.04, 0.07),) * 3,
    "task.teacher_temperature_epochs": (30, 30, 30),
    "task.student_temperature": (0.1, 0.1, 0.1),
    "task.centering": ("running_mean", "sinkhorn_knopp", "sinkhorn_knopp"),
    "task.dino_head.prototypes": (65536, 131072, 131072),
    "task.dino_head.bottleneck": (256, 384, 384),
    "task.dino_head.hidden": (2048, 2048, 2048),
    "task.dino_head.layers": (3, 3, 3),
    "task.koleo_weight": (0.1, 0.1, 0.1),
    "task.mask_probability": (0.5, 0.5, 0.5),
    "task.mask_ratio": ((0.1, 0.5),) * 3,
    "task.freeze_last_layer_epochs": (1, 1, 1),
    "augment.local_size": (96, 98, 98),
    "augment.num_local": (8, 8, 8),
    "augment.global_scale": ((0.32, 1.0),) * 3,
    "augment.local_scale": ((0.05, 0.32),) * 3,
    "augment.blur": ((0.0, 0.9, 0.5),) * 3,  # what takes effect of upstream's inverted probabilities
    "augment.solarize": (0.2, 0.2, 0.2),
    "epoch_steps": (1250, 1250, 1250),
    "epochs": (100, 500, 500),
}
DINOV2_NAMES = ("dinov2_vitl16_short", "dinov2_vitl14", "dinov2_vitg14")
EVERY = [(name, registers) for name in RECIPES if name != "finetune" for registers in REGISTER_COUNTS]


def setting(recipe, name):
    for part in name.split("."):
        recipe = getattr(recipe, part)
    return recipe


@pytest.mark.parametrize("size", DEIT3)
def test_deit3_as_published(size):
    recipe = RECIPES[f"deit3_{size}"]()
    task, optim, augment = recipe.task, recipe.optim, recipe.augment
    assert (recipe.model.img_size, optim.lr, recipe.model.drop_path) == DEIT3[size]
    assert (recipe.epochs, recipe.batch_size, optim.lr_batch) == (800, 2048, None)
    assert (optim.opt, optim.weight_decay, optim.warmup_epochs, optim.warmup_lr) == ("lamb", 0.05, 5, 1e-6)
    assert (optim.min_lr, optim.clip) == (1e-5, None)
    assert (task.loss, task.smoothing, task.mixup, task.cutmix, task.ema) == ("bce", 0, 0.8, 1.0, 0.99996)
    assert (task.mix_probability, task.switch_probability) == (1, 0.5)
    assert (augment.crop, augment.color_jitter, augment.repeats) == ("rrc", 0.3, 3)
    assert recipe.model.layer_scale == 1e-4  # deit/models_v2.py


def test_second_stages_are_those_of_the_table():
    assert {name for name in RECIPES if "_finetune_" in name} == {f"deit3_{s}_finetune_{side}" for s, side in FINETUNE}


@pytest.mark.parametrize(("size", "side"), FINETUNE)
def test_deit3_second_stage_as_published(size, side):
    recipe = RECIPES[f"deit3_{size}_finetune_{side}"]()
    task, optim, augment = recipe.task, recipe.optim, recipe.augment
    assert (recipe.model.img_size, recipe.model.drop_path) == (side, FINETUNE[size, side])
    assert (recipe.epochs, recipe.batch_size) == (20, 512)
    assert (optim.opt, optim.lr, optim.weight_decay) == ("adamw", 1e-5, 0.1)
    assert (task.loss, task.smoothing, task.mixup, task.cutmix) == ("ce", 0.1, 0.8, 1.0)
    assert (augment.rand_augment, augment.repeats, augment.erasing) == ("rand-m9-mstd0.5-inc1", 1, 0)
    with pytest.raises(RecipeError, match=r"give model\.start, a bundle's folder"):
        require_start(recipe)
    require_start(dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, start="run/model")))


@pytest.mark.parametrize("name", [name for name in RECIPES if "finetune" not in name and name != "distill"])
def test_first_stages_need_no_start(name):
    require_start(RECIPES[name]())


@pytest.mark.parametrize("column", range(3), ids=DINOV2_NAMES)
@pytest.mark.parametrize("name", DINOV2)
def test_dinov2_as_published(name, column):
    assert setting(RECIPES[DINOV2_NAMES[column]](), name) == DINOV2[name][column]


def test_dinov2_heads_batches_and_networks():
    short, large, giant = (RECIPES[name]() for name in DINOV2_NAMES)
    assert (short.batch_size, large.batch_size) == (32 * 64, 96 * 32)
    assert short.task.ibot_head is None
    for recipe in (large, giant):
        head = recipe.task.ibot_head
        assert (head.prototypes, head.bottleneck, head.hidden, head.layers) == (131072, 256, 2048, 3)
        assert recipe.task.sinkhorn_iterations == 3
    assert not ARCHS[large.model.arch].swiglu
    assert ARCHS[giant.model.arch].swiglu
    for recipe in (short, large, giant):
        assert recipe.model.img_size % recipe.model.patch_size == 0
        assert recipe.augment.local_size % recipe.model.patch_size == 0


@pytest.mark.parametrize(("name", "rate"), [("dinov2_vitl16_short", "5.66e-03"), ("dinov2_vitl14", "3.46e-04")])
def test_square_root_rule(name, rate):
    from vitreg_hub.training.optim.optimizer import peak_lr

    recipe = RECIPES[name]()
    assert f"{peak_lr(recipe.optim, recipe.batch_size):.2e}" == rate


def test_openclip_as_published():
    recipe = RECIPES["openclip_base"]()
    optim, task = recipe.optim, recipe.task
    assert (optim.opt, optim.lr, optim.betas, optim.eps, optim.weight_decay) == ("adamw", 5e-4, (0.9, 0.98), 1e-6, 0.2)
    assert (recipe.batch_size, recipe.epochs, optim.min_lr, optim.decay_rule) == (33792, 32, 0.0, "openclip")
    steps = recipe.data.stream_images / recipe.batch_size
    assert round(optim.warmup_epochs * steps) == 2000
    assert (recipe.augment.scale, recipe.augment.hflip) == ((0.9, 1.0), 0)
    assert (task.text_width, task.text_heads, task.text_layers, task.context_length, task.embed_dim) == (
        *(512, 8, 12),
        *(77, 512),
    )
    assert task.logit_scale == pytest.approx(14.2857, abs=1e-4)


def test_distill_as_far_as_ph_reg_goes():
    recipe = RECIPES["distill"]()
    optim, task = recipe.optim, recipe.task
    assert (optim.opt, optim.lr, optim.min_lr, optim.weight_decay) == ("adamw", 1e-4, 5e-6, 1e-2)
    assert (optim.clip, optim.warmup_epochs, recipe.epochs, recipe.model.img_size) == (None, 0, 100, 518)
    assert (task.cosine_weight, task.mse_weight, recipe.scale.precision) == (1.0, 0.2, "bf16")
    assert recipe.model.start_required


def test_small_ones_are_on_embedded_data():
    kinds = {
        "supervised_digits": (Supervised, "digits"),
        "dinov2_digits": (DinoV2, "digits"),
        "contrastive_scenes": (Contrastive, "scenes"),
        "distill_digits": (Distill, "digits"),
    }
    for name, (kind, data) in kinds.items():
        recipe = RECIPES[name]()
        assert isinstance(recipe.task, kind)
        assert recipe.data.train == data
        assert ARCHS[recipe.model.arch].size == "nano"


@pytest.mark.parametrize(("name", "registers"), EVERY)
def test_every_recipe_with_every_number_of_registers(name, registers):
    recipe = RECIPES[name](registers=registers)
    arch = ARCHS[recipe.model.arch]
    assert recipe.name == name
    assert arch.num_registers == registers
    side = recipe.model.img_size or arch.img_size
    assert side % (recipe.model.patch_size or arch.patch_size) == 0
    if isinstance(recipe.augment, MultiCrop):
        assert recipe.augment.local_size % (recipe.model.patch_size or arch.patch_size) == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.batch_size = 1
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.optim.lr = 1


@pytest.mark.parametrize("name", RECIPES)
def test_file_gives_an_equal_recipe(name):
    recipe, other = RECIPES[name](registers=16), RECIPES[name](registers=0)
    assert recipe_from_yaml(recipe_to_yaml(recipe)) == recipe
    assert updated(other, recipe_to_yaml(recipe), called="mine.yaml") == recipe


def test_fine_tuning_takes_from_the_start_what_it_has():
    recipe = RECIPES["finetune"]()
    assert (recipe.model.arch, recipe.model.img_size, recipe.model.patch_size, recipe.task.ema) == (None,) * 4
    assert recipe.model.start_required
    assert 0 < recipe.optim.layer_decay < 1
    assert (recipe.augment.hflip, recipe.watch.eval_every) == (0.5, None)  # an epoch
    assert recipe.watch.patience
    assert recipe.data.held_out
    assert RECIPES["finetune"](registers=8).model.registers == 8


@pytest.mark.parametrize("name", RECIPES)
def test_four_registers_unless_told_otherwise(name):
    assert RECIPES[name]() == RECIPES[name](registers=None if name == "finetune" else 4)
    assert RECIPES[name].__doc__.partition("\n")[0].endswith(".")


@pytest.mark.parametrize("registers", [-1, 3, 32])
def test_number_of_registers_without_a_row(registers):
    with pytest.raises(RecipeError, match=rf"has {registers} registers: give one of 0, 1, 2, 4, 8, 16\.$"):
        RECIPES["deit3_base"](registers)


def test_file_keeps_types():
    recipe = RECIPES["dinov2_vitl16_short"]()
    back = recipe_from_yaml(recipe_to_yaml(recipe))
    assert type(back.optim.betas) is tuple
    assert type(back.watch.trackers) is tuple
    assert back.task.ibot_head is None
    assert back.scale.precision == "bf16"
    assert isinstance(back.optim.min_lr, float)
    plain = yaml.safe_load(recipe_to_yaml(recipe))
    assert plain["task"]["kind"] == "DinoV2"
    assert plain["augment"]["kind"] == "MultiCrop"


def test_file_of_an_older_version_lacks_what_has_a_default():
    recipe = RECIPES["supervised_digits"]()
    plain = yaml.safe_load(recipe_to_yaml(recipe))
    del plain["watch"], plain["optim"]["eps"]
    assert recipe_from_yaml(yaml.safe_dump(plain)) == dataclasses.replace(recipe, watch=WatchSettings())


def without(plain, part, key):
    return plain | {part: {k: v for k, v in plain[part].items() if k != key}}


NO_RECIPES = {
    "its task.kind must be one of Supervised, DinoV2, Contrastive, Distill": lambda p: without(p, "task", "kind"),
    "its augment.kind must be one of": lambda p: p | {"augment": {"kind": "Supervised"}},
    "add model.arch": lambda p: without(p, "model", "arch"),
    "add batch_size": lambda p: {key: value for key, value in p.items() if key != "batch_size"},
    "has no setting optim.momentum: `vitreg": lambda p: p | {"optim": p["optim"] | {"momentum": 1}},
    "batch_size is 0, give at least 1": lambda p: p | {"batch_size": 0},
}


@pytest.mark.parametrize("says", NO_RECIPES)
def test_file_that_is_no_whole_recipe(says):
    plain = yaml.safe_load(recipe_to_yaml(RECIPES["supervised_digits"]()))
    with pytest.raises(RecipeError) as caught:
        recipe_from_yaml(yaml.safe_dump(NO_RECIPES[says](plain)))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


DEEP_ALIASES = "a0: &a0 [1, 1]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 28))
NO_VALUES = {
    **dict.fromkeys(("seed: 2020-99-99", "!!int x", "seed: !!int x", "name: !!timestamp x", "watch: {keep: !!bool x}")),
    "seed: !!float ''": "this cannot be read as float",
    "seed: !!int ''": "this cannot be read as int",
    "seed: " + "9" * 5000: "this cannot be read as int",
    "seed: 0x" + "f" * 5000: "this cannot be read as int",
    "seed: !!python/name:os.system x": "is not YAML",
    "seed: !!binary x": "is not YAML",
    "seed: !!set {a}": "seed takes a whole number",
    "name: !!omap [a: 1]": "name takes a text",
    DEEP_ALIASES: "an alias stands for several values: write them out",
    "name: &a [*a]": "an alias stands for several values",
    "[" * 20_000: "lists or objects in each other without end",
    "{a: " * 9000: "lists or objects in each other without end",
    "name: " + "x" * 60_000: "has more than 50,000 letters",
    "k" * 900 + ": 1": "has no setting kkk",
    'name: "\\ud800"': "name is '\\ud800', give a text of UTF-8 without zero bytes",
    'name: "a\\0b"': "name is 'a\\x00b', give a text of UTF-8 without zero bytes",
    "name: \x07": "is not YAML",
}
"""YAML without values, or with more than anybody needs, and what is said of it."""


@pytest.mark.timeout(60)  # for ever, without a bound
@pytest.mark.parametrize("text", NO_VALUES, ids=lambda text: text[:30])
def test_yaml_that_gives_no_values(text):
    for read in (recipe_from_yaml, partial(updated, RECIPES["supervised_digits"](), called="mine.yaml")):
        with pytest.raises(RecipeError) as caught:
            read(text)
        assert "\n" not in str(caught.value)
        assert len(str(caught.value)) < 400
    assert (NO_VALUES[text] or "cannot be read as") in str(caught.value)


def test_an_alias_of_one_value_is_taken():
    recipe = updated(RECIPES["supervised_digits"](), "seed: &few 3\nwatch: {keep: *few}", called="mine.yaml")
    assert (recipe.seed, recipe.watch.keep) == (3, 3)


OUT_OF_RANGE = {
    "model.img_size": (0, -16, 10**9),
    "model.patch_size": (0, -1, 10**9),
    "model.drop_path": (1, -0.1),
    "model.layer_scale": (-1, 1e308),
    "data.num_workers": (-1, 100_000),
    "data.num_classes": (0, 10**12),
    "data.shuffle_block": (0, 10**12),
    "data.max_corrupt": (-1, 1),
    "augment.scale": ((1.0, 0.1), (0, 1), (0.5, 2)),
    "augment.ratio": ((2.0, 0.1), (0, 1)),
    "augment.hflip": (-1, 2),
    "augment.repeats": (0,),
    "optim.lr": (-1e-3, 1e300),
    "optim.betas": ((1, 1), (0.9, -1)),
    "optim.warmup_epochs": (-1, 1e300),
    "optim.layer_decay": (0, -1),
    "optim.clip": (0, -1),
    "scale.accumulate": (0, -1),
    "watch.log_every": (0,),
    "watch.eval_every": (-1,),
    "watch.save_every": (-1,),
    "watch.keep": (0, -1),
    "watch.eval_images": (-1,),
    "watch.knn_neighbors": (0, -1),
    "watch.knn_temperature": (0, -1),
    "watch.artifact_images": (-1, 10**9),
    "watch.cutoff": (-1,),
    "task.smoothing": (-0.1, 1),
    "task.mixup": (-1,),
    "task.mix_probability": (2,),
    "task.ema": (0, 1, 2),
    "batch_size": (0, -64, 10**12),
    "epochs": (0, -1, 1e300),
    "epoch_steps": (0, 10**30),
    "seed": (-1, 10**30),
}
NO_NUMBERS = (float("nan"), float("inf"), float("-inf"))


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_numbers_out_of_range(name):
    """In a file, on a command line and in Python alike."""
    recipe = RECIPES["supervised_digits"]()
    *parts, last = name.split(".")
    numbers = [*OUT_OF_RANGE[name], *(NO_NUMBERS if isinstance(setting(recipe, name), float) else ())]
    for value in numbers:
        said = []
        nested = {parts[0]: {last: value}} if parts else {last: value}
        plain = json.loads(json.dumps(nested))
        with pytest.raises(RecipeError) as caught:
            updated(recipe, yaml.safe_dump(plain), called="mine.yaml")
        said.append(str(caught.value))
        with pytest.raises(RecipeError) as caught:
            changed(recipe, {name: yaml.safe_dump(plain[parts[0]][last] if parts else value)}, called="recipe")
        said.append(str(caught.value))
        part = {parts[0]: dataclasses.replace(getattr(recipe, parts[0]), **{last: value})} if parts else {last: value}
        with pytest.raises(RecipeError) as caught:
            dataclasses.replace(recipe, **part)
        said.append(str(caught.value).replace(".0", ""))
        assert all(f"recipe supervised_digits: {name} is " in text and ", give " in text for text in said), said


@pytest.mark.parametrize("name", RECIPES)
def test_every_text_of_a_recipe_is_cleaned_and_nothing_else(name):
    recipe = RECIPES[name]()
    assert public_settings(recipe) == with_kinds(recipe)
    paths = {"model": {"start": "/secret/a"}, "data": {"train": "/secret/b", "test": "/secret/c"}}
    if isinstance(recipe.task, DinoV2):
        paths["task"] = {"heads": "/secret/d"}
    elif isinstance(recipe.task, Distill):
        paths["task"] = {"teacher": "/secret/e"}
    changed = {part: dataclasses.replace(getattr(recipe, part), **values) for part, values in paths.items()}
    shown = public_settings(dataclasses.replace(recipe, **changed))
    assert "secret" not in str(shown)
    for part, values in paths.items():
        for setting, path in values.items():
            assert shown[part][setting] == path[-1]


def test_a_list_of_one_needs_no_brackets_in_a_file():
    recipe = RECIPES["supervised_digits"]()
    assert updated(recipe, "watch: {trackers: wandb}", called="x").watch.trackers == ("wandb",)
    assert updated(recipe, "watch: {trackers: [wandb]}", called="x").watch.trackers == ("wandb",)


CONTRADICTIONS = {
    "model.trainable is 'last:0', give all, head, last:N": {"model": {"trainable": "last:0"}},
    "model.trainable is 'lor', give all": {"model": {"trainable": "lor"}},
    "model.lora_rank is 0": {"model": {"lora_rank": 0}},
    "model.arch is null, and there is no model.start": {"model": {"arch": None}},
    "model.arch vit_nano_reg4 has its number of registers": {"model": {"registers": 2}},
    "watch.patience is 3, but watch.eval_every is 0": {"watch": {"patience": 3, "eval_every": 0}},
    "watch.patience is -1": {"watch": {"patience": -1}},
    "data.held_out is 1.0": {"data": {"held_out": 1.0}},
}


@pytest.mark.parametrize("says", CONTRADICTIONS)
def test_settings_that_contradict_each_other_are_refused(says):
    recipe = RECIPES["supervised_digits"]()
    ((part, values),) = CONTRADICTIONS[says].items()
    with pytest.raises(RecipeError, match=f"^recipe supervised_digits: {says}"):
        dataclasses.replace(recipe, **{part: dataclasses.replace(getattr(recipe, part), **values)})


def test_run_goes_on_under_the_same_settings_only(tmp_path):
    recipe = RECIPES["supervised_digits"]()
    write_recipe(recipe, tmp_path)
    require_same_recipe(dataclasses.replace(recipe, epochs=recipe.epochs + 0.5), tmp_path)
    with pytest.raises(RecipeError, match=r"has epochs 24(?:\.0)?, not 23\.5: give the"):
        require_same_recipe(dataclasses.replace(recipe, epochs=recipe.epochs - 0.5), tmp_path)
    assert recipe_from_yaml((tmp_path / RECIPE_FILE).read_text()) == recipe
    harmless = dataclasses.replace(
        recipe,
        watch=dataclasses.replace(recipe.watch, log_every=1),
        scale=dataclasses.replace(recipe.scale, checkpointing=True),
        data=dataclasses.replace(recipe.data, num_workers=2),
    )
    require_same_recipe(harmless, tmp_path)
    other = dataclasses.replace(recipe, seed=1, optim=dataclasses.replace(recipe.optim, lr=1.0))
    with pytest.raises(RecipeError, match=r"has optim\.lr 0\.004, not 1\.0 and 1 more settings differ: give the"):
        require_same_recipe(other, tmp_path)
    with pytest.raises(RecipeError, match=r"has task\.kind Supervised, not Distill"):
        require_same_recipe(RECIPES["distill_digits"](), tmp_path)
    (tmp_path / RECIPE_FILE).unlink()
    with pytest.raises(RecipeError, match=r"cannot read .*recipe\.yaml: No such file"):
        require_same_recipe(recipe, tmp_path)
