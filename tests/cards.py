"""Bundles of every kind, for tests of their cards."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache

from golden_cases import ARGUMENTS, bundle, convert, source
from models import ONE_OF_EACH_KIND, random_bundle
from reports import report
from training_runs import TINY

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import BestModel, Foreign, Provenance, TrainingRun
from vitreg_hub.model_cards.artifacts import summary
from vitreg_hub.training.recipes.files import with_kinds
from vitreg_hub.training.recipes.settings import Recipe
from vitreg_hub.training.tasks.supervised.settings import Supervised

MADE = {
    "command": "vitreg train tiny --out run",
    "commit": "0123456789abcdef0123456789abcdef01234567-dirty",
    "created": "2026-01-02T03:04:05+00:00",
    "hardware": "2 x Some GPU",
    "seconds": 5400.0,
    "versions": {"torch": "9.8.7", "python": "3.99"},
}
METRICS = {
    "supervised": {"accuracy": 0.5, "knn_accuracy": 0.75},
    "dinov2": {"knn_accuracy": 0.75},
    "contrastive": {"zero_shot_accuracy": 0.5, "knn_accuracy": 0.75},
    "distill": {"patch_cosine": 0.25, "knn_accuracy": 0.75},
}


def sections(card: str) -> dict[str, str]:
    """Text below each heading of the second level, without comments."""
    shown = re.sub(r"<!--.*?-->\n?", "", card)
    parts = re.split(r"^## (.*)\n", shown, flags=re.MULTILINE)[1:]
    return {title: text.strip() for title, text in zip(parts[::2], parts[1::2], strict=True)}


def trained(recipe: Recipe, *, metrics=None, step: int = 9, **provenance) -> ModelBundle:
    """A bundle as a run of a recipe of 9 steps leaves it, with random weights."""
    told = Provenance(
        origin="trained from scratch",
        dataset=recipe.data.train,
        metrics=metrics or {},
        made=TrainingRun(recipe=with_kinds(recipe), step=step, total_steps=9),
        **{"license": "mit"} | provenance,
    )
    num_classes = 10 if isinstance(recipe.task, Supervised) else 0
    return replace(random_bundle("vit_nano_reg2", num_classes=num_classes), provenance=told)


def telling(of: ModelBundle, **fields) -> ModelBundle:
    """A bundle with other fields of provenance."""
    return replace(of, provenance=replace(of.provenance, **fields))


def made_otherwise(of: ModelBundle, **fields) -> ModelBundle:
    """A bundle with other fields of what made it."""
    return telling(of, made=replace(of.provenance.made, **fields))


def best_of_its_run(of: ModelBundle, score: str = "accuracy") -> ModelBundle:
    """A bundle as a run leaves it in its folder of the best."""
    return telling(of, best=BestModel(score=score, step=of.provenance.run.step))


def analysed(of: ModelBundle, **how) -> ModelBundle:
    """A bundle that keeps an artifact report."""
    return telling(of, artifacts=summary(report(registers=of.model_args["reg_tokens"], **how)))


def licensed(of: ModelBundle, license: str | None) -> ModelBundle:
    return telling(of, license=license)


_KINDS: dict[str, Callable[[], ModelBundle]] = {
    **{arch: lambda arch=arch: random_bundle(arch, **ONE_OF_EACH_KIND[arch]) for arch in ONE_OF_EACH_KIND},
    **{task: lambda task=task: trained(TINY[task], metrics=METRICS[task], **MADE) for task in METRICS},
    "best of its run": lambda: best_of_its_run(trained(TINY["supervised"], metrics=METRICS["supervised"], step=4)),
    "unfinished": lambda: trained(TINY["dinov2"], step=4, **MADE),
    "bare provenance": lambda: replace(random_bundle(), provenance=Provenance(origin="somewhere")),
    "no head": lambda: random_bundle(num_classes=0),
    "analysed": lambda: analysed(random_bundle()),
    "analysed without outliers": lambda: analysed(random_bundle("vit_nano_reg0"), outliers=False),
    "converted": lambda: bundle("dinov2_reg4"),
    "embeddings": lambda: bundle("openclip_full_plain"),
    "another rule of positions": lambda: bundle("dinov2_vit_mlp_hub"),
    "scaled residual stream": lambda: bundle("hf_vit"),
    "untrained registers": lambda: convert(source("deit3_ls"), num_registers=4, **ARGUMENTS["deit3_ls"]),
    "compared with the source": lambda: convert(source("hf_dinov2_reg"), verify=True),
    "not commercial": lambda: licensed(random_bundle(), "cc-by-nc-4.0"),
    "a license of its own": lambda: licensed(random_bundle(), "some-license"),
    "one channel": lambda: random_bundle(in_chans=1),
    "strange settings": lambda: telling(
        random_bundle(), made=Foreign(settings={"model": "x", "data": [1], "watch": None, "total_steps": 3})
    ),
    "an older run": lambda: telling(random_bundle(), made=TrainingRun(recipe={"optim": {"lr": 1}}, total_steps=3)),
}
KINDS = {name: cache(make) for name, make in _KINDS.items()}
"""What makes a bundle of each kind, once."""
