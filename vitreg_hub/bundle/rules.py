"""The six rules of a bundle, and what breaks which door.

The rules (R1 to R6) make a bundle open in plain timm and plain transformers as well as with this package, and let it
open nothing but itself.
"""

import dataclasses
import inspect
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg, VisionTransformer

from vitreg_hub.arch import ARCHS, ArchSpec, row
from vitreg_hub.bundle.config import empty_model, shapes_of
from vitreg_hub.bundle.provenance import provenance_from_json
from vitreg_hub.errors import BundleError, UnknownArchError
from vitreg_hub.files import WEIGHTS_FILE
from vitreg_hub.network.positions import PositionRule
from vitreg_hub.network.residual_scale import can_scale

TRAINER_FILES = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""What transformers' Trainer writes beside a model: no weights, never read here and never published."""
NETWORK_ARGS = inspect.signature(VisionTransformer).parameters.keys() - {"device", "dtype"}
"""What `model_args` may hold: `timm.create_model` takes more from them, such as files and addresses of weights."""
OTHER_WEIGHTS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""Fields of timm's `PretrainedCfg` that lead away from a bundle's own weights."""
WEIGHTS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def vitreg_problems(entry: Mapping[str, Any]) -> Iterator[str]:
    """Yield what is wrong with our own entry in a config.json."""
    arch, provenance = entry.get("arch"), entry.get("provenance")
    if not isinstance(arch, str) or arch not in ARCHS:
        yield f"no architecture {arch!r}; a newer vitreg_hub may have it"
    if not isinstance(provenance, dict) or "origin" not in provenance:
        yield "vitreg.provenance does not say the origin of the weights"
    else:
        yield from _provenance_problems(provenance)
    if unknown := sorted(entry.keys() - {"arch", "provenance", "positions", "residual_scale"}):
        yield f"vitreg holds {unknown}; a newer vitreg_hub may know them"
    scale = entry.get("residual_scale", 1.0)
    if type(scale) not in (int, float) or not 0 < scale < 2**64 or math.frexp(scale)[0] != 0.5:
        yield f"vitreg.residual_scale must be a positive power of two, not {scale!r}"
    try:
        PositionRule.from_dict(entry.get("positions", {}))
    except BundleError as error:
        yield f"vitreg.{error}"


def _provenance_problems(provenance: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a provenance has another kind than it must have."""
    try:
        provenance_from_json(provenance)
    except BundleError as error:
        yield str(error)


def source_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a config.json would have timm open or fetch something else than the bundle's own weights."""
    args, cfg = config.get("model_args"), config.get("pretrained_cfg")
    if isinstance(args, dict) and (unknown := sorted(args.keys() - NETWORK_ARGS)):
        yield f"model_args holds {unknown}, which do not describe a network of timm's VisionTransformer"
    if isinstance(cfg, dict) and (named := [key for key in OTHER_WEIGHTS if cfg.get(key)]):
        yield f"pretrained_cfg holds {named}, but a bundle has no other weights than its {WEIGHTS_FILE}"


def _kind_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what has another kind than it must have, so that the rules can be read."""
    for key, kind in (("model_args", dict), ("pretrained_cfg", dict), ("num_classes", int)):
        if type(config.get(key)) is not kind:
            yield f"{key} must be {kind.__name__}, not {config.get(key)!r}"
    args = config["model_args"] if isinstance(config.get("model_args"), dict) else {}
    for key in ("patch_size", "embed_dim", "depth", "num_heads", "in_chans"):
        value = args.get(key, 1)
        if type(value) is not int or value < 1:
            yield f"model_args.{key} must be a positive whole number, not {value!r}"
    size = args.get("img_size", [1, 1])
    if not isinstance(size, list | tuple) or len(size) != 2 or not all(type(side) is int and side > 0 for side in size):
        yield f"model_args.img_size must be height and width, not {size!r}"
    if type(registers := args.get("reg_tokens", 0)) is not int or registers < 0:
        yield f"model_args.reg_tokens must be a whole number, not {registers!r}"


def _register_problems(spec: ArchSpec, args: Mapping[str, Any]) -> Iterator[str]:
    """Yield why a row is not the one under which a number of registers is filed."""
    registers = args.get("reg_tokens", spec.num_registers)
    said = f"{spec.name} has {spec.num_registers} registers, but model_args.reg_tokens is {registers}"
    try:
        if (fitting := row(spec.family, spec.size, registers)) != spec:
            yield f"{said}: that is {fitting.name}"
    except UnknownArchError:
        yield f"{said}: there is no room for registers"
    if spec.lineage.distilled and args.get("no_embed_class"):
        yield f"model_args.no_embed_class must be false, for in {spec.name} both tokens have positions"


def rule_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a config.json would close a door, with the number of the rule and the door."""
    first = [*vitreg_problems(config["vitreg"]), *source_problems(config), *_kind_problems(config)]
    yield from first
    if first:
        return
    spec, args, cfg = ARCHS[config["vitreg"]["arch"]], config["model_args"], config["pretrained_cfg"]
    if config.get("architecture") != spec.base:
        yield (
            f"R1: architecture is {config.get('architecture')!r}, but for {spec.name} it must be the upstream name "
            f"{spec.base!r}, the only one that plain timm knows"
        )
    missing = sorted(spec.model_args().keys() - args.keys())
    if missing:
        yield f"R2: model_args lacks {missing}, so transformers would build the model at upstream's defaults"
    if "num_classes" in args:
        yield "R3: model_args holds num_classes, which transformers then passes twice"
    if unknown := sorted(cfg.keys() - {f.name for f in dataclasses.fields(PretrainedCfg)}):
        yield f"R4: pretrained_cfg holds {unknown}, which timm refuses; our own fields belong under 'vitreg'"
    if "model_type" in config:
        yield f"R5: model_type is {config['model_type']!r}; leave it out, plain transformers must see timm's form"
    yield from _register_problems(spec, args)
    for key in ("input_size", "mean", "std"):
        if not isinstance(cfg.get(key), list | tuple) or not all(isinstance(v, int | float) for v in cfg[key]):
            yield f"pretrained_cfg.{key} must be a list of numbers, not {cfg.get(key)!r}"
        elif key == "input_size" and not missing and list(cfg[key]) != (built := [args["in_chans"], *args["img_size"]]):
            yield f"pretrained_cfg.{key} is {list(cfg[key])}, but model_args say {built}"
    labels = config.get("label_names")
    if labels is not None and (not isinstance(labels, list | tuple) or len(labels) != config["num_classes"]):
        yield f"label_names must be a list of {config['num_classes']} names, not {labels!r}"


def weights_problems(folder: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a bundle's weights would close a door (rule R6), from the header alone."""
    found = {path.name for pattern in WEIGHTS_PATTERNS for path in folder.glob(pattern) if path.is_file()}
    for name in sorted(found - {WEIGHTS_FILE} - TRAINER_FILES):
        yield f"R6: {name} is a second weights file; only {WEIGHTS_FILE} may be there, and pickles are never read"
    if WEIGHTS_FILE not in found:
        yield f"R6: there is no {WEIGHTS_FILE}"
        return
    (folder / WEIGHTS_FILE).open("rb").close()  # safetensors calls a file that it may not read missing
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
            metadata = weights.metadata() or {}
            names = weights.keys()
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
            integers = [name for name in names if not weights.get_slice(name).get_dtype().startswith(("F", "BF"))]
    except SafetensorError as error:
        yield f"R6: {WEIGHTS_FILE} is truncated or no safetensors file ({error})"
        return
    if integers:
        yield f"R6: {len(integers)} tensors of {WEIGHTS_FILE} are no floating-point numbers, first {integers[0]}"
    if metadata.get("format") != "pt":
        yield f"R6: the header of {WEIGHTS_FILE} has format {metadata.get('format')!r}; transformers wants 'pt'"
    if not any(rule_problems(config)):
        yield from tensor_problems(config, shapes)


def tensor_problems(config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield which tensors are not those of the network that a config.json describes."""
    try:
        model = empty_model(config, weight_init="skip")
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        yield f"timm cannot build the model from model_args ({type(error).__name__}: {reason})"
        return
    wanted = shapes_of(model.state_dict())
    if config["vitreg"].get("residual_scale", 1) != 1 and not can_scale(model):
        yield "vitreg.residual_scale needs a network without norm_pre and LayerScale, and with a final norm"
    if missing := sorted(wanted.keys() - shapes.keys()):
        yield f"R6: {len(missing)} tensors are missing under timm's names, first {missing[0]}"
    if unknown := sorted(shapes.keys() - wanted.keys()):
        yield f"R6: {len(unknown)} tensors have names that timm does not know, first {unknown[0]}"
    for key in sorted(wanted.keys() & shapes.keys()):
        if wanted[key] != shapes[key]:
            yield f"{key} has shape {list(shapes[key])}, but model_args say {list(wanted[key])}"
