"""A bundle: an architecture, its weights, the images they expect and where they came from."""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, Self, cast

import huggingface_hub as hf
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import trunc_normal_
from timm.models import VisionTransformer, adapt_input_conv, get_model_args, load_state_dict_from_hf
from torch import Tensor, nn

from vitreg_hub import environment
from vitreg_hub.arch import get_arch
from vitreg_hub.bundle.config import BundleConfig, Preprocess, config_from_json, empty_model, read_config, shapes_of
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.bundle.rules import rule_problems, tensor_problems, warn_of_unread, weights_problems
from vitreg_hub.errors import BundleError, readable
from vitreg_hub.files import CARD_FILE, CONFIG_FILE, WEIGHTS_FILE, new_folder
from vitreg_hub.names import HUB_PREFIX, ModelName
from vitreg_hub.network.kinds import STEM
from vitreg_hub.network.untold import UNTOLD
from vitreg_hub.remote.client import hub_errors, patiently
from vitreg_hub.remote.download import download


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelBundle(BundleConfig):
    """A model with everything that is needed to use and to distribute it: the content of config.json, and the weights.

    Attributes:
        state_dict: Weights under timm's names. Read-only: `build` never shares them with a model.
        weights_file: The file that `state_dict` is mapped from, set by `load`.
    """

    state_dict: Mapping[str, Tensor]
    weights_file: Path | None = field(default=None, init=False, repr=False, compare=False)

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

        Its position rule is kept, and so is the effect of another LayerNorm epsilon, as a scale of the weights.

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
        cfg = cast(dict[str, Any], model.pretrained_cfg)
        preprocess = Preprocess.from_cfg(cfg | {"input_size": [model.in_chans, *args["img_size"]]})
        untold = {part.key: part.found_in(model, spec) for part in UNTOLD}
        weights = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in model.state_dict().items()}
        for part in UNTOLD:
            weights = part.stored(weights, untold[part.key])
        bundle = cls(
            arch=arch,
            model_args=args,
            num_classes=model.num_classes,
            state_dict=weights,
            preprocess=preprocess,
            provenance=provenance,
            label_names=label_names,
            **untold,
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
            BundleError: The bundle breaks rules of its form; the message names all of them.
            HubError: The Hub refuses or cannot be reached.
            UnknownArchError: Neither a folder nor a known name, or one without weights.
        """
        name = ModelName.parse(source)
        if name.repo_id:
            return cls._load_folder(download(name.given), called=name.given)
        if folder := name.path or name.shipped:
            return cls._load_folder(folder, called=name.given)
        name.require_weights()
        return cls._load_published(name)

    @classmethod
    def _load_folder(cls, folder: Path, *, called: str) -> Self:
        content = read_config(folder, called=called)
        problems = list(rule_problems(content))
        config = None if problems else config_from_json(content)
        with readable(called):
            problems += weights_problems(folder, config)
        if config is None or problems:
            raise BundleError(f"{called} breaks the form of a bundle: " + "; ".join(problems))
        warn_of_unread(content, called=called)
        bundle = cls.of(config, load_file(folder / WEIGHTS_FILE))
        object.__setattr__(bundle, "weights_file", folder / WEIGHTS_FILE)  # not copied by `replace`
        return bundle

    @classmethod
    def of(cls, config: BundleConfig, state_dict: Mapping[str, Tensor]) -> Self:
        """Put a config and its weights together."""
        return cls(state_dict=state_dict, **{f.name: getattr(config, f.name) for f in fields(BundleConfig)})

    @classmethod
    def _load_published(cls, name: ModelName) -> Self:
        cfg = timm.get_pretrained_cfg(name.full)
        if cfg is None or cfg.hf_hub_id is None:
            raise BundleError(f"timm names no Hub repository with the weights {name.full}: give another name.")
        with hub_errors(cfg.hf_hub_id):
            state_dict = patiently(partial(load_state_dict_from_hf, cfg.hf_hub_id))
        return cls(
            arch=name.arch,
            model_args=get_arch(name.arch).model_args(),
            num_classes=cfg.num_classes,
            state_dict=state_dict,
            preprocess=Preprocess.from_cfg(dataclasses.asdict(cfg)),
            provenance=Provenance(
                origin=f"weights of {HUB_PREFIX}{cfg.hf_hub_id}{_cached_commit(cfg.hf_hub_id)}",
                license=cfg.license,
                versions=environment.versions(),
            ),
        )

    def require_consistent(self) -> None:
        """Refuse a bundle that would break the form on disk.

        Raises:
            BundleError: Settings or weights are not those of the architecture; the message names all problems.
        """
        problems = list(rule_problems(self.to_json())) or list(tensor_problems(self, shapes_of(self.state_dict)))
        if problems:
            raise BundleError(f"this is not a bundle of {self.arch}: " + "; ".join(problems))

    def save(self, folder: str | Path, *, card: str | None = None) -> Path:
        """Write the bundle to a new folder, which appears complete or not at all.

        Raises:
            BundleError: The folder exists, or the weights are not those of the architecture.
        """
        with new_folder(Path(folder)) as staging:
            self.write_into(staging, card=card)
        return Path(folder)

    def write_into(self, folder: Path, *, card: str | None = None) -> None:
        """Write the bundle's files into an existing folder, otherwise like `save`."""
        self.require_consistent()
        (folder / CONFIG_FILE).write_text(self.text(), encoding="utf-8")
        save_file(dict(self.state_dict), folder / WEIGHTS_FILE, metadata={"format": "pt"})
        if card is not None:
            (folder / CARD_FILE).write_text(card, encoding="utf-8")

    def build(self, **timm_kwargs: Any) -> nn.Module:
        """Build the timm model, without initialising tensors that the weights replace.

        Args:
            **timm_kwargs: As for `timm.create_model`: img_size, dynamic_img_size (positions are resampled by the
                bundle's rule), in_chans, num_classes (a new head is drawn), features_only, device, dtype.

        Returns:
            The model in evaluation mode, on the CPU unless a device is given. Its residual stream is not scaled.

        Raises:
            BundleError: The arguments change the network so that these weights do not fit.
        """
        placement = {k: timm_kwargs.pop(k) for k in ("device", "dtype") if k in timm_kwargs}
        placement.setdefault("dtype", torch.get_default_dtype())  # as timm does, whatever the stored type
        model = empty_model(self, **timm_kwargs)
        network = cast(VisionTransformer, model.model) if timm_kwargs.get("features_only") else model
        weights: Mapping[str, Tensor] = self._fresh_tensors()
        for part, value in self.untold:
            weights = part.resolve(network, weights, value)
        new_head = network.num_classes != self.num_classes
        state_dict = {k: v for k, v in weights.items() if not (new_head and self.kind.is_of_head(k))}
        if network.in_chans != self.preprocess.input_size[0]:
            stem = f"{STEM}.weight"
            state_dict[stem] = adapt_input_conv(network.in_chans, state_dict[stem], self.preprocess.input_size[0])
        positions = {}  # timm knows only its own rule, so the table is fitted here
        if (table := state_dict.pop(self.kind.positions, None)) is not None:
            grid = network.patch_embed.grid_size
            positions[self.kind.positions] = self.positions.resample(table, old=self.grid, new=grid)
        state_dict = self.kind.adapt(state_dict, network) | positions
        try:
            # assign: nobody else holds these tensors, so they become the parameters without another copy
            left = network.load_state_dict(state_dict, strict=False, assign=True)
        except RuntimeError as error:
            mismatch = str(error).rpartition("\n")[2].strip()
            raise BundleError(f"{self.arch}: the weights do not fit a model with {timm_kwargs}: {mismatch}") from error
        missing = [key for key in left.missing_keys if not (new_head and self.kind.is_of_head(key))]
        unused = [] if timm_kwargs.get("features_only") else left.unexpected_keys
        if missing or unused:
            raise BundleError(
                f"{self.arch}: the weights do not fit a model with {timm_kwargs}: "
                f"{len(missing)} tensors are missing, {len(unused)} have no place, first {[*missing, *unused][0]}"
            )
        for prefix in sorted({key.partition(".")[0] for key in left.missing_keys}):  # as timm draws a head
            head = cast(nn.Linear, network.get_submodule(prefix)).to_empty(device="cpu")
            trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)
        return model.to(**placement).eval()

    def _fresh_tensors(self) -> dict[str, Tensor]:
        """Weights that nobody else holds: the file mapped once more, which costs no copy, or copies."""
        if self.weights_file is not None and self.weights_file.exists():
            return load_file(self.weights_file)
        return {name: tensor.clone() for name, tensor in self.state_dict.items()}


def _cached_commit(repo_id: str) -> str:
    """``@`` and the commit of weights that were just loaded; empty if the cache does not know it."""
    found = hf.try_to_load_from_cache(repo_id, WEIGHTS_FILE)
    return f"@{Path(found).parent.name}" if isinstance(found, str) else ""
