"""The six rules of a bundle (R1 to R6), and what breaks without them.

A bundle that keeps them opens in plain timm, in plain transformers and with this package, and loads no other weights.
"""

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg

from vitreg_hub.arch import row
from vitreg_hub.bundle.config import BundleConfig, config_from_json, empty_model, shapes_of
from vitreg_hub.errors import BundleError, UnknownArchError
from vitreg_hub.files import LARGE_HEADER, WEIGHTS_FILE, has_large_header
from vitreg_hub.network.kinds import KINDS
from vitreg_hub.network.limits import weights_in

TRAINER_FILES = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""What transformers' Trainer writes beside a model: not weights; never read here and never published."""
NETWORK_ARGS = frozenset().union(*(kind.arguments for kind in KINDS.values()))
"""What `model_args` may hold: `timm.create_model` accepts more, such as files and addresses of weights."""
OTHER_WEIGHTS = ("url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load")
"""Fields of timm's `PretrainedCfg` that name other weights than the bundle's own."""


TOP_KEYS = frozenset(
    "architecture num_classes num_features global_pool label_names model_args pretrained_cfg vitreg".split()  # noqa: SIM905
)
"""The keys of a config.json that `BundleConfig` writes."""
OF_BACKBONE = {"apply_layernorm", "reshape_hidden_states", "out_features", "out_indices"}

logger = logging.getLogger(__name__)


def warn_of_unread(content: Mapping[str, Any], *, called: str) -> None:
    """Name the keys of a config.json that mean nothing here: they may be misspelled, or in the wrong place."""
    if unknown := content.keys() - TOP_KEYS - OF_BACKBONE:
        from transformers import TimmWrapperConfig  # takes seconds

        if unknown := sorted(unknown - {f.name for f in dataclasses.fields(TimmWrapperConfig)}):
            logger.warning(
                "%s: config.json holds %s, which nothing reads: timm's settings belong under model_args and "
                "pretrained_cfg, others must go.",
                called,
                ", ".join(unknown),
            )


def source_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a config.json would make timm load something else than the bundle's own weights."""
    args, cfg = config.get("model_args"), config.get("pretrained_cfg")
    if isinstance(args, dict) and (unknown := sorted(args.keys() - NETWORK_ARGS)):
        yield f"model_args holds {unknown}, which do not describe a network of timm's VisionTransformer"
    if isinstance(cfg, dict) and (named := [key for key in OTHER_WEIGHTS if cfg.get(key)]):
        yield f"pretrained_cfg holds {named}, but a bundle has no other weights than its {WEIGHTS_FILE}"


def _register_problems(config: BundleConfig) -> Iterator[str]:
    """Yield why a bundle's row is not the one for its number of registers."""
    spec, registers, argument = config.spec, config.num_registers, config.kind.registers_argument
    said = f"{spec.name} has {spec.num_registers} registers, but model_args.{argument} is {registers}"
    try:
        if (fitting := row(spec.family, spec.size, registers)) != spec:
            yield f"{said}: that is {fitting.name}"
    except UnknownArchError:
        yield f"{said}: there is no room for registers"
    if spec.lineage.distilled and config.model_args.get("no_embed_class"):
        yield f"model_args.no_embed_class must be false, because in {spec.name} both tokens have positions"


def rule_problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield what in a config.json would close a door, with the number of the rule and the door."""
    others = list(source_problems(content))
    yield from others
    try:
        config = config_from_json(content)
    except BundleError as error:
        yield str(error)
        return
    if others:
        return
    spec, args, cfg = config.spec, config.model_args, content["pretrained_cfg"]
    if content.get("architecture") != spec.base:
        yield (
            f"R1: architecture is {content.get('architecture')!r}, but for {spec.name} it must be the upstream name "
            f"{spec.base!r}, the only one that plain timm knows"
        )
    missing = sorted(spec.model_args().keys() - args.keys())
    if missing:
        yield f"R2: model_args is missing {missing}, so transformers would build the model at upstream's defaults"
    if "num_classes" in args:
        yield "R3: model_args holds num_classes, which transformers then passes twice"
    if unknown := sorted(cfg.keys() - {f.name for f in dataclasses.fields(PretrainedCfg)}):
        yield f"R4: pretrained_cfg holds {unknown}, which timm refuses; our own fields belong under 'vitreg'"
    if "model_type" in content:
        yield f"R5: model_type is {content['model_type']!r}; leave it out, plain transformers must see timm's form"
    if not missing:
        yield from _register_problems(config)
        if (said := config.preprocess.input_size) != (built := (args["in_chans"], *config.img_size)):
            yield f"pretrained_cfg.input_size is {list(said)}, but model_args say {list(built)}"
    if config.label_names and len(config.label_names) != config.num_classes:
        yield f"label_names must be a list of {config.num_classes} names, not {list(config.label_names)}"


def weights_problems(folder: Path, config: BundleConfig | None) -> Iterator[str]:
    """Yield what in a folder's weights would close a door (rule R6), from the header alone.

    The tensors must fit the config, which is None if it breaks the rules itself.
    """
    found = {path.name for path in weights_in(folder)}
    for name in sorted(found - {WEIGHTS_FILE} - TRAINER_FILES):
        yield f"R6: {name} is a second weights file; only {WEIGHTS_FILE} may be there, and pickles are never read"
    if WEIGHTS_FILE not in found:
        yield f"R6: there is no {WEIGHTS_FILE}"
        return
    if has_large_header(folder / WEIGHTS_FILE):  # which also opens it: safetensors calls an unreadable file missing
        yield f"R6: {WEIGHTS_FILE} {LARGE_HEADER}"
        return
    try:
        with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
            metadata = weights.metadata() or {}
            names = weights.keys()
            shapes = {name: tuple(weights.get_slice(name).get_shape()) for name in names}
            integers = [name for name in names if not weights.get_slice(name).get_dtype().startswith(("F", "BF"))]
    except SafetensorError as error:
        yield f"R6: {WEIGHTS_FILE} is truncated or not a safetensors file ({error})"
        return
    if integers:
        yield f"R6: {len(integers)} tensors of {WEIGHTS_FILE} are not floating-point numbers, first {integers[0]}"
    if metadata.get("format") != "pt":
        yield f"R6: the header of {WEIGHTS_FILE} has format {metadata.get('format')!r}; transformers wants 'pt'"
    if config is not None:
        yield from tensor_problems(config, shapes)


def tensor_problems(config: BundleConfig, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yield which tensors are not those of the network that a config.json describes."""
    try:
        model = empty_model(config, weight_init="skip")
    except (TypeError, ValueError, KeyError, AssertionError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        yield f"timm cannot build the model from model_args ({type(error).__name__}: {reason})"
        return
    wanted = shapes_of(model.state_dict())
    for part, value in config.untold:
        if problem := part.problem(model, value):
            yield problem
    if missing := sorted(wanted.keys() - shapes.keys()):
        yield f"R6: {len(missing)} tensors are missing under timm's names, first {missing[0]}"
    if unknown := sorted(shapes.keys() - wanted.keys()):
        yield f"R6: {len(unknown)} tensors have names that timm does not know, first {unknown[0]}"
    for key in sorted(wanted.keys() & shapes.keys()):
        if wanted[key] != shapes[key]:
            yield f"{key} has shape {list(shapes[key])}, but model_args say {list(wanted[key])}"
