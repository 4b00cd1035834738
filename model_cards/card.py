"""Model cards: what was measured or is written in the bundle, and nothing else."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vitreg_hub.bundle import ModelBundle

PLACEHOLDER = "your-name/{name}"
"""Repository in the card of a bundle that is not published yet; `push` puts the real one in its place."""

SCORES = {
    "accuracy": ("top-1 accuracy", "image-classification", "accuracy"),
    "knn_accuracy": ("k-NN accuracy", "image-classification", "accuracy"),
    "zero_shot_accuracy": ("zero-shot accuracy", "zero-shot-image-classification", "accuracy"),
    "patch_cosine": ("patch cosine to the teacher", "image-feature-extraction", "cosine_similarity"),
}
"""What a metric of a bundle is called in words, and the Hub's names of its task and kind."""

TEMPLATE = """\
---
{metadata}
---
# {name}

A Vision Transformer with {registers} ({arch}): {params:.1f} M parameters, patches of {patch} pixels, images of
{height} x {width} pixels.
Registers are learnable input tokens that give a ViT room for global information, so that it does not store it in
background patches; they are dropped at the output ([Darcet et al., ICLR 2024](https://arxiv.org/abs/2309.16588)).

- **Origin:** {origin}
- **Measured:** {measured}
- **License:** {license}
{training}{conversion}{artifacts}
## Use with timm

```python
import timm

model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Use with transformers

```python
from transformers import AutoImageProcessor, AutoModel

processor = AutoImageProcessor.from_pretrained("{repo}")
model = AutoModel.from_pretrained("{repo}").eval()
```

With `import vitreg_hub` before, `AutoModel` also gives `register_tokens`, `patch_tokens`, `attentions` and
`hidden_states`; the numbers are the same.

## Citation

```bibtex
@inproceedings{{darcet2024vision,
  title={{Vision Transformers Need Registers}},
  author={{Darcet, Timoth{{\\'e}}e and Oquab, Maxime and Mairal, Julien and Bojanowski, Piotr}},
  booktitle={{International Conference on Learning Representations}},
  year={{2024}}
}}
```
"""


def render(bundle: ModelBundle, *, repo: str | None = None) -> str:
    """Text of a bundle's README.md.

    Args:
        bundle: The model.
        repo: ``org/name`` under which it is published; a placeholder by default.
    """
    repo = repo or PLACEHOLDER.format(name=bundle.arch)
    origin, registers = bundle.provenance, bundle.model_args["reg_tokens"]
    _, height, width = bundle.preprocess.input_size
    return TEMPLATE.format(
        metadata=_metadata(bundle, repo).to_yaml(),
        name=repo.rpartition("/")[2],
        repo=repo,
        registers=f"{registers} register{'' if registers == 1 else 's'}",
        arch=bundle.arch,
        params=sum(tensor.numel() for tensor in bundle.state_dict.values()) / 1e6,
        patch=bundle.model_args["patch_size"],
        height=height,
        width=width,
        origin=origin.origin,
        measured=", ".join(f"{_spoken(name)} {value:.4f}" for name, value in _metrics(bundle)) or "not measured",
        license=origin.license or "unknown",
        training=_training(origin.settings, measured=bool(origin.metrics)),
        conversion=_conversion(origin.settings.get("conversion")),
        artifacts=_artifacts(origin.settings.get("artifacts")),
    )


def _metrics(bundle: ModelBundle) -> list[tuple[str, float]]:
    """Name and value, in an order that does not depend on whether the bundle was on a disk."""
    return sorted(bundle.provenance.metrics.items())


def _spoken(metric: str) -> str:
    return SCORES[metric][0] if metric in SCORES else metric


def _training(run: Mapping[str, Any], *, measured: bool) -> str:
    """The recipe of a training run as a section; empty for any other model."""
    if "total_steps" not in run:
        return ""
    model, data, optim, step, total = (run[key] for key in ("model", "data", "optim", "step", "total_steps"))
    steps = f"{total:,} steps" if step == total else f"**{step:,} of {total:,} steps, not finished**,"
    rate, decay = f"{optim['lr']:g}", f"{optim['weight_decay']:g}"
    if optim["lr_batch"]:
        rate += f" for {optim['lr_batch']:,} images, scaled by the square root of the batch size"
    if optim["weight_decay_end"] is not None:
        decay += f" to {optim['weight_decay_end']:g}"
    lines = ["", "## Training", ""]
    lines.append(f"- Recipe `{run['name']}`: {steps} of {run['batch_size']:,} images, seed {run['seed']}.")
    lines.append(f"- Data: {data['train']}.")
    if model["start"]:
        lines.append(f"- Started from {model['start']}; trained: {model['trainable'].replace('+', ' and ')}.")
    lines.append(f"- Optimiser: {optim['opt']}, peak learning rate {rate}; weight decay {decay}.")
    if measured:
        test, most = data["test"] or "the held-out part of the same data", run["watch"]["eval_images"]
        lines.append(f"- Measured on {test}, at most {most:,} images.")
    return "\n".join([*lines, ""])


def _conversion(report: Mapping[str, Any] | None) -> str:
    """The report of a conversion as a section; empty for a model that was trained."""
    if not report:
        return ""
    lines = ["", "## Conversion", ""]
    if number := report["untrained_registers"]:
        lines += [f"**{number} of the registers are new and untrained: accuracy is lower until they are trained.**", ""]
    files = ", ".join(f"`{name}` (sha256 `{digest}`)" for name, digest in report["sha256"].items())
    lines.append(f"- From {files}, read as format `{report['format']}`: {report['num_mapped']} tensors mapped.")
    for why, names in report["dropped"].items():
        lines.append(f"- Dropped: {len(names)} tensor{'s' * (len(names) > 1)} ({why}).")
    lines.append(f"- Read as: {', '.join(f'{name} {value}' for name, value in report['network'].items())}.")
    lines += [f"- {note[:1].upper()}{note[1:]}." for note in report["notes"]]
    measured = {name: value for name, value in report["measured"].items() if name != "reference"}
    differences = ", ".join(f"{name} {value:.2g}" for name, value in measured.items())
    to = f", to {report['measured']['reference']}" if measured else ""
    lines.append(f"- Largest absolute difference of outputs: {differences or 'not measured'}{to}.")
    return "\n".join([*lines, ""])


def _artifacts(found: Mapping[str, Any] | None) -> str:
    """What was measured of high-norm tokens as a section; empty where nothing was."""
    if not found:
        return ""
    height, width = found["image_size"]
    lines = ["", "## Artifacts", "", f"{found['verdict']}", ""]
    lines.append(f"- Measured on {found['num_images']:,} images of {height} x {width} pixels ({found['images']}).")
    shares = ", ".join(f"{100 * share:.3g} %" for share in found["outlier_fraction"])
    lines.append(f"- Outliers among the patch tokens, block by block: {shares}.")
    for mass in found["attention"]:
        to = f"{100 * mass['to_registers']:.3g} % on registers, {100 * mass['to_outliers']:.3g} % on outliers"
        lines.append(f"- Attention of {mass['source']} in block {found['block']}: {to}.")
    return "\n".join([*lines, *(f"- {note}" for note in found["notes"]), ""])


def _metadata(bundle: ModelBundle, repo: str) -> ModelCardData:
    origin = bundle.provenance
    task = "image-classification" if bundle.num_classes else "image-feature-extraction"
    measured_on = origin.settings.get("data", {}).get("test") or origin.dataset
    results = [
        EvalResult(
            task_type=SCORES[name][1],
            dataset_type=measured_on,
            dataset_name=measured_on,
            metric_type=SCORES[name][2],
            metric_name=SCORES[name][0],
            metric_value=value,
        )
        for name, value in _metrics(bundle)
        if measured_on and name in SCORES
    ]
    return ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        license=origin.license,
        tags=["timm", "transformers", "vision-transformer", "registers", "vitreg"],
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
