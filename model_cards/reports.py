"""The parts of a card that tell how a model came about and what was measured of it."""

from collections.abc import Mapping, Sequence
from typing import Any

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.environment import duration, without_folders
from vitreg_hub.files import ARTIFACTS_FIGURE, CURVES_FIGURE, METRICS_FILE, RECIPE_FILE
from vitreg_hub.model_cards import settings
from vitreg_hub.model_cards.facts import SOURCES, count, in_words, measured_on, scores
from vitreg_hub.model_cards.settings import one_line

NOT_MEASURED = "Not measured."

OBJECTIVES = {
    "Supervised": "classification",
    "DinoV2": "self-distillation as in DINOv2",
    "Contrastive": "matching images with captions as in CLIP",
    "Distill": "distillation of tokens",
}
AUGMENTS = {
    "CropAugment": "random resized crops",
    "ThreeAugment": "DeiT-III's 3-Augment",
    "MultiCrop": "DINOv2's multi-crop",
}
"""A recipe's kinds in words."""


def origin(bundle: ModelBundle, *, files: Sequence[str] = (), folder: str = "") -> str:
    """The recipe of a training run or the report of a conversion; empty for a model that is known to be neither.

    Args:
        bundle: The model.
        files: Names of the extra files beside it.
        folder: Where those are, as seen from the card; ends in a slash.
    """
    parts = [
        _training(settings.run(bundle), settings.best(bundle), files, folder),
        _conversion(settings.conversion(bundle)),
    ]
    return "\n\n".join(part for part in parts if part)


def _training(run: Mapping[str, Any], best: Mapping[str, Any], files: Sequence[str], folder: str) -> str:
    if not run:
        return ""
    model, data, optim, step, total = (run[key] for key in ("model", "data", "optim", "step", "total_steps"))
    if best:
        steps = (
            f"the best of the run's evaluations by {in_words(best['score'])}, after {best['step']:,} of {total:,} steps"
        )
    else:
        steps = f"{total:,} steps" if step == total else f"**{step:,} of {total:,} steps, not finished**,"
    rate, decay = f"{optim['lr']:g}", f"{optim['weight_decay']:g}"
    if optim["lr_batch"]:
        rate += f" for {optim['lr_batch']:,} images, scaled by the square root of the batch size"
    if optim["weight_decay_end"] is not None:
        decay += f" to {optim['weight_decay_end']:g}"
    lines = ["## Training", ""]
    lines.append(f"- Recipe `{run['name']}`: {steps} of {count(run['batch_size'], 'image')}, seed {run['seed']}.")
    source = f" ({SOURCES[data['train']]})" if data["train"] in SOURCES else ""
    lines.append(f"- Data: {without_folders(data['train'])}{source}.")
    if model["start"]:
        trained = model["trainable"].replace("+", " and ")
        lines.append(f"- Started from {without_folders(model['start'])}; trained: {trained}.")
    lines.append(f"- Optimiser: {optim['opt']}, peak learning rate {rate}; weight decay {decay}.")
    lines.append(f"- Objective: {_objective(run['task'])}.")
    lines.append(f"- Images were augmented by {AUGMENTS.get(kind := run['augment']['kind'], kind)}.")
    if RECIPE_FILE in files:
        lines.append(f"- Every setting: [{RECIPE_FILE}]({folder}{RECIPE_FILE}).")
    if METRICS_FILE in files:
        lines.append(f"- Every measurement on the way: [{METRICS_FILE}]({folder}{METRICS_FILE}).")
    if CURVES_FIGURE in files:
        lines += ["", f"![Curves of the run]({folder}{CURVES_FIGURE})"]
    return "\n".join(lines)


def _objective(task: Mapping[str, Any]) -> str:
    """What was trained for, with what was on of label smoothing, mixing of images and averaging of weights."""
    words, teacher = OBJECTIVES.get(task["kind"], task["kind"]), task.get("teacher")
    if isinstance(teacher, str):
        words += f", from the teacher {without_folders(one_line(teacher))}"
    extras = {
        "smoothing": "label smoothing {:g}",
        "mixup": "mixup of alpha {:g}",
        "cutmix": "cutmix of alpha {:g}",
        "ema": "weights averaged with decay {:g} per step",
    }
    on = {name: task[name] for name in extras if isinstance(task.get(name), int | float) and task[name]}
    return ", ".join([words, *(extras[name].format(value) for name, value in on.items())])


def _conversion(report: Mapping[str, Any]) -> str:
    if not report:
        return ""
    lines = ["## Conversion", ""]
    files = ", ".join(f"`{name}` (sha256 `{digest}`)" for name, digest in report["sha256"].items())
    lines.append(
        f"- From {files}, read as format `{report['format']}`: {count(report['num_mapped'], 'tensor')} mapped."
    )
    for why, names in report["dropped"].items():
        lines.append(f"- Dropped: {count(len(names), 'tensor')} ({why}).")
    if report["network"]:
        lines.append(f"- Read as: {', '.join(f'{name} {value}' for name, value in report['network'].items())}.")
    return "\n".join([*lines, *(f"- {note[:1].upper()}{note[1:]}." for note in report["notes"])])


def results(bundle: ModelBundle) -> str:
    """Scores and how they were measured, and what the same weights give elsewhere."""
    images, best = measured_on(bundle), settings.best(bundle)
    lines = ["## Results", ""]
    if found := scores(bundle):
        lines += ["| measure | value |", "|---|---|"]
        lines += [f"| {in_words(name)} | {value:.4f} |" for name, value in found]
        on = images.words if images else "images of which the bundle does not tell"
        evaluated = settings.number(bundle, "data", "evaluated")
        lines += ["", f"Measured on {on}{_how(found, settings.watch(bundle), evaluated=evaluated)}."]
        if best:
            lines += ["", _chosen(in_words(best["score"]))]
    else:
        lines.append(NOT_MEASURED)
    lines += ["", "### Parity", ""]
    if report := settings.conversion(bundle):
        lines.append(_reference(report["measured"]))
    return "\n".join([*lines, _doors(settings.doors(bundle))])


def _how(found: Sequence[tuple[str, float]], watch: Mapping[str, Any], *, evaluated: int) -> str:
    most = f", {count(evaluated, 'image')}" if evaluated else ""
    if not watch:
        return most
    most = most or f", at most {count(watch['eval_images'], 'image')}"
    if "knn_accuracy" not in dict(found):
        return most
    reference = f"at most {count(watch['eval_images'], 'training image')}"
    neighbors = f"up to {count(watch['knn_neighbors'], 'neighbor')}"
    return f"{most}; k-NN among {reference}, with {neighbors} and temperature {watch['knn_temperature']:g}"


def _chosen(score: str) -> str:
    return (
        f"These weights are the best of their run's evaluations by {score}, chosen on the same images that it was "
        "measured on: the value is optimistic."
    )


def _reference(found: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in found.items() if isinstance(value, int | float)}
    reference = found.get("reference")
    if not numbers:
        why = f" ({reference})" if isinstance(reference, str) else ""
        return f"- Largest absolute difference of outputs to the source's implementation: not measured{why}."
    differences = ", ".join(f"{name} {value:.2g}" for name, value in numbers.items())
    return f"- Largest absolute difference of outputs: {differences}, to {reference or 'a reference'}."


def _doors(found: Mapping[str, float]) -> str:
    if not found:
        return "- Difference of outputs between timm and transformers, each with and without vitreg_hub: not measured."
    differences = ", ".join(f"{door} {value:g}" for door, value in sorted(found.items()))
    return f"- Checked by `vitreg verify`, largest absolute difference of outputs to vitreg_hub's own: {differences}."


def artifacts(bundle: ModelBundle, *, files: Sequence[str] = (), folder: str = "") -> str:
    """What was measured of high-norm tokens; arguments as of `origin`."""
    found = settings.artifacts(bundle)
    if not found:
        told = NOT_MEASURED
        if METRICS_FILE in files and settings.number(bundle, "watch", "artifact_images"):
            drawn = f", drawn in [{CURVES_FIGURE}]({folder}{CURVES_FIGURE})" if CURVES_FIGURE in files else ""
            told = (
                "No full report was made; what each evaluation of the run found of outliers is in "
                f"[{METRICS_FILE}]({folder}{METRICS_FILE}){drawn}."
            )
        return f"## Artifacts\n\n{told} `vitreg analyze FOLDER --card` makes a full report."
    height, width = found["image_size"]
    lines = ["## Artifacts", "", f"{found['verdict']}", ""]
    lines.append(
        f"- Measured on {count(found['num_images'], 'image')} of {height} x {width} pixels ({found['images']})."
    )
    shares = ", ".join(f"{100 * share:.3g} %" for share in found["outlier_fraction"])
    lines.append(f"- Outliers among the patch tokens, block by block: {shares}.")
    for mass in found["attention"]:
        to = f"{100 * mass['to_registers']:.3g} % on registers, {100 * mass['to_outliers']:.3g} % on outliers"
        lines.append(f"- Attention of {mass['source']} in block {found['block']}: {to}.")
    lines += [f"- {note}" for note in found["notes"]]
    if ARTIFACTS_FIGURE in files:
        lines += ["", f"![Norms of the tokens after every block]({folder}{ARTIFACTS_FIGURE})"]
    return "\n".join(lines)


def environment(bundle: ModelBundle) -> str:
    """When, on what and by what the weights were made."""
    told = bundle.provenance
    lines = [
        ("Made", told.created),
        ("Command", told.command and f"`{told.command}`"),
        ("Commit of vitreg_hub", told.commit and f"`{told.commit}`"),
        ("Hardware", told.hardware),
        ("Time", None if told.seconds is None else duration(told.seconds)),
        ("Versions", ", ".join(f"{name} {version}" for name, version in sorted(told.versions.items()))),
    ]
    return "\n".join(
        ["## Environment", "", *(f"- {name}: {one_line(value or 'not recorded')}." for name, value in lines)]
    )
