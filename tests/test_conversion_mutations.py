"""Damaged checkpoints: `convert` refuses each, or its bundle computes what the damaged tensors say. Nothing between.

What they say is computed here, by a ViT in a few lines that reads the lineage's own names.
"""

import shutil
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.conversion import convert
from vitreg_hub.conversion.report import ConversionReport
from vitreg_hub.errors import VitregError

GOLDEN = Path(__file__).parent / "golden"
Tensors = dict[str, Tensor]

TIMM = dict(
    cls="cls_token",
    dist="dist_token",
    reg="register_tokens",
    pos="pos_embed",
    patch="patch_embed.proj",
    norm="norm",
    norm1="blocks.{i}.norm1",
    qkv=["blocks.{i}.attn.qkv"],
    proj="blocks.{i}.attn.proj",
    norm2="blocks.{i}.norm2",
    fc1="blocks.{i}.mlp.fc1",
    fc2="blocks.{i}.mlp.fc2",
    head="head",
    head_dist="head_dist",
)
SCALED = TIMM | dict(ls1="blocks.{i}.ls1.gamma", ls2="blocks.{i}.ls2.gamma")
SWIGLU = SCALED | dict(fc1="blocks.{i}.mlp.w12", fc2="blocks.{i}.mlp.w3")
DEIT3 = TIMM | dict(ls1="blocks.{i}.gamma_1", ls2="blocks.{i}.gamma_2")
OPENCLIP = dict(
    cls="visual.class_embedding",
    pos="visual.positional_embedding",
    patch="visual.conv1",
    norm_pre="visual.ln_pre",
    norm="visual.ln_post",
    norm1="visual.transformer.resblocks.{i}.ln_1",
    qkv=["visual.transformer.resblocks.{i}.attn.in_proj_"],
    proj="visual.transformer.resblocks.{i}.attn.out_proj",
    norm2="visual.transformer.resblocks.{i}.ln_2",
    fc1="visual.transformer.resblocks.{i}.mlp.c_fc",
    fc2="visual.transformer.resblocks.{i}.mlp.c_proj",
    projection="visual.proj",
)
HF_VIT = dict(
    cls="embeddings.cls_token",
    dist="embeddings.distillation_token",
    pos="embeddings.position_embeddings",
    patch="embeddings.patch_embeddings.projection",
    norm="layernorm",
    norm1="encoder.layer.{i}.layernorm_before",
    qkv=[f"encoder.layer.{{i}}.attention.attention.{part}" for part in ("query", "key", "value")],
    proj="encoder.layer.{i}.attention.output.dense",
    norm2="encoder.layer.{i}.layernorm_after",
    fc1="encoder.layer.{i}.intermediate.dense",
    fc2="encoder.layer.{i}.output.dense",
)
HF_DINOV2 = HF_VIT | dict(
    reg="embeddings.register_tokens",
    norm1="encoder.layer.{i}.norm1",
    norm2="encoder.layer.{i}.norm2",
    fc1="encoder.layer.{i}.mlp.fc1",
    fc2="encoder.layer.{i}.mlp.fc2",
    ls1="encoder.layer.{i}.layer_scale1.lambda1",
    ls2="encoder.layer.{i}.layer_scale2.lambda1",
)
HF_CLIP = dict(
    cls="vision_model.embeddings.class_embedding",
    pos="vision_model.embeddings.position_embedding.weight",
    patch="vision_model.embeddings.patch_embedding",
    norm_pre="vision_model.pre_layrnorm",
    norm="vision_model.post_layernorm",
    norm1="vision_model.encoder.layers.{i}.layer_norm1",
    qkv=[f"vision_model.encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv"],
    proj="vision_model.encoder.layers.{i}.self_attn.out_proj",
    norm2="vision_model.encoder.layers.{i}.layer_norm2",
    fc1="vision_model.encoder.layers.{i}.mlp.fc1",
    fc2="vision_model.encoder.layers.{i}.mlp.fc2",
    head="visual_projection",
)


@dataclass(frozen=True, eq=False)
class Case:
    """A recorded checkpoint: its names, and what no tensor tells."""

    golden: str
    names: dict[str, Any]
    heads: int
    options: dict[str, Any] = field(default_factory=dict)
    eps: float = 1e-6
    quick: bool = False
    depth: int = 3

    @property
    def tensors(self) -> Tensors:
        for name in ("checkpoint.safetensors", "model/model.safetensors"):
            if (GOLDEN / self.golden / name).exists():
                return load_file(GOLDEN / self.golden / name)
        loaded = torch.load(GOLDEN / self.golden / "checkpoint.pth", weights_only=True)
        return loaded.get("model", loaded)


CASES = (
    Case("deit_base", TIMM, 2, dict(num_heads=2)),
    Case("deit_distilled", TIMM, 4, dict(num_heads=4)),
    Case("deit3_ls", DEIT3, 4, dict(num_heads=4)),
    Case("dinov2_vit_mlp_hub", SCALED, 2, dict(num_heads=2)),
    Case("dinov2_reg4", SCALED, 4, dict(num_heads=4)),
    Case("dinov2_swiglu_reg4", SWIGLU, 2, dict(num_heads=2)),
    Case("hf_vit", HF_VIT, 4, eps=1e-12),
    Case("hf_deit", HF_VIT, 2, eps=1e-12),
    Case("hf_dinov2", HF_DINOV2, 2),
    Case("hf_dinov2_reg", HF_DINOV2, 4),
    Case("hf_clip_vision", HF_CLIP, 4, eps=1e-5, quick=True),
    Case("openclip_vision_gelu", OPENCLIP, 2, dict(num_heads=2, act="gelu"), eps=1e-5),
    Case("openclip_full_plain", OPENCLIP, 4, dict(num_heads=4, act="quick_gelu"), 1e-5, quick=True, depth=2),
)
IN_MEMORY = {case.golden: case.tensors for case in CASES}


class Reference:
    """A ViT on a lineage's tensors, which remembers what it read."""

    def __init__(self, case: Case, tensors: Tensors):
        self.case, self.tensors, self.read = case, tensors, set()

    def get(self, name: str) -> Tensor:
        self.read.add(name)
        assert self.tensors[name].is_floating_point()
        return self.tensors[name].float()

    def has(self, role: str, suffix: str = "") -> bool:
        return role in self.case.names and f"{self.case.names[role]}{suffix}" in self.tensors

    def layer(self, role: str, i: int = 0) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; several layers of the lineage make one."""
        found = self.case.names[role]
        names = [name.format(i=i) for name in ([found] if isinstance(found, str) else found)]
        dots = ["" if name.endswith("_") else "." for name in names]
        weight = torch.cat([self.get(f"{name}{dot}weight") for name, dot in zip(names, dots, strict=True)])
        biases = [f"{name}{dot}bias" for name, dot in zip(names, dots, strict=True)]
        if not any(name in self.tensors for name in biases):
            return weight, None
        return weight, torch.cat([self.get(name) for name in biases])

    def norm(self, role: str, x: Tensor, i: int = 0) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], *self.layer(role, i), self.case.eps)

    def attention(self, x: Tensor, i: int) -> Tensor:
        q, k, v = F.linear(x, *self.layer("qkv", i)).unflatten(2, (3, self.case.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(2, 3) * q.shape[3] ** -0.5).softmax(3)
        return F.linear((weights @ v).transpose(1, 2).flatten(2), *self.layer("proj", i))

    def mlp(self, x: Tensor, i: int) -> Tensor:
        x = F.linear(x, *self.layer("fc1", i))
        if self.case.names is SWIGLU:
            gate, value = x.chunk(2, dim=2)
            x = F.silu(gate) * value
        else:
            x = x * torch.sigmoid(1.702 * x) if self.case.quick else F.gelu(x)
        return F.linear(x, *self.layer("fc2", i))

    def branch(self, role: str, x: Tensor, i: int) -> Tensor:
        scaled = role in self.case.names
        return x * self.get(self.case.names[role].format(i=i)) if scaled else x

    def __call__(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Normed tokens, and the output of the head if there is one."""
        names = self.case.names
        weight, bias = self.layer("patch")
        patches = F.conv2d(images, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
        dim = patches.shape[2]
        tokens = [self.get(names["cls"]).reshape(1, 1, dim)]
        if self.has("dist"):
            tokens.append(self.get(names["dist"]))
        pos = self.get(names["pos"]).reshape(1, -1, dim)
        x = torch.cat([*tokens, patches], dim=1)
        x = x + F.pad(pos, (0, 0, x.shape[1] - pos.shape[1], 0))  # DeiT-III has none for the class token
        if self.has("reg"):
            registers = self.get(names["reg"])
            x = torch.cat([x[:, :1], registers, x[:, 1:]], dim=1)
        if "norm_pre" in names:
            x = self.norm("norm_pre", x)
        for i in range(self.case.depth):
            x = x + self.branch("ls1", self.attention(self.norm("norm1", x, i), i), i)
            x = x + self.branch("ls2", self.mlp(self.norm("norm2", x, i), i), i)
        x = self.norm("norm", x)
        return x, self.head(x)

    def head(self, x: Tensor) -> Tensor | None:
        if self.has("projection"):
            return x[:, 0] @ self.get(self.case.names["projection"])
        if not self.has("head", ".weight"):
            return None
        output = F.linear(x[:, 0], *self.layer("head"))
        if self.has("dist"):
            output = (output + F.linear(x[:, 1], *self.layer("head_dist"))) / 2
        return output


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


def test_changed_tensors(tmp_path):
    folders = Folders(tmp_path)
    sound = {case: folders.convert(case, folders.write(case, IN_MEMORY[case.golden], "zip")) for case in CASES}
    unused = {
        case: {name for names in ConversionReport.of(bundle).dropped.values() for name in names}
        for case, bundle in sound.items()
    }

    @quick_settings(450)
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
    assert folders.outcomes["refused"] > 100
    assert folders.outcomes["converted"] > 50
    assert folders.outcomes["unchanged"] > 5


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
    return loaded.get("model", loaded)


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
