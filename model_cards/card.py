"""Model cards: what was measured or is written in the bundle, and nothing else."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData

from vitreg_hub.bundle import ModelBundle

PLACEHOLDER = "your-name/{name}"
"""Repository in the card of a bundle that is not published yet; `push` puts the real one in its place."""

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
{conversion}{artifacts}
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
        measured=", ".join(f"{name} {value:.4f}" for name, value in origin.metrics.items()) or "not measured",
        license=origin.license or "unknown",
        conversion=_conversion(origin.settings.get("conversion")),
        artifacts=_artifacts(origin.settings.get("artifacts")),
    )


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
    results = []
    if origin.dataset and "accuracy" in origin.metrics:
        result = EvalResult(
            task_type=task,
            dataset_type=origin.dataset,
            dataset_name=origin.dataset,
            metric_type="accuracy",
            metric_value=origin.metrics["accuracy"],
        )
        results.append(result)
    return ModelCardData(
        library_name="timm",
        pipeline_tag=task,
        license=origin.license,
        tags=["timm", "transformers", "vision-transformer", "registers", "vitreg"],
        model_name=repo.rpartition("/")[2] if results else None,
        eval_results=results or None,
    )
