"""Protocols that read one feature of every image: the model's own head, k-NN, linear probes, logistic regression."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

import torch
from torch import Tensor

from vitreg_hub.evaluation.features import Features, Pool
from vitreg_hub.evaluation.knn import KS, TEMPERATURE, few_shot, knn_votes
from vitreg_hub.evaluation.linear import (
    LinearSettings,
    accuracies,
    all_logits,
    best_probe,
    new_heads,
    random_batches,
    train_heads,
)
from vitreg_hub.evaluation.logreg import STRENGTHS, fit_logistic, held_back
from vitreg_hub.evaluation.results import Score, Setting
from vitreg_hub.evaluation.scores import ClassScores, classification_scores

Scorer = Callable[[Features], tuple[ClassScores, tuple[Score, ...]]]
"""Scores test images with what was learned: the classification to quote, and further scores."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Learned:
    """A classifier that was made of training images.

    Attributes:
        score: Called on test images as they are, and once for each intervention.
        settings: On what they depend.
        table: Of the grid from which it was chosen.
    """

    score: Scorer
    settings: Mapping[str, Setting]
    table: Mapping[str, float] = field(default_factory=dict)


def class_score_rows(found: ClassScores) -> tuple[Score, ...]:
    """The numbers of a classification, top-1 first."""
    rows = [Score(name="top-1", value=found.top1.value, low=found.top1.low, high=found.top1.high)]
    if found.top5:
        rows.append(Score(name="top-5", value=found.top5.value, low=found.top5.low, high=found.top5.high))
    rows.append(Score(name="mean of the classes", value=found.mean_per_class))
    if found.calibration_error is not None:
        rows.append(Score(name="calibration error", value=found.calibration_error, higher_is_better=False))
    return tuple(rows)


def knn(
    train: Features,
    *,
    num_classes: int,
    ks: Sequence[int] = KS,
    k: int = 20,
    temperature: float = TEMPERATURE,
    shots: Sequence[float] = (),
    tries: int = 1,
    device: torch.device | str = "cpu",
) -> Learned:
    """k-NN on the class token, and beside it on what reads registers.

    Source: dinov3/eval/knn.py, dinov2/eval/knn.py.

    Args:
        train: Labelled features.
        num_classes: C.
        ks: Numbers of neighbours.
        k: The one that is quoted.
        temperature: Of the votes.
        shots: Also with so many training images of each class, or below 1 such a share of them.
        tries: Random choices for each of them; their mean is told.
        device: Where similarities are computed.
    """

    def votes(test: Features, pool: Pool, numbers: Sequence[int], rows: Tensor | slice = slice(None)):
        chosen = train[rows]
        return knn_votes(
            chosen.pooled(pool).to(device),
            chosen.labels.to(device),
            test.pooled(pool).to(device),
            num_classes=num_classes,
            ks=numbers,
            temperature=temperature,
        )

    quoted = min(k, len(train))
    largest = sorted({*ks, k})

    def score(test: Features) -> tuple[ClassScores, tuple[Score, ...]]:
        rows = []
        wanted: tuple[Pool, ...] = (train.default_pool, "registers", "class+registers")
        pools: list[Pool] = [pool for pool in wanted if pool in train.pools]
        by_pool = {pool: votes(test, pool, largest) for pool in pools}
        for pool, by_number in by_pool.items():
            for number, found in by_number.items():
                if (pool, number) != (train.default_pool, quoted):
                    rows.append(_top1(f"{pool}, {number} neighbours", found, test))
        for shot in shots:
            choices = [few_shot(train.labels, per_class=shot, seed=seed) for seed in range(tries)]
            found = [votes(test, train.default_pool, (k,), rows) for rows in choices]
            shares = [_top1("", next(iter(one.values())), test).value for one in found]
            amount = f"{shot:g}" if shot >= 1 else f"{100 * shot:g} %"
            rows.append(Score(name=f"{amount} images of each class, {k} neighbours", value=sum(shares) / tries))
        return classification_scores(by_pool[train.default_pool][quoted].cpu(), test.labels), tuple(rows)

    settings: dict[str, Setting] = {
        "feature": train.default_pool,
        "neighbours": quoted,
        "largest neighbours": min(largest[-1], len(train)),
        "temperature": temperature,
    }
    return Learned(score=score, settings=settings)


def _top1(name: str, scores: Tensor, test: Features) -> Score:
    top1 = classification_scores(scores.cpu(), test.labels).top1
    return Score(name=name, value=top1.value, low=top1.low, high=top1.high)


def linear(
    train: Features,
    *,
    num_classes: int,
    settings: LinearSettings | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Learned:
    """The best of a grid of linear probes, chosen on training images that were kept back.

    DINOv2 and DINOv3 choose it on the images that they score; the last score tells what that would give.

    Source: dinov2/eval/linear.py, dinov3/eval/linear.py.

    Args:
        train: Labelled features.
        num_classes: C.
        settings: The grid, and how it is trained.
        device: Where.
        progress: Show a progress bar.
    """
    settings = settings or LinearSettings()
    fits, kept_back = held_back(train.labels, seed=settings.seed)
    fitted, chosen_on = train[fits], train[kept_back]
    heads = new_heads(train, settings.grid(train), num_classes=num_classes, seed=settings.seed)
    steps = settings.steps_for(len(fitted))
    batches = random_batches(fitted, batch_size=settings.batch_size, steps=steps, seed=settings.seed)
    train_heads(heads, batches, steps=steps, settings=settings, device=device, progress=progress)
    table = accuracies(heads, chosen_on, device=device)
    best = best_probe(table)

    @torch.no_grad()
    def score(test: Features) -> tuple[ClassScores, tuple[Score, ...]]:
        logits = all_logits({best: heads[best]}, test, device=device)[best].cpu()
        found = accuracies(heads, test, device=device)
        pools = dict.fromkeys((probe.pool, probe.blocks) for probe in heads)
        rows = []
        for pool, blocks in pools:
            of_pool = {probe: share for probe, share in table.items() if (probe.pool, probe.blocks) == (pool, blocks)}
            probe = best_probe(of_pool)
            rows.append(Score(name=f"{pool}, {blocks} block{'s' * (blocks > 1)}", value=found[probe]))
        rows.append(Score(name="best of the grid on the test images", value=max(found.values())))
        return classification_scores(logits, test.labels), tuple(rows)

    told = asdict(settings) | {"steps": steps, "chosen on": "10 % of the training images"}
    return Learned(score=score, settings=told, table={str(probe): share for probe, share in table.items()})


def logreg(
    train: Features,
    *,
    num_classes: int,
    strengths: Sequence[float] = STRENGTHS,
    seed: int = 0,
    progress: bool = False,
) -> Learned:
    """Logistic regression on the class token, with C chosen on training images that were kept back.

    Source: dinov3/eval/log_regression.py; Darcet et al., table 1.

    Args:
        train: Labelled features.
        num_classes: Number of classes.
        strengths: Values of C.
        seed: Of what is kept back.
        progress: Show a progress bar.
    """
    fits, kept_back = held_back(train.labels, seed=seed)
    pool = train.default_pool
    features = train.pooled(pool)
    fit = fit_logistic(
        features[fits],
        train.labels[fits],
        features[kept_back],
        train.labels[kept_back],
        strengths=strengths,
        progress=progress,
    )

    def score(test: Features) -> tuple[ClassScores, tuple[Score, ...]]:
        probabilities = fit.probabilities(test.pooled(pool), num_classes=num_classes)
        return classification_scores(probabilities, test.labels), ()

    settings: dict[str, Setting] = {"feature": pool, "strengths": tuple(strengths), "chosen on": "10 % of training"}
    table = {f"C = {strength:.3g}": share for strength, share in fit.held_out_accuracy.items()}
    return Learned(score=score, settings=settings, table=table | {"chosen C": fit.strength})
