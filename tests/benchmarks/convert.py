"""Print what converting a large DINOv2 checkpoint costs, against the usual way and a plain copy. Run by hand.

Every run is a fresh process; its time is without the imports, and its peak of resident memory is over theirs.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import checkpoint_filter_fn

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.conversion import convert, export


def write_source(arch: str, path: Path) -> None:
    """A checkpoint of random weights in Meta's names."""
    model = timm.create_model(arch, num_classes=0)
    bundle = ModelBundle.from_timm(model, arch=arch, provenance=Provenance(origin="random weights"))
    export(bundle, path, format="dinov2")


def ours(source: Path, out: Path, arch: str) -> None:
    """Checksum included."""
    convert(source, out, license="unknown")


def usual(source: Path, out: Path, arch: str) -> None:
    """Load, build, load into, save; no checksum."""
    out.mkdir()
    state_dict = load_file(source) if source.suffix == ".safetensors" else torch.load(source, weights_only=True)
    model = timm.create_model(arch, num_classes=0, no_embed_class="register_tokens" in state_dict)
    model.load_state_dict(checkpoint_filter_fn(state_dict, model))
    save_file(model.state_dict(), out / "model.safetensors")


def copy(source: Path, out: Path, arch: str) -> None:
    """What reading and writing alone cost."""
    out.mkdir()
    shutil.copyfile(source, out / source.name)


WAYS = {"`conversion.convert`": ours, "torch.load, build, save": usual, "cp": copy}


def peak_megabytes() -> float:
    """The most resident memory that this process had (Linux; getrusage also counts the parent's)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def one(way: str, source: Path, arch: str) -> None:
    """Run one way once and print its seconds and megabytes."""
    before = peak_megabytes()
    with tempfile.TemporaryDirectory(dir=source.parent) as scratch:
        start = time.perf_counter()
        WAYS[way](source, Path(scratch, "out"), arch)
        seconds = time.perf_counter() - start
    print(json.dumps([seconds, peak_megabytes() - before]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", default="vit_large_reg0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("WAY", "SOURCE"), help=argparse.SUPPRESS)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.write:
        return write_source(args.arch, args.write)
    if args.one:
        return one(args.one[0], Path(args.one[1]), args.arch)

    def again(*words: str | Path) -> str:
        command = [sys.executable, __file__, "--arch", args.arch, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    with tempfile.TemporaryDirectory() as scratch:
        for suffix in (".safetensors", ".pth"):
            source = Path(scratch, f"dinov2{suffix}")
            again("--write", source)
            source.read_bytes()  # into the page cache, the same for all
            runs: dict[str, list[list[float]]] = {way: [] for way in WAYS}
            for _ in range(args.rounds):
                for way in WAYS:
                    runs[way].append(json.loads(again("--one", way, source)))
            plain = statistics.median(seconds for seconds, _ in runs["cp"])
            print(f"| {args.arch}, {suffix}, {source.stat().st_size / 1e9:.1f} GB | seconds | / cp | peak MB |")
            print("|---|---|---|---|")
            for way, measured in runs.items():
                seconds, peak = (statistics.median(column) for column in zip(*measured, strict=True))
                print(f"| {way} | {seconds:.2f} | {seconds / plain:.1f} | {peak:.0f} |")
            print(flush=True)
            source.unlink()
    return None


if __name__ == "__main__":
    main()
