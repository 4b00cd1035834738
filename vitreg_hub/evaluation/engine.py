"""Protocols on models: what the data allow, each image once for all protocols that read the same of it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Unpack, cast

from torch import nn

from vitreg_hub.environment import command, hardware, now, versions
from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.dense.scoring import Example
from vitreg_hub.evaluation.dense_protocols import TARGETS, DenseSettings, dense_result, zero_shot_result
from vitreg_hub.evaluation.features import Features
from vitreg_hub.evaluation.interventions import INTERVENTIONS, Intervention, RegisterBank
from vitreg_hub.evaluation.knn import KS, TEMPERATURE
from vitreg_hub.evaluation.labels import class_names, match
from vitreg_hub.evaluation.linear import LinearSettings
from vitreg_hub.evaluation.opened import Opened, Options, class_list, data_facts, open_split, require_same_classes
from vitreg_hub.evaluation.probing import Learned, class_score_rows, knn, linear, logreg
from vitreg_hub.evaluation.results import PROTOCOLS, EvalReport, Protocol, ProtocolResult
from vitreg_hub.evaluation.scores import classification_scores
from vitreg_hub.images.source import Images, ImageSource
from vitreg_hub.names import ModelName

PROBING: tuple[Protocol, ...] = ("knn", "linear", "logreg")
"""Protocols that learn from one feature of every image."""
POOLED: tuple[Protocol, ...] = ("classify", *PROBING)
"""Protocols that read one feature of every image."""
DEFAULT_IMAGES, DEFAULT_PICTURES = "digits", "scenes"
"""What serves where no data are given: labelled images, and pictures with masks, depths and boxes."""


Work = Callable[[Sequence[Protocol]], dict[Protocol, ProtocolResult]]
"""Runs some protocols."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """How protocols are done, beyond their defaults.

    Attributes:
        interventions: Also score with the registers zeroed, replaced by their mean, and taken from other images.
        ks: Numbers of neighbours for k-NN.
        temperature: Of k-NN's votes.
        shots: k-NN also with so many training images of each class, or below 1 such a share of them.
        linear: Of linear probes.
        dense: Of protocols on masks, depths and boxes.
    """

    interventions: bool = True
    ks: tuple[int, ...] = KS
    temperature: float = TEMPERATURE
    shots: tuple[float, ...] = ()
    linear: LinearSettings = field(default_factory=LinearSettings)
    dense: DenseSettings = field(default_factory=DenseSettings)


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """A report, and what a page shows beside it.

    Attributes:
        report: All numbers.
        examples: By protocol, some pictures with the masks, depths or boxes that were told of them.
    """

    report: EvalReport
    examples: dict[Protocol, tuple[Example, ...]]


def evaluate(
    model: nn.Module | str | Path,
    protocols: Sequence[Protocol] | Protocol | None = None,
    *,
    train: Images | None = None,
    test: Images | None = None,
    settings: Settings | None = None,
    **options: Unpack[Options],
) -> EvalReport:
    """Score one model; arguments and errors as of `evaluate_with_examples`."""
    return evaluate_with_examples(model, protocols, train=train, test=test, settings=settings, **options).report


def evaluate_with_examples(
    model: nn.Module | str | Path,
    protocols: Sequence[Protocol] | Protocol | None = None,
    *,
    train: Images | None = None,
    test: Images | None = None,
    settings: Settings | None = None,
    **options: Unpack[Options],
) -> Evaluation:
    """Score one model, and keep some pictures with what was told of them.

    Args:
        model: Anything that `open_vit` opens.
        protocols: Some of `PROTOCOLS`; None for all that the data and the model allow.
        train: Images to learn from; by default the other part of the test images, where they have parts.
        test: Images to score; by default embedded ones: digits for classes, scenes for masks, depths and boxes.
        settings: How protocols are done.
        **options: See `Options`.

    Raises:
        VitregError: The model or the images cannot be used, or a protocol that was asked for needs what they lack.
    """
    wanted = (protocols,) if isinstance(protocols, str) else protocols
    if unknown := [name for name in wanted or () if name not in PROTOCOLS]:
        raise DataError(f"there is no protocol {unknown[0]!r}: choose from {', '.join(PROTOCOLS)}.")
    opened, settings = Opened.of(model, **options), settings or Settings()
    results: dict[Protocol, ProtocolResult] = {}
    notes: list[str] = []
    examples: dict[Protocol, tuple[Example, ...]] = {}

    def attempt(
        names: Sequence[Protocol], work: Callable[[Sequence[Protocol]], dict[Protocol, ProtocolResult]]
    ) -> None:
        """Run protocols; what was not asked for by name may be impossible, with a note that says why."""
        try:
            results.update(work(names))
        except DataError as error:
            if wanted is not None:
                raise
            notes.append(f"{', '.join(names)}: {error}")

    chosen: list[Protocol] = [name for name in PROTOCOLS if wanted is None or name in wanted]
    pooled: list[Protocol] = [name for name in chosen if name in POOLED]
    if pooled:
        study = _Pooled(opened, settings, train=train, test=DEFAULT_IMAGES if test is None else test)
        if wanted is None:  # each may be impossible for a reason of its own
            attempt(POOLED[:1], study.results)
            attempt(PROBING, study.results)
        else:
            attempt(pooled, study.results)
    pictures = DEFAULT_PICTURES if test is None else test
    if "zero-shot" in chosen:
        attempt(("zero-shot",), lambda names: {names[0]: zero_shot_result(opened, model, test=pictures)})
    dense: list[Protocol] = [name for name in chosen if name in TARGETS]
    for name in dense:

        def score(names: Sequence[Protocol]) -> dict[Protocol, ProtocolResult]:
            result, examples[names[0]] = dense_result(
                opened,
                names[0],
                train=train,
                test=pictures,
                settings=settings.dense,
                interventions=settings.interventions,
            )
            return {names[0]: result}

        attempt((name,), score)
    if not results:
        raise DataError(f"{opened.vit.name}: no protocol can be run: {' '.join(notes)}")
    if opened.vit.untrained:
        notes.insert(0, "the weights are random: these are the scores of chance, or what structure alone gives")
    report = EvalReport(
        model=opened.facts,
        results=tuple(results[name] for name in PROTOCOLS if name in results),
        notes=tuple(notes),
        versions=versions("torch", "timm", "transformers", "vitreg_hub"),
        command=command(),
        date=now(),
        device=hardware(opened.device, num_processes=opened.processes.num_processes),
    )
    return Evaluation(report=report, examples=examples)


def evaluate_all(
    models: Sequence[nn.Module | str | Path],
    protocols: Sequence[Protocol] | Protocol | None = None,
    *,
    train: Images | None = None,
    test: Images | None = None,
    settings: Settings | None = None,
    **options: Unpack[Options],
) -> tuple[Evaluation, ...]:
    """Score several models on the same images; arguments and errors as of `evaluate_with_examples`."""
    for model in models:  # complete before any work, to show mistakes at once
        if isinstance(model, str | Path):
            ModelName.parse(model).require_known()
    return tuple(
        evaluate_with_examples(model, protocols, train=train, test=test, settings=settings, **options)
        for model in models
    )


class _Pooled:
    """Protocols on one feature of every image: the features of each source are taken once."""

    def __init__(self, opened: Opened, settings: Settings, *, train: Images | None, test: Images) -> None:
        self.opened, self.settings = opened, settings
        most, seed = opened.options.get("max_images"), opened.seed
        self.test = cast(ImageSource, open_split(test, "test", max_images=most, seed=seed))  # None is not for tests
        self.train = open_split(
            test if train is None else train, "train", max_images=most, seed=seed, shared=train is None
        )
        self._taken: dict[tuple[str, Intervention | None], Features] = {}

    def results(self, names: Sequence[Protocol]) -> dict[Protocol, ProtocolResult]:
        """Run some of the protocols."""
        if not self.test.has_labels:
            raise DataError(f"{self.test.name} has no labels: give images in folders by class, or with a label column.")
        learned: dict[Protocol, Learned] = {
            name: self._classifier() if name == "classify" else self._learned(name) for name in names
        }
        kinds: tuple[Intervention | None, ...] = (None,)
        if self.settings.interventions and self.opened.layout.num_registers:
            kinds += INTERVENTIONS
        return {name: self._result(name, one, kinds) for name, one in learned.items()}

    def _features(self, source: ImageSource, what: str, kind: Intervention | None = None) -> Features:
        if (what, kind) not in self._taken:
            bank = self._bank if kind else None
            title = f"{what} images" + (f", registers {kind}" if kind else "")
            taken = self.opened.features(
                source, title, logits=what == "test" and self.opened.classifies, intervention=kind, bank=bank
            )
            self._taken[what, kind] = taken.labelled
        return self._taken[what, kind]

    @cached_property
    def _bank(self) -> RegisterBank:
        return self.opened.bank(self.train or self.test)

    def _training(self, name: Protocol) -> tuple[ImageSource, Features]:
        if self.train is None:
            raise DataError(f"{name} needs images to learn from: give --train (train=), beside {self.test.name}.")
        if not self.train.has_labels:
            raise DataError(f"{self.train.name} has no labels, from which {name} learns: give labelled images.")
        require_same_classes(self.train, self.test)
        return self.train, self._features(self.train, "training")

    def _num_classes(self) -> int:
        found = [self._features(self.test, "test").labels]
        found += [self._features(self.train, "training").labels] if self.train else []
        return max(len(self.test.label_names or ()), *(int(labels.max()) + 1 for labels in found))

    def _learned(self, name: Protocol) -> Learned:
        _, train = self._training(name)
        settings, number = self.settings, self._num_classes()
        if name == "knn":
            return knn(
                train,
                num_classes=number,
                ks=settings.ks,
                temperature=settings.temperature,
                shots=settings.shots,
                device=self.opened.device,
            )
        if name == "linear":
            return linear(
                train,
                num_classes=number,
                settings=settings.linear,
                device=self.opened.device,
                progress=self.opened.shows_progress,
            )
        return logreg(train, num_classes=number, seed=self.opened.seed, progress=self.opened.shows_progress)

    def _classifier(self) -> Learned:
        """The model's own head, whose classes are matched with those of the data."""
        if not self.opened.classifies:
            raise DataError(
                f"{self.opened.vit.name} has no head that tells classes: score it with {', '.join(PROBING)}."
            )
        found = self._features(self.test, "test")
        names = class_list(self.test, found)
        matched = match(class_names(self.opened.model), found.logits.shape[1], self.test.label_names, len(names))

        def score(test: Features):
            labels = matched.labels(test.labels)
            known = labels >= 0
            return classification_scores(test.logits[known].softmax(dim=1), labels[known], probabilities=True), ()

        return Learned(score=score, settings={"classes": matched.how})

    def _result(self, name: Protocol, learned: Learned, kinds: Sequence[Intervention | None]) -> ProtocolResult:
        rows, first = {}, None
        for kind in kinds:
            test = self._features(self.test, "test", kind)
            scored, more = learned.score(test)
            rows[kind] = (*class_score_rows(scored), *more)
            first = first or scored
        assert first is not None
        facts, learned_from = data_facts(self.test, self._features(self.test, "test")), None
        if name != "classify":
            source, features = self._training(name)
            learned_from = data_facts(source, features)
        elif told := class_names(self.opened.model):
            facts = replace(facts, classes=told)
        return ProtocolResult(
            protocol=name,
            train=learned_from,
            test=facts,
            settings=dict(learned.settings) | {"image size": self.opened.vit.size, "seed": self.opened.seed},
            scores=rows[None],
            interventions={kind: rows[kind] for kind in kinds if kind},
            per_class=first.per_class,
            confusion=first.confusion,
            table=dict(learned.table),
        )
