"""Damaged checkpoints: `convert` refuses each, or its bundle computes what the damaged tensors say. Nothing between.

What they say is computed by `plain_vit.Reference`.
"""

import shutil
import zipfile
from collections import Counter
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import GOLDEN, convert
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from plain_vit import CASES, IN_MEMORY, Case, Reference, Tensors
from safetensors.torch import load_file, save_file
from torch import Tensor

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import VitregError


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Folders:
    """Writes checkpoints and converts them, each in a folder of its own that is removed again."""

    def __init__(self, root: Path):
        self.root, self.numbers, self.outcomes = root, count(), Counter()

    def write(self, case: Case, tensors: Tensors, kind: str) -> Path:
        """Write a checkpoint as its lineage does."""
        folder = self.root / str(next(self.numbers))
        folder.mkdir()
        content = {"model": tensors} if case.golden.startswith("deit") else tensors
        if kind == "safetensors":
            save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")
        else:
            torch.save(content, folder / "pytorch_model.bin", _use_new_zipfile_serialization=kind == "zip")
        config = GOLDEN / case.golden / "model/config.json"
        if config.exists():
            shutil.copy(config, folder)
        return folder

    def convert(self, case: Case, folder: Path, **options: Any) -> ModelBundle | None:
        """The bundle, or None for a refusal that left nothing."""
        before = set(folder.iterdir())
        try:
            convert(folder, folder / "out", **case.options | options)
        except VitregError as error:
            sentence = str(error)
        else:
            self.outcomes["converted"] += 1
            return ModelBundle.load(folder / "out")
        self.outcomes["refused"] += 1
        assert "\n" not in sentence
        assert set(folder.iterdir()) == before
        return None

    def require_right(self, bundle: ModelBundle, case: Case, tensors: Tensors) -> None:
        """Compare a bundle with the tensors that it was made from."""
        reference = Reference(case, tensors)
        images = torch.randn(1, *bundle.preprocess.input_size, generator=torch.Generator().manual_seed(0))
        model = bundle.build()
        with torch.inference_mode():
            tokens, output = reference(images)
            ours, our_output = model.forward_features(images), model(images)
        torch.testing.assert_close(ours, tokens, atol=1e-4, rtol=1e-4, equal_nan=True)
        assert bundle.num_classes == (0 if output is None else output.shape[1])
        if output is not None:
            torch.testing.assert_close(our_output, output, atol=1e-4, rtol=1e-4, equal_nan=True)
        dropped = {name for names in ConversionReport.of(bundle).dropped.values() for name in names}
        assert dropped == tensors.keys() - reference.read


# Tensors

DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool)
ADDED = (
    "extra",
    "visual.extra",
    "blocks.7.norm1.weight",
    "blocks.0.norm3.bias",
    "encoder.layer.0.extra",
    "proj",
    "head.bias",
)


def resized(tensor: Tensor, dim: int, larger: bool) -> Tensor:
    if not tensor.ndim:
        return tensor[None]
    dim %= tensor.ndim
    first = tensor.narrow(dim, 0, 1)
    return torch.cat([tensor, first], dim) if larger else tensor.narrow(dim, 0, tensor.shape[dim] - 1)


@st.composite
def mutations(draw: st.DrawFn) -> tuple[Case, Tensors, set[str], bool]:
    """A case, its tensors after one or two changes, the names touched, and whether all values are the same."""
    case = draw(st.sampled_from(CASES))
    tensors = dict(IN_MEMORY[case.golden])
    touched, same_values = set(), True
    for _ in range(draw(st.sampled_from((1, 1, 1, 2)))):
        name = draw(st.sampled_from(sorted(tensors)))
        touched.add(name)
        tensor = tensors[name]
        kind = draw(st.sampled_from(("drop", "rename", "reshape", "dtype", "add", "swap", "resize", "transpose")))
        match kind:
            case "drop":
                del tensors[name]
            case "rename":
                change = draw(st.sampled_from(("{}_", "module.{}", "x.{}", "{}.weight")))
                tensors[change.format(name)] = tensors.pop(name)
            case "reshape":
                new = draw(st.sampled_from(("flat", "front", "back", "empty")))
                changed = {"flat": tensor.flatten(), "front": tensor[None], "back": tensor[..., None]}
                tensors[name] = changed.get(new, tensor.new_zeros(*tensor.shape[:-1], 0))
            case "dtype":
                tensors[name] = tensor.to(dtype := draw(st.sampled_from(DTYPES)))
                same_values &= dtype == torch.float64
                continue
            case "add":
                new = draw(st.sampled_from(ADDED))
                touched.add(new)
                tensors[new] = torch.ones(tensor.shape)
            case "swap":
                alike = sorted(other for other, t in tensors.items() if t.shape == tensor.shape)
                other = draw(st.sampled_from(alike if draw(st.booleans()) else sorted(tensors)))
                touched.add(other)
                tensors[name], tensors[other] = tensors[other], tensor
            case "resize":
                tensors[name] = resized(tensor, draw(st.integers(0, 3)), draw(st.booleans()))
            case "transpose":
                tensors[name] = tensor.transpose(-1, -2) if tensor.ndim > 1 else tensor.flip(0)
        same_values = False
    return case, tensors, touched, same_values


def quick_settings(number: int) -> settings:
    return settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.golden)
def test_reference_agrees_on_sound_checkpoints(case, tmp_path):
    folders = Folders(tmp_path)
    bundle = folders.convert(case, folders.write(case, IN_MEMORY[case.golden], "zip"))
    folders.require_right(bundle, case, IN_MEMORY[case.golden])


@pytest.mark.parametrize("number", [200, pytest.param(450, marks=pytest.mark.slow)])
def test_changed_tensors(number, tmp_path):
    folders = Folders(tmp_path)
    sound = {case: folders.convert(case, folders.write(case, IN_MEMORY[case.golden], "zip")) for case in CASES}
    unused = {
        case: {name for names in ConversionReport.of(bundle).dropped.values() for name in names}
        for case, bundle in sound.items()
    }

    @quick_settings(number)
    @given(mutations(), st.sampled_from(("zip", "legacy", "safetensors")))
    def check(mutated, kind):
        case, tensors, touched, same_values = mutated
        if case.golden.startswith("deit_") and kind == "safetensors":
            kind = "zip"  # no {"model": ...} tells DeiT there
        folder = folders.write(case, tensors, kind)
        bundle = folders.convert(case, folder)
        if bundle is not None:
            folders.require_right(bundle, case, tensors)
            if same_values or touched <= unused[case]:
                folders.outcomes["unchanged"] += 1
                for name, tensor in sound[case].state_dict.items():
                    assert torch.equal(bundle.state_dict[name], tensor), name
        else:
            assert not same_values
        shutil.rmtree(folder)

    check()
    assert folders.outcomes["refused"] > number / 5
    assert folders.outcomes["converted"] > number / 10
    assert folders.outcomes["unchanged"] > number / 100


# Files


def header_of(path: Path, kind: str) -> list[range]:
    """Where a file describes its tensors."""
    size = path.stat().st_size
    if kind == "safetensors":
        return [range(8 + int.from_bytes(path.read_bytes()[:8], "little"))]
    if kind == "legacy":
        return [range(min(size, 9000))]
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
        records = [info.header_offset for info in archive.infolist()]
    return [range(8000), *(range(start, start + 64) for start in records), range(directory, size)]


def as_read_by_others(path: Path, kind: str) -> Tensors:
    """The tensors of a damaged file that was not refused. A zip archive has checksums: nothing may differ."""
    if kind == "safetensors":
        return load_file(path)
    loaded = torch.load(path, weights_only=True, map_location="cpu")
    inside = next(iter(loaded.values()))  # whatever its key is called by now
    return inside if isinstance(inside, dict) else loaded


def test_changed_files(tmp_path):
    folders = Folders(tmp_path)

    @quick_settings(250)
    @given(st.data(), st.sampled_from(CASES), st.sampled_from(("zip", "legacy", "safetensors")))
    def check(data, case, kind):
        if case.golden.startswith("deit_") and kind == "safetensors":
            kind = "legacy"
        folder = folders.write(case, IN_MEMORY[case.golden], kind)
        path = next(path for path in folder.iterdir() if path.suffix != ".json")
        content = bytearray(path.read_bytes())
        if data.draw(st.booleans()):
            content = content[: data.draw(st.integers(0, len(content) - 1))]
        else:
            for _ in range(data.draw(st.integers(1, 3))):
                places = data.draw(st.sampled_from(header_of(path, kind)))
                content[data.draw(st.sampled_from(places))] ^= data.draw(st.integers(1, 255))
        path.write_bytes(content)
        bundle = folders.convert(case, folder)
        if bundle is not None:
            tensors = IN_MEMORY[case.golden] if kind == "zip" else as_read_by_others(path, kind)
            folders.require_right(bundle, case, tensors)
        shutil.rmtree(folder)

    check()
    assert folders.outcomes["refused"] > 100
    assert folders.outcomes["converted"] > 2
