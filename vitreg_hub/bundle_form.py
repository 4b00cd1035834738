"""The one form of a bundle on disk, its six rules, and what breaks which door.

A bundle is a folder, which is also a Hub repository: config.json, model.safetensors, README.md. The rules (R1 to R6)
make it open in plain timm and plain transformers as well as with this package.
"""

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import timm
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg
from torch import Tensor, nn

from vitreg_hub.arch import ARCHS, ArchSpec, require_whole_patches, row
from vitreg_hub.errors import BundleError, UnknownArchError
from vitreg_hub.hub_access import CONFIG_FILE, WEIGHTS_FILE
from vitreg_hub.positions import TIMM_RULE, PositionRule
from vitreg_hub.residual_scale import can_scale

TRAINER_FILES = {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"}
"""What transformers' Trainer writes beside a model: no weights, never read here and never published."""
CONVERSION_KEY, ARTIFACTS_KEY, DOORS_KEY, BEST_KEY = "conversion", "artifacts", "doors", "best"
"""Keys of `Provenance.settings`: two reports, what `doors.verify` found, and by what a run's best model was chosen."""
WEIGHTS_PATTERNS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Preprocess:
    """The images that the weights expect: names and meaning as in timm's `PretrainedCfg`.

    Attributes:
        input_size: Channels, height and width.
        interpolation: Filter of the resize.
        crop_pct: Share of the resized image that the centre crop keeps.
        crop_mode: timm's name of the crop.
        mean: Channel means, for pixels in [0, 1].
        std: Channel standard deviations.
    """

    input_size: tuple[int, int, int]
    interpolation: str = "bicubic"
    crop_pct: float = 1.0
    crop_mode: str = "center"
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_cfg(cls, cfg: Mapping[str, Any]) -> Self:
        """Read the fields that this class has from a timm cfg."""
        values = {f.name: cfg[f.name] for f in dataclasses.fields(cls) if f.name in cfg}
        return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.items()})


@dataclass(frozen=True, kw_only=True, slots=True)
class Provenance:
    """Where weights came from.

    Attributes:
        origin: One sentence.
        license: SPDX identifier, in the Hub's lower-case spelling.
        dataset: What they were trained or measured on.
        metrics: Measured figures by name, shares in [0, 1].
        settings: What a second run would need.
        versions: Versions of the libraries that were used.
        command: Command line that made them, without the machine's folders.
        commit: Commit of this package's source that did.
        created: When, in UTC (ISO 8601).
        hardware: What computed.
        seconds: Wall time that it took.
    """

    origin: str
    license: str | None = None
    dataset: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    command: str | None = None
    commit: str | None = None
    created: str | None = None
    hardware: str | None = None
    seconds: float | None = None


def make_config(
    *,
    spec: ArchSpec,
    model_args: Mapping[str, Any],
    num_classes: int,
    preprocess: Preprocess,
    provenance: Provenance,
    label_names: tuple[str, ...] | None = None,
    positions: PositionRule = TIMM_RULE,
    residual_scale: float = 1.0,
) -> dict[str, Any]:
    """The content of a bundle's config.json."""
    entry: dict[str, Any] = dict(arch=spec.name, provenance=dataclasses.asdict(provenance))
    if positions != TIMM_RULE:
        entry["positions"] = dataclasses.asdict(positions)
    if residual_scale != 1:
        entry["residual_scale"] = residual_scale
    cfg = dataclasses.asdict(preprocess) | dict(
        fixed_input_size=True,
        num_classes=num_classes,
        first_conv="patch_embed.proj",
        classifier=["head", "head_dist"] if spec.lineage.distilled else "head",
        license=provenance.license,
    )
    config = dict(
        architecture=spec.base,
        num_classes=num_classes,
        num_features=model_args["embed_dim"],
        global_pool=model_args["global_pool"],
        label_names=list(label_names) if label_names else None,
        model_args=dict(model_args),
        pretrained_cfg={key: value for key, value in cfg.items() if value is not None},
        vitreg=entry,
    )
    return {key: value for key, value in config.items() if value is not None}


def config_text(config: Mapping[str, Any]) -> str:
    """A config.json, with sorted keys, so that equal bundles have equal files."""
    return json.dumps(config, indent=2, sort_keys=True) + "\n"


def require_absent(target: Path) -> None:
    """Refuse to replace a folder.

    Raises:
        BundleError: There is something.
    """
    if target.exists() or target.is_symlink():
        raise BundleError(f"{target} exists: choose another folder or delete it first.")


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def write_folder(target: Path, fill: Callable[[Path], None]) -> Path:
    """Run `fill` in a sibling temporary folder and rename it into place.

    Raises:
        BundleError: `target` exists, or cannot be written; nothing is left of it.
    """
    require_absent(target)
    made = [folder for folder in target.parents if not folder.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    except OSError as error:
        raise BundleError(f"cannot write to {target.parent}: {error.strerror}.") from error
    try:
        fill(staging)
        mask = _umask()
        for path in (staging, *staging.rglob("*")):  # mkdtemp and safetensors make private ones
            path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)
        staging.rename(target)
    except BaseException as error:
        shutil.rmtree(staging)
        for folder in made:
            folder.rmdir()
        if isinstance(error, OSError | SafetensorError):  # a full disk ends in either
            raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}.") from error
        raise
    return target


def write_file(target: Path, write: Callable[[Path], None], *, replace: bool = False) -> Path:
    """Run `write` on a file in a temporary folder beside the target and rename it into place.

    Args:
        target: The file; must not exist unless `replace`.
        write: Takes the path to write to.
        replace: Put it in the place of an old one.

    Raises:
        BundleError: `target` exists, or cannot be written; it is as it was before.
    """
    if not replace:
        require_absent(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as staging:
            write(Path(staging, target.name))
            Path(staging, target.name).replace(target)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as the latter
        raise BundleError(f"cannot write {target}: {getattr(error, 'strerror', None) or error}.") from error
    return target


def read_config(folder: Path, *, called: str) -> dict[str, Any]:
    """Read a bundle's config.json.

    Raises:
        BundleError: There is none, or it is no JSON object with this package's `vitreg` key.
    """
    if not folder.is_dir():
        raise BundleError(
            f"{called} is neither a folder nor an architecture; `vitreg list` prints those, "
            "and a Hub repository needs the prefix 'hf-hub:'."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise BundleError(f"{called} is no bundle: it has no {CONFIG_FILE}.")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, RecursionError) as error:
        raise BundleError(f"{called} is no bundle: its {CONFIG_FILE} is not JSON ({error}).") from error
    if not isinstance(config, dict) or not isinstance(config.get("vitreg"), dict):
        raise BundleError(f"{called} is no bundle: its {CONFIG_FILE} has no 'vitreg' entry.")
    return config


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
    if unknown := sorted(provenance.keys() - {f.name for f in dataclasses.fields(Provenance)}):
        yield f"vitreg.provenance holds {unknown}; a newer vitreg_hub may know them"
    seconds, texts = provenance.get("seconds"), ("license", "dataset", "command", "commit", "created", "hardware")
    wrong = {key: "text" for key in texts if not isinstance(provenance.get(key), str | None)}
    if not isinstance(provenance["origin"], str):
        wrong["origin"] = "text"
    if seconds is not None and (type(seconds) not in (int, float) or not 0 <= seconds < math.inf):
        wrong["seconds"] = "a positive number"
    for key, kinds, wanted in (
        ("metrics", (int, float), "numbers by name"),
        ("settings", None, "an object"),
        ("versions", (str,), "texts by name"),
    ):
        found = provenance.get(key, {})
        if not isinstance(found, dict) or not all(kinds is None or type(value) in kinds for value in found.values()):
            wrong[key] = wanted
    for key, wanted in wrong.items():
        yield f"vitreg.provenance.{key} must be {wanted}, not {provenance[key]!r}"


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
    first = [*vitreg_problems(config["vitreg"]), *_kind_problems(config)]
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


def empty_model(config: Mapping[str, Any], **timm_kwargs: Any) -> nn.Module:
    """The network with shapes but no memory; timm checks and completes the arguments.

    Raises:
        DataError: The patch does not divide the image.
    """
    args = {"num_classes": config["num_classes"], **config["model_args"], **timm_kwargs}
    require_whole_patches(args)
    return timm.create_model(
        config["architecture"],
        pretrained_cfg=config["pretrained_cfg"],
        pretrained_model_args=dict(config["model_args"]),
        device="meta",
        **args,
    )


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor by name."""
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}
