"""The parts of a card about how a model was made and what was measured of it."""

from collections.abc import Mapping, Sequence

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Conversion, TrainingRun
from vitreg_hub.environment import duration, without_folders
from vitreg_hub.files import ARTIFACTS_FIGURE, CURVES_FIGURE, METRICS_FILE, RECIPE_FILE
from vitreg_hub.model_cards.facts import SOURCES, count, in_words, measured_on, objective_of, scores

NOT_MEASURED = "Not measured."

AUGMENTS = {
    "CropAugment": "random resized crops",
    "ThreeAugment": "DeiT-III's 3-Augment",
    "MultiCrop": "DINOv2's multi-crop",
}
"""How images were augmented, in words."""


def origin(bundle: ModelBundle, *, files: Sequence[str] = (), folder: str = "") -> str:
    """The recipe of a training run or the report of a conversion; empty for other models.

    Extra files are named, and are in a folder as seen from the card, which ends in a slash.
    """
    told = bundle.provenance
    if told.run:
        return _training(bundle, told.run, files, folder)
    return _conversion(told.conversion) if told.conversion else ""


def _training(bundle: ModelBundle, run: TrainingRun, files: Sequence[str], folder: str) -> str:
    told, step, total, best = run.facts, run.step, run.total_steps, bundle.provenance.best
    others = (told.name, told.task, told.opt, told.lr, told.weight_decay, told.seed, step, total)
    if told.train is None or told.augment is None or told.batch_size is None or None in others:
        return ""  # an older bundle tells less
    if best:
        score = in_words(bundle, best.score)
        steps = f"the best of the run's evaluations by {score}, after {best.step:,} of {total:,} steps"
    else:
        steps = f"{total:,} steps" if step == total else f"**{step:,} of {total:,} steps, not finished**,"
    rate, decay = f"{told.lr:g}", f"{told.weight_decay:g}"
    if told.lr_batch:
        rate += f" for {told.lr_batch:,} images, scaled by the square root of the batch size"
    if told.weight_decay_end is not None:
        decay += f" to {told.weight_decay_end:g}"
    lines = ["## Training", ""]
    lines.append(f"- Recipe `{told.name}`: {steps} of {count(told.batch_size, 'image')}, seed {told.seed}.")
    source = f" ({SOURCES[told.train]})" if told.train in SOURCES else ""
    lines.append(f"- Data: {without_folders(told.train)}{source}.")
    if told.start:
        lines.append(f"- Started from {without_folders(told.start)}; trained: {told.trainable.replace('+', ' and ')}.")
    lines.append(f"- Optimiser: {told.opt}, peak learning rate {rate}; weight decay {decay}.")
    lines.append(f"- Objective: {_objective(run)}.")
    lines.append(f"- Images were augmented by {AUGMENTS.get(told.augment, told.augment)}.")
    if RECIPE_FILE in files:
        lines.append(f"- Every setting: [{RECIPE_FILE}]({folder}{RECIPE_FILE}).")
    if METRICS_FILE in files:
        lines.append(f"- Every measurement on the way: [{METRICS_FILE}]({folder}{METRICS_FILE}).")
    if CURVES_FIGURE in files:
        lines += ["", f"![Curves of the run]({folder}{CURVES_FIGURE})"]
    return "\n".join(lines)


def _objective(run: TrainingRun) -> str:
    """The objective, with label smoothing, mixing of images and averaging of weights if they were on."""
    told, objective = run.facts, objective_of(run)
    words = objective.words if objective else str(told.task)
    if told.teacher:
        words += f", from the teacher {without_folders(told.teacher)}"
    extras = (
        ("label smoothing {:g}", told.smoothing),
        ("mixup of alpha {:g}", told.mixup),
        ("cutmix of alpha {:g}", told.cutmix),
        ("weights averaged with decay {:g} per step", told.ema if told.publish == "averaged" else None),
    )
    return ", ".join([words, *(text.format(value) for text, value in extras if value)])


def _conversion(report: Conversion) -> str:
    lines = ["## Conversion", ""]
    files = ", ".join(f"`{name}` (sha256 `{digest}`)" for name, digest in report.sha256.items())
    lines.append(f"- From {files}, read as format `{report.format}`: {count(report.num_mapped, 'tensor')} mapped.")
    for why, names in report.dropped.items():
        lines.append(f"- Dropped: {count(len(names), 'tensor')} ({why}).")
    if report.network:
        lines.append(f"- Read as: {', '.join(f'{name} {value}' for name, value in report.network.items())}.")
    return "\n".join([*lines, *(f"- {note[:1].upper()}{note[1:]}." for note in report.notes)])


def results(bundle: ModelBundle) -> str:
    """Scores and how they were measured, and what the same weights give elsewhere."""
    images, told = measured_on(bundle), bundle.provenance
    lines = ["## Results", ""]
    if found := scores(bundle):
        lines += ["| measure | value |", "|---|---|"]
        lines += [f"| {in_words(bundle, name)} | {value:.4f} |" for name, value in found]
        on = images.words if images else "images of which the bundle does not tell"
        lines += ["", f"Measured on {on}{_how(told.run, knn='knn_accuracy' in told.metrics) if told.run else ''}."]
        if told.best:
            chosen = f"the best of their run's evaluations by {in_words(bundle, told.best.score)}, chosen on the same"
            lines += ["", f"These weights are {chosen} images that it was measured on: the value is optimistic."]
    else:
        lines.append(NOT_MEASURED)
    lines += ["", "### Parity", ""]
    if told.conversion:
        lines.append(_reference(told.conversion))
    return "\n".join([*lines, _doors(told.doors or {})])


def _how(run: TrainingRun, *, knn: bool) -> str:
    told, most = run.facts, ""
    if run.evaluated:
        most = f", {count(run.evaluated, 'image')}"
    elif told.eval_images is not None:
        most = f", at most {count(told.eval_images, 'image')}"
    if not knn or told.eval_images is None or told.knn_neighbors is None or told.knn_temperature is None:
        return most
    reference = f"at most {count(told.eval_images, 'training image')}"
    neighbors = f"up to {count(told.knn_neighbors, 'neighbor')}"
    return f"{most}; k-NN among {reference}, with {neighbors} and temperature {told.knn_temperature:g}"


def _reference(report: Conversion) -> str:
    reference = report.measured.get("reference")
    if not report.differences:
        why = f" ({reference})" if reference else ""
        return f"- Largest absolute difference of outputs to the source's implementation: not measured{why}."
    differences = ", ".join(f"{name} {value:.2g}" for name, value in report.differences.items())
    return f"- Largest absolute difference of outputs: {differences}, to {reference or 'a reference'}."


def _doors(found: Mapping[str, float]) -> str:
    if not found:
        return "- Difference of outputs between timm and transformers, each with and without vitreg_hub: not measured."
    differences = ", ".join(f"{door} {value:g}" for door, value in sorted(found.items()))
    return f"- Checked by `vitreg verify`, largest absolute difference of outputs to vitreg_hub's own: {differences}."


def artifacts(bundle: ModelBundle, *, files: Sequence[str] = (), folder: str = "") -> str:
    """What was measured of high-norm tokens; arguments as of `origin`."""
    found, run = bundle.provenance.artifacts, bundle.provenance.run
    if not found:
        told = NOT_MEASURED
        if METRICS_FILE in files and run and run.facts.artifact_images:
            drawn = f", drawn in [{CURVES_FIGURE}]({folder}{CURVES_FIGURE})" if CURVES_FIGURE in files else ""
            told = (
                "No full report was made; what each evaluation of the run found of outliers is in "
                f"[{METRICS_FILE}]({folder}{METRICS_FILE}){drawn}."
            )
        return f"## Artifacts\n\n{told} `vitreg analyze FOLDER --card` makes a full report."
    height, width = found.image_size
    lines = ["## Artifacts", "", found.verdict, ""]
    lines.append(f"- Measured on {count(found.num_images, 'image')} of {height} x {width} pixels ({found.images}).")
    shares = ", ".join(f"{100 * share:.3g} %" for share in found.outlier_fraction)
    lines.append(f"- Outliers among the patch tokens, block by block: {shares}.")
    for mass in found.attention:
        to = f"{100 * mass.to_registers:.3g} % on registers, {100 * mass.to_outliers:.3g} % on outliers"
        lines.append(f"- Attention of {mass.source} in block {found.block}: {to}.")
    lines += [f"- {note}" for note in found.notes]
    if ARTIFACTS_FIGURE in files:
        lines += ["", f"![Norms of the tokens after every block]({folder}{ARTIFACTS_FIGURE})"]
    return "\n".join(lines)


def environment(bundle: ModelBundle) -> str:
    """When, how and on which hardware the weights were made."""
    told = bundle.provenance
    lines = [
        ("Made", told.created),
        ("Command", told.command and f"`{told.command}`"),
        ("Commit of vitreg_hub", told.commit and f"`{told.commit}`"),
        ("Hardware", told.hardware),
        ("Time", None if told.seconds is None else duration(told.seconds)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(told.versions.items()))),
    ]
    return "\n".join(["## Environment", "", *(f"- {name}: {value or 'not recorded'}." for name, value in lines)])
