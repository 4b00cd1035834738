"""Opens a bundle in each of the four ways that users have, and compares the outputs."""

import subprocess
import sys
import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitreg_hub.bundle import plain_doors
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError
from vitreg_hub.names import ModelName
from vitreg_hub.remote.download import download
from vitreg_hub.tags import tags

DOORS = ("timm", "transformers", "timm+vitreg_hub", "transformers+vitreg_hub")


@torch.inference_mode()
def verify(folder: str | Path, *, images: Tensor | None = None, bundle: ModelBundle | None = None) -> dict[str, float]:
    """Open a bundle through all four doors; two of them in a fresh process that never imports this package.

    Compares all tokens after the final norm, the pooled features and, with a head, the logits, on the CPU in float32.

    Args:
        folder: A bundle's folder, ``hf-hub:org/name[@revision]``, or the name of weights in this package.
        images: [B, C, H, W] of the bundle's input size; two images of noise by default.
        bundle: The folder's bundle, if it is loaded already.

    Returns:
        Largest absolute difference to `ModelBundle.build` per door: all 0.

    Raises:
        BundleError: A rule is broken, a door does not open, or an output differs by more than 0.
    """
    name = ModelName.parse(folder)
    folder = download(name.given) if name.repo_id else bundle_folder(name)
    bundle = bundle or ModelBundle.load(folder)
    model = bundle.build()
    if images is None:
        images = torch.randn(2, *bundle.preprocess.input_size, generator=torch.Generator().manual_seed(0))
    ours = plain_doors.timm_outputs(model, images)

    opened = _open_plain_doors(Path(folder).resolve(), images)
    by_folder = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    opened["timm+vitreg_hub"] = plain_doors.timm_outputs(by_folder, images)
    opened["transformers+vitreg_hub"] = plain_doors.transformers_outputs(
        str(folder), images, num_classes=bundle.num_classes
    )
    worst = {door: _difference(folder, door, ours, opened[door]) for door in DOORS}
    if any(worst.values()):
        raise BundleError(f"{folder}: outputs differ by door, largest absolute difference: {worst}")
    return worst


def bundle_folder(source: str | Path | ModelName) -> Path:
    """The folder of a bundle, given itself or by the name of weights in this package; refuses anything else."""
    name = source if isinstance(source, ModelName) else ModelName.parse(source)
    folder = name.path or name.shipped
    if folder is not None and folder.is_dir():
        return folder
    remedy = "fetch a published bundle with `vitreg pull` first"
    if name.tag in tags(name.arch):
        remedy = f"ModelBundle.load({name.full!r}).save(folder) writes one with these weights"
    elif near := name.beside():
        remedy = f"did you mean {near[0]}"
    raise BundleError(f"{name.given} is not a folder: {remedy}.")


def _open_plain_doors(folder: Path, images: Tensor) -> dict[str, dict[str, Tensor]]:
    with tempfile.TemporaryDirectory() as scratch:
        sent, returned = Path(scratch, "images.safetensors"), Path(scratch, "outputs.safetensors")
        save_file({"images": images.contiguous()}, sent)
        script = [sys.executable, "-P", plain_doors.__file__, folder, sent, returned]  # -P: no imports from its folder
        run = subprocess.run(script, capture_output=True, text=True, check=False)
        if run.returncode:
            last = run.stderr.strip().rsplit("\n", 1)[-1] or f"it ended with status {run.returncode}"
            raise BundleError(f"{folder} does not open in plain timm and plain transformers: {last}")
        doors: dict[str, dict[str, Tensor]] = {}
        for key, tensor in load_file(returned).items():
            door, _, name = key.partition(".")
            doors.setdefault(door, {})[name] = tensor
        return doors


def _difference(folder: Path, door: str, ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    if ours.keys() != theirs.keys():
        raise BundleError(f"{folder} gives {sorted(theirs)} in {door}, but {sorted(ours)} as a bundle.")
    for name, tensor in ours.items():
        if not (tensor.isfinite().all() and theirs[name].isfinite().all()):
            raise BundleError(
                f"the {name} of {folder} hold infinities or NaN, so its weights are useless: make it again, from an "
                "earlier checkpoint of its training or another copy of its source."
            )
        if tensor.shape != theirs[name].shape:
            found, wanted = list(theirs[name].shape), list(tensor.shape)
            raise BundleError(f"the {name} of {folder} have shape {found} in {door}, but {wanted} as a bundle.")
    return max((tensor - theirs[name]).abs().max().item() for name, tensor in ours.items())
