"""What a model is and where it came from, without its weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm

from vitreg_hub.arch import get_arch
from vitreg_hub.bundle.config import BundleConfig, Preprocess, config_from_json, empty_model, read_config
from vitreg_hub.bundle.provenance import BestModel, Conversion, Foreign, Provenance, TrainingRun, Transformation
from vitreg_hub.bundle.rules import rule_problems
from vitreg_hub.environment import duration
from vitreg_hub.errors import BundleError
from vitreg_hub.licenses import UNKNOWN
from vitreg_hub.names import HUB_PREFIX, ModelName
from vitreg_hub.network.positions import PositionRule
from vitreg_hub.remote.download import download_config
from vitreg_hub.timm_models import eval_cfg

NOT_RECORDED = "not recorded"
SHOWN = 4
"""How many names of dropped tensors the table shows; JSON has all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """Facts about one model, JSON-safe; an architecture alone has no provenance."""

    name: str
    architecture: Mapping[str, Any]
    provenance: Provenance | None = None

    def __str__(self) -> str:
        """The table that the terminal shows."""
        rows = [("model", self.name), *_architecture_rows(self.architecture)]
        if self.provenance is None:
            rows.append(("weights", ", ".join(self.architecture["weights"]) or "none under this name"))
        else:
            rows += [("", ""), *_provenance_rows(self.provenance, registers=self.architecture["registers"])]
        width = max(len(key) for key, _ in rows) + 2
        return "\n".join(_printable(f"{key.ljust(width)}{text}").rstrip() for key, text in rows)


def describe(source: str | Path) -> ModelInfo:
    """Say what a model is. From a repository only its config.json is fetched.

    Args:
        source: An architecture with or without the tag of its weights, a bundle's folder, or
            ``hf-hub:org/name[@revision]``.

    Raises:
        BundleError: There is no bundle, or it breaks a rule of the form.
        HubError: No such repository, no permission, or no network.
        UnknownArchError: Neither a folder nor a known name.
    """
    name = ModelName.parse(source)
    called = name.given
    if name.repo_id:
        folder = download_config(called)
        return _of_bundle(folder, name=f"{HUB_PREFIX}{name.repo_id}@{folder.name}", called=called)
    if folder := name.path or (name.shipped if name.tag else None):
        return _of_bundle(folder, name=called, called=called)
    name.require_ours()
    spec, cfg = get_arch(name.arch), timm.get_pretrained_cfg(called) if name.tag else None
    images = dataclasses.asdict(cfg or eval_cfg(spec))
    origin = f"weights of {HUB_PREFIX}{cfg.hf_hub_id}" if cfg else "no weights"
    provenance = Provenance(origin=origin, license=cfg.license if cfg else None)
    config = BundleConfig(
        arch=spec.name,
        model_args=spec.model_args(),
        num_classes=cfg.num_classes if cfg else 0,
        preprocess=Preprocess.from_cfg(images),
        provenance=provenance,
    )
    return ModelInfo(name=called, architecture=_architecture(config), provenance=provenance if cfg else None)


def _of_bundle(folder: Path, *, name: str, called: str) -> ModelInfo:
    content = read_config(folder, called=called)
    if problems := list(rule_problems(content)):
        raise BundleError(f"{called} breaks the form of a bundle: " + "; ".join(problems))
    config = config_from_json(content)
    try:
        architecture = _architecture(config)
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise BundleError(f"timm cannot build the model of {called} ({type(error).__name__}: {reason}).") from error
    return ModelInfo(name=name, architecture=architecture, provenance=config.provenance)


def _architecture(config: BundleConfig) -> dict[str, Any]:
    """Facts about the network that a config.json describes, most of them counted in the network itself."""
    spec, args, model = config.spec, config.model_args, empty_model(config, weight_init="skip")
    block: Any = model.blocks[0]  # a module, whose parts have no types
    return {
        "architecture": spec.name,
        "family": spec.family,
        "size": spec.size,
        "upstream": spec.base,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "width": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
        "mlp": "SwiGLU" if spec.swiglu else "MLP",
        "mlp_hidden": block.mlp.fc1.out_features,
        "mlp_ratio": args["mlp_ratio"],
        "activation": config.activation,
        "layer_scale": args.get("init_values"),
        "norm_epsilon": config.norm_eps,
        "patch_size": config.patch_size,
        "image_size": list(model.patch_embed.img_size),
        "tokens": model.num_prefix_tokens + model.patch_embed.num_patches,
        "class_tokens": model.num_prefix_tokens - config.num_registers,
        "registers": config.num_registers,
        "patches": model.patch_embed.num_patches,
        "positions": _positions(config.positions),
        "pooling": model.global_pool,
        "num_classes": config.num_classes,
        "preprocess": dataclasses.asdict(config.preprocess),
        "weights": timm.list_pretrained(f"{spec.name}.*"),
    }


def _positions(rule: PositionRule) -> str:
    words = f"bicubic, {'with' if rule.antialias else 'without'} antialias"
    return words + (f", offset {rule.offset:g}" if rule.offset else "")


def _architecture_rows(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    images, count = facts["preprocess"], facts["parameters"]
    yield "architecture", f"{facts['architecture']} (family {facts['family']}, size {facts['size']})"
    yield "upstream", f"timm's {facts['upstream']}"
    yield "parameters", f"{count:,} ({count / 1e6:.1f} M)"
    yield "width", f"{facts['width']}"
    yield "depth", f"{facts['depth']} blocks"
    yield "heads", f"{facts['num_heads']} of {facts['width'] // facts['num_heads']} channels"
    yield (
        "MLP",
        f"{facts['mlp']} with {facts['activation']}, first layer {facts['mlp_hidden']} ({facts['mlp_ratio']:g} x)",
    )
    yield "LayerScale", "none" if facts["layer_scale"] is None else f"starts at {facts['layer_scale']:g}"
    yield "norm epsilon", f"{facts['norm_epsilon']:.3g}"
    yield "patch", f"{facts['patch_size']} pixels"
    yield "image size", " x ".join(map(str, facts["image_size"]))
    parts = f"{facts['class_tokens']} class + {facts['registers']} registers + {facts['patches']} patches"
    yield "tokens", f"{facts['tokens']} = {parts}"
    yield "positions", facts["positions"]
    yield "pooling", f"{facts['pooling']}"
    yield "classes", f"{facts['num_classes']}" if facts["num_classes"] else "none: no head"
    crop = f"crop {images['crop_pct']:g} ({images['crop_mode']})"
    yield "images", f"{images['interpolation']}, {crop}, mean {_numbers(images['mean'])}, std {_numbers(images['std'])}"


def _numbers(values: list[float]) -> str:
    return "/".join(f"{value:.3g}" for value in values)


def _provenance_rows(told: Provenance, *, registers: int) -> Iterator[tuple[str, str]]:
    yield "origin", told.origin
    yield "license", told.license or UNKNOWN
    yield "data set", told.dataset or NOT_RECORDED
    yield "measured", ", ".join(f"{name} {value:.4g}" for name, value in sorted(told.metrics.items())) or "not measured"
    match told.made:
        case Conversion() as report:
            if report.untrained_registers:
                yield "registers", f"{report.untrained_registers} of {registers} drawn at random, untrained"
            yield from _conversion_rows(report)
        case TrainingRun() as run:
            yield "training", _training(run, told.best)
        case Transformation() as step:
            yield "made", f"{step.what} of {step.source}"
        case Foreign(settings=settings) if settings:
            yield "settings", ", ".join(settings)
    yield "artifacts", told.artifacts.verdict if told.artifacts else "not measured"
    doors = ", ".join(f"{value:g} in {door}" for door, value in (told.doors or {}).items())
    yield "doors", f"largest absolute difference {doors}" if doors else "not measured"
    yield "versions", ", ".join(f"{name} {number}" for name, number in told.versions.items()) or NOT_RECORDED
    yield "command", told.command or NOT_RECORDED
    yield "commit", told.commit or NOT_RECORDED
    yield "created", told.created or NOT_RECORDED
    yield "hardware", told.hardware or NOT_RECORDED
    yield "time", NOT_RECORDED if told.seconds is None else duration(told.seconds)


def _conversion_rows(report: Conversion) -> Iterator[tuple[str, str]]:
    yield "source", f"{report.source}, read as {report.format}"
    for name, digest in report.sha256.items():
        yield "sha256", f"{digest}  {name}"
    yield "mapped", f"{report.num_mapped} tensors"
    for why, names in report.dropped.items():
        more = f", ... {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        yield "dropped", f"{len(names)} ({', '.join(names[:SHOWN])}{more}): {why}"
    yield from (("note", note) for note in report.notes)
    differences = ", ".join(f"{value:.2g} in {name}" for name, value in report.differences.items())
    yield "difference", f"{differences}, to {report.measured.get('reference')}" if differences else "not measured"


def _training(run: TrainingRun, best: BestModel | None) -> str:
    """A run in a line, as far as it is recorded."""
    recipe, total = run.facts, run.total_steps
    facts = {
        "recipe": recipe.name,
        "steps": run.step if run.step == total else f"{run.step} of {total}",
        "batch size": recipe.batch_size,
        "optimiser": recipe.opt,
        "learning rate": recipe.lr,
        "seed": recipe.seed,
        "best of its run by": best and best.score,
    }
    return ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None) or NOT_RECORDED


def _printable(text: str) -> str:
    """Text from someone else's file on one line, without characters that move the terminal's cursor."""
    return "".join(char if char.isprintable() else " " for char in text)
