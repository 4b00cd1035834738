"""A bundle: an architecture, its weights, the images they expect and where they came from."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Self

import huggingface_hub as hf
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import trunc_normal_
from timm.models import VisionTransformer, adapt_input_conv, get_model_args, load_state_dict_from_hf
from timm.models.vision_transformer import checkpoint_filter_fn
from torch import Tensor, nn

from vitreg_hub import environment
from vitreg_hub.arch import ARCHS, ArchSpec, get_arch
from vitreg_hub.bundle.config import Preprocess, config_text, empty_model, make_config, read_config, shapes_of
from vitreg_hub.bundle.provenance import Provenance, provenance_from_json
from vitreg_hub.bundle.rules import rule_problems, tensor_problems, weights_problems
from vitreg_hub.errors import BundleError, UnknownArchError, readable
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, write_folder
from vitreg_hub.names import HUB_PREFIX
from vitreg_hub.network.positions import TIMM_RULE, PositionRule, follow, rule_of
from vitreg_hub.network.residual_scale import scale_for, scaled, stream_norms
from vitreg_hub.remote.client import hub_errors, patiently
from vitreg_hub.remote.download import download

HEADS = ("head.", "head_dist.")
"""How the names of a head's tensors start; the second belongs to a distillation token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBundle:
    """A model with everything that is needed to use and to distribute it.

    Attributes:
        arch: Name of a row of the table.
        model_args: Complete arguments of the row's upstream entrypoint, without the number of classes.
        num_classes: Width of the classification head, 0 without one.
        state_dict: Weights under timm's names. Read-only: `build` never shares them with a model.
        preprocess: The images that the weights expect.
        provenance: Where the weights came from.
        label_names: Names of the classes.
        positions: How the position table is resampled for another image size.
        residual_scale: How many times larger the residual stream of the stored network is (`residual_scale.py`).
        weights_file: The file that `state_dict` is mapped from, set by `load`.
    """

    arch: str
    model_args: Mapping[str, Any]
    num_classes: int
    state_dict: Mapping[str, Tensor]
    preprocess: Preprocess
    provenance: Provenance
    label_names: tuple[str, ...] | None = None
    positions: PositionRule = TIMM_RULE
    residual_scale: float = 1.0
    weights_file: Path | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def spec(self) -> ArchSpec:
        """The row of the table."""
        return get_arch(self.arch)

    @classmethod
    def from_timm(
        cls,
        model: VisionTransformer,
        *,
        arch: str,
        provenance: Provenance,
        label_names: tuple[str, ...] | None = None,
    ) -> Self:
        """Bundle a timm model that was built as one of our architectures, with a copy of its weights.

        The position rule that it follows is kept, and so is the effect of another LayerNorm epsilon, as a scale of the
        weights.

        Raises:
            BundleError: A setting of the model cannot be stored, or is not what the architecture says.
        """
        spec = get_arch(arch)
        not_stored = ("num_classes", "dynamic_img_size", "dynamic_img_pad")
        args = spec.model_args() | {k: v for k, v in get_model_args(model).items() if k not in not_stored}
        try:
            args = json.loads(json.dumps(args))
        except TypeError as error:
            raise BundleError(f"{arch}: a bundle holds JSON only, but the model was built with {args}.") from error
        preprocess = Preprocess.from_cfg(model.pretrained_cfg | {"input_size": [model.in_chans, *args["img_size"]]})
        scale = scale_for(model, norm_eps=spec.lineage.norm_eps)
        weights = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}
        bundle = cls(
            arch=arch,
            model_args=args,
            num_classes=model.num_classes,
            state_dict=scaled(weights, scale),
            preprocess=preprocess,
            provenance=provenance,
            label_names=label_names,
            positions=rule_of(model),
            residual_scale=scale,
        )
        bundle.require_consistent()
        return bundle

    @classmethod
    def load(cls, source: str | Path) -> Self:
        """Load a folder, a Hub repository or published weights.

        Args:
            source: A bundle's folder, ``hf-hub:org/name[@revision]``, or an architecture with weights, with or without
                its tag (``vit_nano_reg4.digits``).

        Raises:
            BundleError: What is there breaks a rule of the form; the message names all of them.
            HubError: The Hub refused or cannot be reached.
            UnknownArchError: Neither a folder nor a known name.
        """
        if str(source).startswith(HUB_PREFIX):
            return cls._load_folder(download(str(source)), called=str(source))
        with readable(source):
            is_name = not Path(source).exists() and str(source).partition(".")[0] in ARCHS
        if is_name:
            return cls._load_published(str(source))
        return cls._load_folder(Path(source), called=str(source))

    @classmethod
    def _load_folder(cls, folder: Path, *, called: str) -> Self:
        config = read_config(folder, called=called)
        with readable(called):
            problems = [*rule_problems(config), *weights_problems(folder, config)]
        if problems:
            raise BundleError(f"{called} breaks the form of a bundle: " + "; ".join(problems))
        bundle = cls.from_config(config, load_file(folder / WEIGHTS_FILE))
        object.__setattr__(bundle, "weights_file", folder / WEIGHTS_FILE)  # of this bundle alone: `replace` drops it
        return bundle

    @classmethod
    def from_config(cls, config: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> Self:
        """Build from the content of a config.json that keeps the rules, and weights."""
        labels = config.get("label_names")
        return cls(
            arch=config["vitreg"]["arch"],
            model_args=config["model_args"],
            num_classes=config["num_classes"],
            state_dict=state_dict,
            preprocess=Preprocess.from_cfg(config["pretrained_cfg"]),
            provenance=provenance_from_json(config["vitreg"]["provenance"]),
            label_names=tuple(labels) if labels else None,
            positions=PositionRule.from_dict(config["vitreg"].get("positions", {})),
            residual_scale=float(config["vitreg"].get("residual_scale", 1)),
        )

    @classmethod
    def _load_published(cls, name: str) -> Self:
        arch = name.partition(".")[0]
        cfg = timm.get_pretrained_cfg(name) if timm.is_model_pretrained(name) else None
        if cfg is None:
            raise UnknownArchError(
                f"{name} has no published weights; `vitreg list` prints the tags of those that have."
            )
        if cfg.file:
            return cls._load_folder(Path(cfg.file).parent, called=name)
        with hub_errors(cfg.hf_hub_id):
            state_dict = patiently(partial(load_state_dict_from_hf, cfg.hf_hub_id))
        return cls(
            arch=arch,
            model_args=get_arch(arch).model_args(),
            num_classes=cfg.num_classes,
            state_dict=state_dict,
            preprocess=Preprocess.from_cfg(dataclasses.asdict(cfg)),
            provenance=Provenance(
                origin=f"weights of {HUB_PREFIX}{cfg.hf_hub_id}{_cached_commit(cfg.hf_hub_id)}",
                license=cfg.license,
                versions=environment.versions(),
            ),
        )

    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return make_config(
            spec=self.spec,
            model_args=self.model_args,
            num_classes=self.num_classes,
            preprocess=self.preprocess,
            provenance=self.provenance,
            label_names=self.label_names,
            positions=self.positions,
            residual_scale=self.residual_scale,
        )

    def require_consistent(self) -> None:
        """Refuse a bundle that would break the form on disk.

        Raises:
            BundleError: Settings or weights are not those of the architecture; the message names all problems.
        """
        problems = list(rule_problems(self.config())) or list(
            tensor_problems(self.config(), shapes_of(self.state_dict))
        )
        if problems:
            raise BundleError(f"this is no bundle of {self.arch}: " + "; ".join(problems))

    def save(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write the bundle to a new folder, which appears complete or not at all.

        Args:
            folder: Must not exist.
            card: Text of README.md.

        Raises:
            BundleError: The folder exists, or the weights are not those of the architecture.
        """
        return write_folder(Path(folder), lambda staging: self.write_into(staging, card=card))

    def write_into(self, folder: Path, *, card: str | None = None) -> None:
        """Write the bundle's files into a folder that someone else makes appear complete or not at all.

        Args:
            folder: Exists.
            card: Text of README.md.

        Raises:
            BundleError: The weights are not those of the architecture.
        """
        self.require_consistent()
        (folder / CONFIG_FILE).write_text(config_text(self.config()), encoding="utf-8")
        save_file(dict(self.state_dict), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if card is not None:
            (folder / CARD_FILE).write_text(card, encoding="utf-8")

    def build(self, **timm_kwargs: Any) -> nn.Module:
        """Build the timm model, without initialising what the weights replace anyway.

        Args:
            **timm_kwargs: As for `timm.create_model`: img_size, dynamic_img_size (positions are resampled by the
                bundle's rule), in_chans, num_classes (a new head is drawn), features_only, device, dtype.

        Returns:
            The model in evaluation mode, on the CPU unless a device is given. Its residual stream is not scaled.

        Raises:
            BundleError: The arguments change the network so that these weights do not fit.
        """
        placement = {k: timm_kwargs.pop(k) for k in ("device", "dtype") if k in timm_kwargs}
        placement.setdefault("dtype", torch.get_default_dtype())  # as timm, whatever the weights are stored in
        model = empty_model(self.config(), **timm_kwargs)
        network = model.model if timm_kwargs.get("features_only") else model
        follow(network, self.positions)
        for norm in stream_norms(network):
            norm.eps /= self.residual_scale**2
        state_dict = scaled(self._fresh_tensors(), 1 / self.residual_scale)
        new_head = network.num_classes != self.num_classes
        if new_head:
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(HEADS)}
        if network.in_chans != self.preprocess.input_size[0]:
            stem = "patch_embed.proj.weight"
            state_dict[stem] = adapt_input_conv(network.in_chans, state_dict[stem])
        positions = self._positions(state_dict, network)
        state_dict = checkpoint_filter_fn(state_dict, network) | positions
        try:
            # assign: the tensors are the model's alone, so they become its parameters without another copy
            left = network.load_state_dict(state_dict, strict=False, assign=True)
        except RuntimeError as error:
            mismatch = str(error).rpartition("\n")[2].strip()
            raise BundleError(f"{self.arch}: the weights do not fit a model with {timm_kwargs}: {mismatch}") from error
        missing = [key for key in left.missing_keys if not (new_head and key.startswith(HEADS))]
        unused = [] if timm_kwargs.get("features_only") else left.unexpected_keys
        if missing or unused:
            raise BundleError(
                f"{self.arch}: the weights do not fit a model with {timm_kwargs}: "
                f"{len(missing)} tensors lack, {len(unused)} have no place, first {[*missing, *unused][0]}"
            )
        for prefix in sorted({key.partition(".")[0] for key in left.missing_keys}):  # as timm draws a head
            head = network.get_submodule(prefix).to_empty(device="cpu")
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return model.to(**placement).eval()

    def _positions(self, state_dict: dict[str, Tensor], network: VisionTransformer) -> dict[str, Tensor]:
        """Take the position table out of the weights, for timm has one rule only, and fit it to a network's grid."""
        if "pos_embed" not in state_dict:
            return {}
        patch = self.model_args["patch_size"]
        height, width = (side // patch for side in self.model_args["img_size"])
        table, new = state_dict.pop("pos_embed"), network.patch_embed.grid_size
        return {"pos_embed": self.positions.resample(table, old=(height, width), new=new)}

    def _fresh_tensors(self) -> dict[str, Tensor]:
        """Weights that no one else holds: the file mapped once more, which costs no copy, or copies."""
        if self.weights_file is not None and self.weights_file.exists():
            return load_file(self.weights_file)
        return {name: tensor.clone() for name, tensor in self.state_dict.items()}


def _cached_commit(repo_id: str) -> str:
    """What names the commit of weights that were just loaded, ``@`` and its hash; empty if the cache does not tell."""
    found = hf.try_to_load_from_cache(repo_id, WEIGHTS_FILE)
    return f"@{Path(found).parent.name}" if isinstance(found, str) else ""
