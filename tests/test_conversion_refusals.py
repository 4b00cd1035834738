"""What `convert` refuses, with one sentence and without a trace on disk, and the containers that it opens."""

import argparse
import errno
import json
import os
import pickle
import re
import resource
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import nn

from vitreg_hub.bundle import ModelBundle
from vitreg_hub.conversion import convert
from vitreg_hub.errors import BundleError, ConversionError, HubError, UnknownArchError, VitregError

GOLDEN = Path(__file__).parent / "golden"
DINOV2 = dict(num_heads=2)


OPENCLIP_CONFIG = {
    "model_cfg": json.loads((GOLDEN / "openclip_full_plain/meta.json").read_text())["constructor"],
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]},
}


def tensors_of(case: str) -> dict[str, torch.Tensor]:
    """The weights of a recorded checkpoint, without containers."""
    for name in ("checkpoint.safetensors", "model/model.safetensors"):
        if (GOLDEN / case / name).exists():
            return load_file(GOLDEN / case / name)
    loaded = torch.load(GOLDEN / case / "checkpoint.pth", weights_only=True)
    return loaded.get("model", loaded)


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def vit(depth: int = 2, dim: int = 32, rows: int = 17, **other: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """Random tensors under the names that timm, DeiT and DINO share, without a head."""
    shapes = {"cls_token": (1, 1, dim), "pos_embed": (1, rows, dim), "norm.weight": (dim,), "norm.bias": (dim,)}
    shapes |= {"patch_embed.proj.weight": (dim, 3, 16, 16), "patch_embed.proj.bias": (dim,)}
    for i in range(depth):
        layers = {
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (4 * dim, dim),
            "mlp.fc2": (dim, 4 * dim),
        }
        layers |= {"norm1": (dim,), "norm2": (dim,)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{i}.{name}.weight": shape, f"blocks.{i}.{name}.bias": shape[:1]}
    return random_tensors(shapes | other)


@pytest.fixture
def saved(tmp_path):
    """Write tensors, or anything that torch.save takes, to a file."""

    def save(content, name: str = "weights.pth", **how) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path, **how)
        return path

    return save


def files_below(folder: Path) -> set[Path]:
    """Everything below a folder, but the Hub's cache."""
    return {path for path in folder.rglob("*") if folder / "cache" not in (path, *path.parents)}


@pytest.fixture
def refused(tmp_path):
    """Convert what must be refused, look that nothing was written, and give the sentence."""

    def convert_in_vain(source, error: type[VitregError] = ConversionError, out: Path | None = None, **options) -> str:
        before = files_below(tmp_path)
        with pytest.raises(error) as caught:
            convert(source, out or tmp_path / "out", **options)
        assert files_below(tmp_path) == before
        text = str(caught.value)
        assert "\n" not in text
        return text

    return convert_in_vain


# Other networks


def dinov3() -> dict[str, torch.Tensor]:
    official = {name: t for name, t in vit().items() if name != "pos_embed"}
    return official | random_tensors({"storage_tokens": (1, 4, 32), "rope_embed.periods": (4,), "mask_token": (1, 32)})


def hf_dinov3() -> dict[str, torch.Tensor]:
    shapes = {"embeddings.cls_token": (1, 1, 32), "embeddings.register_tokens": (1, 4, 32), "norm.weight": (32,)}
    shapes |= {"embeddings.patch_embeddings.weight": (32, 3, 16, 16), "layer.0.attention.q_proj.weight": (32, 32)}
    return random_tensors(shapes | {"layer.0.layer_scale1.lambda1": (32,), "embeddings.mask_token": (1, 1, 32)})


def mae() -> dict[str, torch.Tensor]:
    decoder = {"mask_token": (1, 1, 16), "decoder_pos_embed": (1, 17, 16), "decoder_embed.weight": (16, 32)}
    return vit() | random_tensors(decoder | {"decoder_blocks.0.norm1.weight": (16,), "decoder_pred.weight": (48, 16)})


def beit() -> dict[str, torch.Tensor]:
    split = {"blocks.0.attn.q_bias": (32,), "blocks.0.attn.v_bias": (32,)}
    table = {"mask_token": (1, 1, 32), "blocks.0.attn.relative_position_bias_table": (52, 2)}
    return vit() | random_tensors({"blocks.0.gamma_1": (32,), "blocks.0.gamma_2": (32,), **split, **table})


def paralx2() -> dict[str, torch.Tensor]:
    second = {name.replace("attn", "attn1").replace("mlp", "mlp1"): t for name, t in vit().items()}
    scales = {f"blocks.{i}.gamma_{j}_{k}": (32,) for i in (0, 1) for j in (1, 2) for k in (0, 1)}
    norms = {f"blocks.{i}.norm{j}1.weight": (32,) for i in (0, 1) for j in (1, 2)}
    return vit(rows=16) | second | random_tensors(scales | norms)


def hmlp_stem() -> dict[str, torch.Tensor]:
    stem = {"patch_embed.proj.0.weight": (8, 3, 4, 4), "patch_embed.proj.1.weight": (8,), "head.weight": (3, 32)}
    plain = {name: t for name, t in vit(rows=16).items() if not name.startswith("patch_embed")}
    scales = {f"blocks.{i}.gamma_{j}": (32,) for i in (0, 1) for j in (1, 2)}
    return plain | random_tensors(stem | scales)


def coca() -> dict[str, torch.Tensor]:
    pool = {"visual.attn_pool.query": (4, 32), "visual.attn_pool.attn.in_proj_weight": (96, 32)}
    return tensors_of("openclip_full_plain") | random_tensors(pool | {"text_decoder.ln_final.weight": (32,)})


def resnet_clip() -> dict[str, torch.Tensor]:
    stem = {
        "visual.conv1.weight": (8, 3, 3, 3),
        "visual.bn1.weight": (8,),
        "visual.layer1.0.conv1.weight": (8, 8, 1, 1),
    }
    text = {"positional_embedding": (8, 32), "transformer.resblocks.0.ln_1.weight": (32,), "logit_scale": ()}
    return random_tensors(stem | text | {"visual.attnpool.positional_embedding": (50, 32)})


def fsdp_rank() -> dict[str, torch.Tensor]:
    return random_tensors({"teacher.backbone._fsdp_wrapped_module.flat_param": (1000,), "student.flat_param": (7,)})


LOOK_ALIKES = {
    dinov3: "is DINOv3, whose rotary positions .* timm hosts it as Eva",
    hf_dinov3: "is DINOv3",
    mae: "masked autoencoder",
    beit: "BEiT",
    paralx2: "parallel blocks",
    hmlp_stem: "hMLP",
    coca: "pools with attention",
    resnet_clip: "is a ResNet",
    fsdp_rank: "sharded FSDP run: merge the ranks",
}


@pytest.mark.parametrize("network", LOOK_ALIKES, ids=lambda network: network.__name__)
@pytest.mark.parametrize("format", ["auto", "dinov2", "timm"])
def test_other_networks(network, format, saved, refused):
    source = saved(network())
    says = refused(source, format=format, num_heads=2)
    assert says.startswith(str(source))
    assert re.search(LOOK_ALIKES[network], says)


def test_3d_mask_token_alone(saved, refused):
    says = refused(saved(vit() | random_tensors({"mask_token": (1, 1, 32), "head.weight": (3, 32), "head.bias": (3,)})))
    assert "mask_token has three dimensions" in says


def test_half_of_a_rank(saved, refused):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    half = dict(list(tensors.items())[: len(tensors) // 2]) | {"mask_token": tensors["mask_token"]}
    says = refused(saved({"model": half, "optimizer": {}}, "model_0000999.rank_0.pth"), **DINOV2)
    assert "missing" in says
    assert says.endswith("merge the ranks first.")


def test_unknown_tensors_name_the_nearest_format(saved, refused):
    assert "no known format" in refused(saved(random_tensors({"conv.weight": (3, 3)})))
    tensors = {name: t for name, t in tensors_of("hf_dinov2").items() if "position" not in name}
    assert "nearest is hf-dinov2" in refused(saved(tensors))


def test_every_problem_in_one_sentence(saved, refused):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    tensors |= {"norm.weight": torch.ones(32, dtype=torch.int64), "extra": torch.ones(1), "norm.bias": torch.ones(31)}
    del tensors["blocks.1.ls1.gamma"]
    says = refused(saved(tensors), **DINOV2)
    assert says.startswith(str(saved(tensors)))
    for problem in (
        "norm.weight holds torch.int64, no floating-point numbers",
        "extra [1] is unknown",
        "norm.bias has shape [31], wanted [32]",
        "blocks.1.ls1.gamma is missing",
    ):
        assert problem in says


# Files that are no checkpoints


class Payload:
    """Creates a file when it is unpickled by a reader that runs code."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("hidden", [False, True], ids=["bare", "beside good weights"])
def test_pickled_code_is_not_run(zipped, hidden, saved, refused, tmp_path):
    payload = Payload(tmp_path / "was here")
    content = {"model": tensors_of("deit_base"), "optimizer": payload} if hidden else payload
    source = saved(content, _use_new_zipfile_serialization=zipped)
    says = refused(source, num_heads=2)
    assert "nothing of it was run (it asks for posix.mkdir): save its state_dict alone" in says
    assert not payload.mark.exists()


def replaced(path: Path, new: Path, change) -> Path:
    """Copy a zip archive with other contents of its records."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as archive:
        for name in old.namelist():
            archive.writestr(name, change(name, old.read(name)))
    return new


@pytest.mark.parametrize("attack", ["code", "kind of storage", "cycle", "not a module"])
def test_archive_with_another_pickle(attack, tmp_path, refused):
    source, _ = openai_archive(tmp_path)
    mark = tmp_path / "was here"
    pickles = {
        "code": pickle.dumps(Payload(mark), protocol=2),
        # a tensor of a storage that no reader knows; a module that holds itself; a list
        "kind of storage": b"\x80\x02c__torch__\nM\n)\x81}X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n"
        b"((X\x07\x00\x00\x00storageX\x03\x00\x00\x00FooX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85"
        b"\x89}tRsb.",
        "cycle": b"\x80\x02c__torch__\nM\n)\x81q\x00}X\x01\x00\x00\x00ah\x00sb.",
        "not a module": b"\x80\x02]q\x00.",
    }
    changed = replaced(
        source, tmp_path / "changed.pt", lambda n, data: pickles[attack] if n.endswith("/data.pkl") else data
    )
    says = refused(changed)
    assert "TorchScript archive" in says
    assert not mark.exists()


def test_archive_of_another_network(tmp_path, refused):
    torch.jit.script(nn.Linear(2, 2)).save(tmp_path / "linear.pt")
    assert "only OpenAI's CLIP" in refused(tmp_path / "linear.pt")


LENGTHS = (0, 1, 8, 9, 100, 5000, 50_000, -2000, -1)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("length", LENGTHS)
def test_truncated_files(kind, length, saved, refused):
    name = "weights.safetensors" if kind == "safetensors" else "weights.pth"
    how = {"_use_new_zipfile_serialization": False} if kind == "legacy" else {}
    path = saved(tensors_of("dinov2_vit_mlp_hub"), name, **how)
    path.write_bytes(path.read_bytes()[:length])
    assert str(path) in refused(path, **DINOV2)


def test_damaged_records_of_a_zip(saved, refused):
    path = saved(tensors_of("dinov2_vit_mlp_hub"))
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("weights/data/7")
    data = bytearray(path.read_bytes())
    data[record.header_offset + 200] ^= 1
    path.write_bytes(data)
    assert torch.load(path, weights_only=True)  # torch does not see it
    assert "the checksum of weights/data/7 is wrong" in refused(path, **DINOV2)


@pytest.mark.parametrize("content", [[], torch.ones(2), {"epoch": 3}, {"model": {"epoch": 3}}, 7], ids=str)
def test_no_dictionary_of_tensors(content, saved, refused):
    assert "no dictionary of tensors" in refused(saved(content))


def test_dictionary_that_holds_itself(saved, refused):
    content = {}
    content["model"] = content
    assert "no dictionary of tensors" in refused(saved(content))


def test_names_that_cannot_be_read(saved, refused):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    assert "'two\\nlines'" in refused(saved(tensors | {"two\nlines": torch.ones(1)}), **DINOV2)
    for number in ("99999999999", "9" * 5000, "01", "-1"):
        says = refused(saved(tensors | {f"blocks.{number}.norm1.weight": torch.ones(32)}), **DINOV2)
        assert f"blocks.{number}.norm1.weight [32] is unknown" in says
    assert "block 3 is missing" in refused(saved(tensors | {"blocks.9999.norm1.weight": torch.ones(32)}), **DINOV2)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(32, dtype=torch.int64), "holds torch.int64"),
        (torch.ones(32, dtype=torch.bool), "holds torch.bool"),
        (torch.ones(32, dtype=torch.complex64), "holds torch.complex64"),
        (torch.ones(32).to_sparse(), "holds torch.sparse_coo"),
        (torch.ones(32, device="meta"), "on meta"),
        (torch.tensor(1.0), "wanted at least 1 dimensions"),
        (torch.ones(32, 0), "which is empty"),
        (torch.full((32,), 1 / 3, dtype=torch.float64), "float64 numbers that float32 has not"),
        (torch.full((32,), 1e300, dtype=torch.float64), "float64 numbers that float32 has not"),
    ],
    ids=lambda value: value if isinstance(value, str) else str(value.dtype),
)
def test_tensors_that_no_bundle_can_hold(tensor, says, saved, refused):
    text = refused(saved(tensors_of("dinov2_vit_mlp_hub") | {"norm.weight": tensor}), **DINOV2)
    assert "norm.weight" in text
    assert says in text


@pytest.mark.parametrize("name", ["cls_token", "pos_embed"])
def test_two_tokens_where_one_belongs(name, saved, refused):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    assert "has shape [2," in refused(saved(tensors | {name: torch.cat([tensors[name]] * 2)}), **DINOV2)


# Folders and shards


def shards(folder: Path, tensors: dict[str, torch.Tensor], suffix: str = "safetensors") -> Path:
    """A folder with two shards and their index, as transformers writes them."""
    folder.mkdir()
    first, stem = list(tensors)[::2], "model" if suffix == "safetensors" else "pytorch_model"
    files = [f"{stem}-0000{i}-of-00002.{suffix}" for i in (1, 2)]
    for file, names in zip(files, (first, tensors.keys() - set(first)), strict=True):
        part = {name: tensors[name] for name in names}
        save_file(part, folder / file) if suffix == "safetensors" else torch.save(part, folder / file)
    weight_map = {name: files[name not in first] for name in tensors}
    (folder / f"{stem}.{suffix}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def test_shards_that_lack_or_lead_elsewhere(tmp_path, refused):
    folder = shards(tmp_path / "sharded", tensors_of("dinov2_vit_mlp_hub"))
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    outside = shutil.copy(folder / "model-00001-of-00002.safetensors", tmp_path / "outside.safetensors")
    for file in ("../outside.safetensors", str(outside), "..", "", "model-00003-of-00002.safetensors"):
        index.write_text(json.dumps({"weight_map": content["weight_map"] | {"norm.weight": file}}))
        assert f"names the shard {file!r}, which is not beside it" in refused(folder, **DINOV2)
    for weight_map in ({}, [], {"norm.weight": 3}, None):
        index.write_text(json.dumps({"weight_map": weight_map}))
        assert "lists no shards" in refused(folder, **DINOV2)
    index.write_text("{")
    assert "is not JSON" in refused(folder, **DINOV2)
    index.write_text(
        json.dumps({"weight_map": content["weight_map"] | {"lacking": "model-00001-of-00002.safetensors"}})
    )
    assert "lacks 1 tensors that the index lists, first lacking" in refused(folder, **DINOV2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "which is not beside it" in refused(folder, **DINOV2)


def test_same_tensor_twice(tmp_path, saved, refused):
    tensors = tensors_of("dinov2_vit_mlp_hub")
    folder = shards(tmp_path / "sharded", tensors)
    save_file(tensors, folder / "model-00002-of-00002.safetensors")
    assert "twice, in two files" in refused(folder, **DINOV2)
    both = tensors | {"_fsdp_wrapped_module.norm.weight": torch.ones(32)}
    assert "a tensor twice" in refused(saved(both), **DINOV2)


def test_folders_without_one_checkpoint(tmp_path, saved, refused):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert "holds no weights" in refused(folder)
    for name in ("folder/a.pth", "folder/b.pth"):
        saved(tensors_of("deit_base"), name)
    assert "holds 2 checkpoints (a.pth, b.pth): name one of the files" in refused(folder)
    assert "neither a file nor a folder" in refused(tmp_path / "nothing.pth")


# Requests


@pytest.mark.parametrize(
    ("arch", "says"),
    [
        ("vit_small_reg0_deit3", "family dinov2, not deit3"),
        ("vit_small_reg0", "width 32, not 384, depth 3, not 12, heads 2, not 6"),
        ("vit_small_reg4", "registers 0, not 4; new registers come with --registers"),
        ("vit_nano_reg0", "patch size (14, 14), not (4, 4)"),
        ("vit_giant_reg0", "SwiGLU False, not True"),
    ],
)
def test_wrong_architecture(arch, says, saved, refused):
    text = refused(saved(tensors_of("dinov2_vit_mlp_hub")), arch=arch, num_heads=2)
    assert f"is no {arch}: it has" in text
    assert says in text


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        (dict(arch="vit_smal_reg0"), UnknownArchError, "closest: vit_small_reg0"),
        (dict(format="dinov4"), ConversionError, "no format 'dinov4'; there are openclip-timm"),
        (dict(format="deit3"), ConversionError, "does not fit the format deit3 .* names are nearest to dinov2's"),
        (dict(num_heads=None), ConversionError, "has width 32, .* give --num-heads"),
        (dict(num_heads=5), ConversionError, "does not divide into 5 heads"),
        (dict(num_heads=-2), ConversionError, "does not divide into -2 heads"),
        (dict(act="relu"), ConversionError, "give --act gelu or quick_gelu"),
        (dict(act="quick_gelu"), ConversionError, "has the activation gelu, not quick_gelu: leave --act out"),
        (dict(num_registers=3), ConversionError, "cannot get 3 registers: the table has 0, 1, 2, 4, 8, 16"),
        (dict(num_registers=-1), ConversionError, "cannot get -1 registers"),
        (dict(img_size=57), ConversionError, "does not divide into patches of 14x14"),
        (dict(img_size=0), ConversionError, "img_size must be height and width"),
        (dict(img_size=-14), ConversionError, "img_size must be height and width"),
        (dict(img_size=14 * 10**6), ConversionError, "cannot get positions for an image of"),
    ],
    ids=str,
)
def test_wrong_requests(options, error, says, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    assert re.search(says, refused(source, error, **DINOV2 | options))


@pytest.mark.parametrize("wanted", [0, 1, 8])
def test_registers_cannot_be_replaced(wanted, refused):
    source = GOLDEN / "dinov2_reg4/checkpoint.pth"
    assert f"has 4 registers already; they can be kept, but not replaced by {wanted}" in refused(
        source, num_heads=4, num_registers=wanted
    )


# What no tensor tells


def wide(tensors: dict[str, torch.Tensor], old: int, new: int) -> dict[str, torch.Tensor]:
    """Tensors of the same names for a width that is `new` / `old` times larger."""
    return {n: torch.zeros([s // old * new if s % old == 0 else s for s in t.shape]) for n, t in tensors.items()}


def test_bare_openclip_needs_the_activation(saved, refused):
    says = refused(saved(tensors_of("openclip_vision_gelu")), num_heads=2)
    assert "no tensor tells" in says
    assert "--act gelu" in says
    assert "--act quick_gelu" in says


def test_width_1280_needs_the_heads(saved, refused):
    clip = wide(tensors_of("openclip_vision_gelu"), 32, 1280)
    assert "--num-heads (16 or 20)" in refused(saved(clip, "weights.safetensors"), act="gelu")
    plain = vit(depth=1, dim=1280, **{"head.weight": (2, 1280), "head.bias": (2,)})
    assert "--num-heads (16 or 20)" in refused(saved(plain, "weights.safetensors"))


def test_headless_plain_layout_needs_the_format(saved, refused):
    assert "say which with --format timm, deit or dino" in refused(saved(vit()), num_heads=2)
    scaled = vit() | random_tensors({f"blocks.{i}.ls{j}.gamma": (32,) for i in (0, 1) for j in (1, 2)})
    assert "say which with --format timm or dinov2" in refused(saved(scaled), num_heads=2)


@pytest.mark.parametrize("case", ["hf_vit", "hf_deit", "hf_clip_vision"])
def test_transformers_weights_need_their_config(case, tmp_path, refused):
    alone = shutil.copy(GOLDEN / case / "model/model.safetensors", tmp_path / "alone.safetensors")
    assert "stand in config.json: put that beside the weights, or give the folder" in refused(alone)


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("hf_vit", {"hidden_size": 64}),
        ("hf_vit", {"num_hidden_layers": 2}),
        ("hf_vit", {"patch_size": 8}),
        ("hf_vit", {"num_channels": 1}),
        ("hf_vit", {"intermediate_size": 64}),
        ("hf_vit", {"image_size": 224}),
        ("hf_dinov2", {"use_swiglu_ffn": True}),
        ("hf_dinov2_reg", {"num_register_tokens": 8}),
    ],
    ids=str,
)
def test_config_that_contradicts_the_tensors(case, change, tmp_path, refused):
    assert "but the config beside it says" in refused(with_config(tmp_path, case, change))


def with_config(tmp_path: Path, case: str, change: dict) -> Path:
    folder = shutil.copytree(GOLDEN / case / "model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": "4"},
        {"num_attention_heads": [4]},
        {"num_attention_heads": 2.5},
        {"num_attention_heads": 0},
        {"num_attention_heads": 3},
        {"layer_norm_eps": "small"},
        {"layer_norm_eps": 0},
        {"layer_norm_eps": -1e-6},
        {"layer_norm_eps": float("nan")},
        {"layer_norm_eps": 3e-6},
        {"hidden_act": "mish"},
        {"hidden_act": []},
        {"image_size": [1, 2, 3]},
        {"image_size": 0},
        {"id2label": [1]},
        {"vision_config": None},
    ],
    ids=str,
)
def test_config_that_cannot_be_read(change, tmp_path, refused):
    refused(with_config(tmp_path, "hf_vit", change))


def test_epsilon_left_out_is_that_of_transformers(tmp_path):
    whole = convert(GOLDEN / "hf_vit/model")
    folder = shutil.copytree(GOLDEN / "hf_vit/model", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("layer_norm_eps") == 1e-12
    (folder / "config.json").write_text(json.dumps(config))
    assert convert(folder).residual_scale == whole.residual_scale != 1


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "[" * 10**5], ids=lambda text: text[:4])
def test_config_that_is_no_json_object(text, tmp_path, refused):
    folder = shutil.copytree(GOLDEN / "hf_vit/model", tmp_path / "model")
    (folder / "config.json").write_text(text)
    assert "JSON" in refused(folder)


def timm_folder(tmp_path: Path, *, args: dict | None = None, **change) -> Path:
    """A checkpoint beside a config.json of timm."""
    folder = tmp_path / "timm"
    folder.mkdir()
    save_file(vit(**{"head.weight": (3, 32), "head.bias": (3,)}), folder / "model.safetensors")
    args = dict(embed_dim=32, depth=2, num_heads=2, img_size=64, num_classes=3) | (args or {})
    config = dict(architecture="vit_tiny_patch16_224", model_args=args, pretrained_cfg={"input_size": [3, 64, 64]})
    (folder / "config.json").write_text(json.dumps(config | change))
    return folder


def test_timm_folder(tmp_path):
    assert convert(timm_folder(tmp_path), tmp_path / "out").arch == "vit_tiny_reg0_plain"


@pytest.mark.parametrize(
    "change",
    [
        dict(args={"patch_size": 0}),
        dict(args={"patch_size": 8}),
        dict(args={"img_size": 96}),
        dict(args={"depth": 3}),
        dict(args={"depth": 10**7}),
        dict(args={"embed_dim": 64}),
        dict(args={"mlp_ratio": 2}),
        dict(args={"reg_tokens": 4}),
        dict(args={"act_layer": "nothing"}),
        dict(args={"norm_layer": "rmsnorm"}),
        dict(args={"global_pool": "map"}),
        dict(args={"nothing": 1}),
        dict(args={"features_only": True}),
        dict(args={"pretrained": True}),
        dict(architecture="resnet18"),
        dict(architecture="vit_nothing"),
        dict(architecture="hf-hub:lab/model"),
        dict(architecture=["vit_tiny_patch16_224"]),
        dict(pretrained_cfg="none"),
        dict(pretrained_cfg={"mean": "none"}),
        dict(vitreg=[1]),
        dict(vitreg={"residual_scale": 3}),
        dict(vitreg={"positions": {"nothing": 1}}),
    ],
    ids=str,
)
def test_timm_config_of_another_network(change, tmp_path, refused):
    refused(timm_folder(tmp_path, **change), VitregError)


def test_timm_config_cannot_load_a_file(tmp_path, saved, refused):
    payload = Payload(tmp_path / "was here")
    folder = timm_folder(tmp_path, args={"checkpoint_path": str(saved(payload))})
    assert "checkpoint_path" in refused(folder)
    assert not payload.mark.exists()


def test_positions_that_are_no_square(saved, refused, tmp_path):
    tensors = tensors_of("dinov2_vit_mlp_hub") | {"pos_embed": torch.randn(1, 1 + 6, 32)}
    source = saved(tensors)
    assert "give --img-size HEIGHT,WIDTH" in refused(source, **DINOV2)
    assert convert(source, tmp_path / "out", img_size=(28, 42), **DINOV2).model_args["img_size"] == [28, 42]


# Targets


def test_existing_targets(tmp_path, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("folder", "file", "link"):
        assert "exists: choose another folder" in refused(source, BundleError, tmp_path / name, **DINOV2)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "mine"


def test_target_that_cannot_be_made(tmp_path, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    (tmp_path / "file").write_text("mine")
    assert "cannot write to" in refused(source, BundleError, tmp_path / "file/out", **DINOV2)


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_target_without_permission(tmp_path, saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    (tmp_path / "locked").mkdir(mode=0o500)
    assert "cannot write to" in refused(source, BundleError, tmp_path / "locked/out", **DINOV2)


@pytest.mark.parametrize("full_after", [0, 1, 20])
def test_full_disk(full_after, tmp_path, saved, refused, monkeypatch):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    original, opened = Path.open, []

    def limited(path, mode="r", *args, **kwargs):
        file = original(path, mode, *args, **kwargs)
        if path.name != "model.safetensors" or "w" not in mode:
            return file
        opened.append(path)
        return Limited(file, full_after)

    monkeypatch.setattr(Path, "open", limited)
    assert "No space left on device" in refused(source, BundleError, **DINOV2)
    assert len(opened) == 1


class Limited:
    """A file on a disk that is full after some writes."""

    def __init__(self, file, writes: int):
        self.file, self.writes = file, writes

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, data):
        if not self.writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.writes -= 1
        return self.file.write(data)


def test_limited_file_size(saved, refused):
    source = saved(tensors_of("dinov2_vit_mlp_hub"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))  # Python ignores the signal, so the write fails
    try:
        says = refused(source, BundleError, **DINOV2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert says.endswith("out: File too large.")


def openclip_folder(tmp_path: Path, vision: dict, text: dict) -> Path:
    """A whole OpenCLIP model beside its config."""
    folder = tmp_path / "openclip"
    folder.mkdir()
    shutil.copy(GOLDEN / "openclip_full_plain/checkpoint.safetensors", folder / "open_clip_model.safetensors")
    model = OPENCLIP_CONFIG["model_cfg"]
    model = model | {"vision_cfg": model["vision_cfg"] | vision, "text_cfg": model["text_cfg"] | text}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    return folder


@pytest.mark.parametrize(
    "vision",
    [
        {"width": 64},
        {"layers": [1, 2, 3, 4]},
        {"patch_size": 16},
        {"image_size": 64},
        {"head_width": 0},
        {"head_width": 5},
        {"pool_type": "avg"},
        {"attentional_pool": True},
        {"act_kwargs": {"approximate": "tanh"}},
        {"norm_kwargs": {"eps": 1e-6}},
        {"norm_kwargs": {"elementwise_affine": False}},
        {"timm_model_name": "resnet18"},
        {"timm_model_name": "vit_tiny_patch16_224"},
    ],
    ids=str,
)
def test_openclip_config_of_another_network(vision, tmp_path, refused):
    refused(openclip_folder(tmp_path, vision, {}))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"width": 48}, "does not fit open_clip's model"),
        ({"heads": 7}, "open_clip cannot build"),
        ({"hf_model_name": "lab/none"}, "open_clip cannot build"),  # of which open_clip would download the config
    ],
    ids=str,
)
def test_text_tower_of_another_network(text, says, tmp_path, refused):
    folder = openclip_folder(tmp_path, {}, text)
    assert says in refused(folder, text_tower=True)
    assert convert(folder, tmp_path / "out").spec.family == "clip_quickgelu"


def test_text_tower_where_there_is_none(refused):
    source = GOLDEN / "openclip_vision_gelu/checkpoint.safetensors"
    assert "has no text tower" in refused(source, num_heads=2, act="gelu", text_tower=True)
    source = GOLDEN / "dinov2_vit_mlp_hub/checkpoint.pth"
    assert "only OpenCLIP's text towers are kept" in refused(source, num_heads=2, text_tower=True)


def test_full_disk_under_the_text_tower_leaves_neither_folder(tmp_path, refused, monkeypatch):
    source = shutil.copy(GOLDEN / "openclip_full_plain/checkpoint.safetensors", tmp_path / "clip.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPENCLIP_CONFIG))
    original = Path.open

    def limited(path, mode="r", *args, **kwargs):
        file = original(path, mode, *args, **kwargs)
        return Limited(file, 1) if path.name == "open_clip_model.safetensors" and "w" in mode else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", limited)
        assert "No space left on device" in refused(source, BundleError, text_tower=True)
    before = set(tmp_path.iterdir())
    convert(source, tmp_path / "out", text_tower=True)
    made = set(tmp_path.iterdir()) - before
    assert len(made) == 2
    shutil.rmtree(tmp_path / "out")
    assert "exists: choose another folder" in refused(source, BundleError, text_tower=True)


# Containers


@pytest.fixture(scope="module")
def dinov2():
    """Weights, and the bundle that they make."""
    tensors = tensors_of("dinov2_vit_mlp_hub")
    return tensors, convert(GOLDEN / "dinov2_vit_mlp_hub/checkpoint.pth", **DINOV2)


def assert_same(bundle: ModelBundle, wanted: ModelBundle) -> None:
    assert bundle.state_dict.keys() == wanted.state_dict.keys()
    for name, tensor in wanted.state_dict.items():
        assert torch.equal(bundle.state_dict[name], tensor), name


CONTAINERS = {
    "flat": lambda t: t,
    "state_dict": lambda t: {"state_dict": t, "epoch": 3, "name": "run"},
    "model": lambda t: {"model": t, "args": argparse.Namespace(lr=1e-3), "optimizer": {"state": {}}, "epoch": 3},
    "student and teacher": lambda t: {"student": {n: x + 1 for n, x in t.items()}, "teacher": t},
    "nested": lambda t: {"model": {"state_dict": t}, "loss": torch.ones(1)},
    "module": lambda t: {f"module.{n}": x for n, x in t.items()},
    "module of compiled": lambda t: {f"module._orig_mod.{n}": x for n, x in t.items()},
    "compiled module": lambda t: {f"_orig_mod.module.{n}": x for n, x in t.items()},
    "fsdp": lambda t: {n.replace("blocks.1.", "blocks.1._fsdp_wrapped_module."): x for n, x in t.items()},
    "parameters": lambda t: {n: nn.Parameter(x) for n, x in t.items()},
    "views": lambda t: {n: x.repeat(*[1] * (x.ndim - 1), 2)[..., : x.shape[-1]] for n, x in t.items()},
    "float64": lambda t: {n: x.double() for n, x in t.items()},
}


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("container", CONTAINERS)
def test_containers(container, zipped, dinov2, saved, tmp_path):
    tensors, wanted = dinov2
    source = saved(CONTAINERS[container](tensors), _use_new_zipfile_serialization=zipped)
    assert_same(convert(source, tmp_path / "out", **DINOV2), wanted)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_shards(suffix, dinov2, tmp_path):
    tensors, wanted = dinov2
    folder = shards(tmp_path / "sharded", tensors, suffix)
    for source in (folder, next(folder.glob("*.index.json"))):
        assert_same(convert(source, **DINOV2), wanted)


def test_folder_prefers_safetensors(dinov2, tmp_path, saved):
    tensors, wanted = dinov2
    saved({name: t + 1 for name, t in tensors.items()}, "folder/pytorch_model.bin")
    saved(Payload(tmp_path / "was here"), "folder/optimizer.pt")
    saved(tensors, "folder/model.safetensors")
    assert_same(convert(tmp_path / "folder", **DINOV2), wanted)


# OpenAI's archive


class Tree(nn.Module):
    """Modules that hold tensors by the names of a state dict."""

    def __init__(self, tensors: dict[str, torch.Tensor]):
        super().__init__()
        for name in {name.partition(".")[0] for name in tensors}:
            inner = {n.partition(".")[2]: t for n, t in tensors.items() if n.partition(".")[0] == name}
            if "" not in inner:
                self.add_module(name, Tree(inner))
            elif inner[""].is_floating_point():
                self.register_parameter(name, nn.Parameter(inner[""]))
            else:
                self.register_buffer(name, inner[""])

    def forward(self) -> torch.Tensor:
        raise RuntimeError("the archive's code ran")


def openai_archive(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A TorchScript archive with the names, the types and the numbers of OpenAI's, and its tensors."""
    tensors = {name: t.half() for name, t in tensors_of("openclip_full_plain").items()}
    tensors |= {"input_resolution": torch.tensor(32), "context_length": torch.tensor(8), "vocab_size": torch.tensor(64)}
    path = tmp_path / "ViT-B-32.pt"
    torch.jit.save(torch.jit.script(Tree(tensors)), path)
    return path, tensors


def test_openai_archive_without_its_code(tmp_path, monkeypatch):
    source, tensors = openai_archive(tmp_path)
    loaded = torch.jit.load(source).state_dict()
    monkeypatch.setattr(torch.jit, "load", lambda *_, **__: pytest.fail("torch.jit.load was used"))
    nonsense = replaced(source, tmp_path / "code.pt", lambda name, data: b"no code (" if "/code/" in name else data)
    bundles = [convert(path, num_heads=4) for path in (source, nonsense)]
    for bundle in bundles:
        assert bundle.arch == "vit_base_reg0_clip_quickgelu"
        assert bundle.provenance.settings["conversion"]["format"] == "openai"
        half = {name: t for name, t in tensors.items() if t.is_floating_point()}
        save_file(half, tmp_path / "half.safetensors")
        assert_same(bundle, convert(tmp_path / "half.safetensors", format="openai", num_heads=4))
    for name, tensor in loaded.items():
        if name.startswith("visual.transformer.resblocks.0.mlp.c_fc"):
            ours = bundles[0].state_dict[name.replace("visual.transformer.resblocks", "blocks").replace("c_fc", "fc1")]
            assert torch.equal(ours, tensor.float())


def test_every_tensor_of_an_archive(tmp_path):
    from vitreg_hub.conversion.source import open_checkpoint

    source, tensors = openai_archive(tmp_path)
    checkpoint = open_checkpoint(source)
    assert checkpoint.container == "torchscript"
    assert checkpoint.infos.keys() == tensors.keys()
    for name, tensor in torch.jit.load(source).state_dict().items():
        assert torch.equal(checkpoint.read(name), tensor.float()), name


# The Hub


def put(hub, repo: str, files: dict[str, bytes]) -> None:
    """Publish files with the real client."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    api.create_repo(repo, exist_ok=True)
    api.create_commit(repo, [CommitOperationAdd(name, data) for name, data in files.items()], commit_message="files")


def test_hub_prefers_safetensors_and_works_offline(hub, dinov2, saved, tmp_path, monkeypatch):
    tensors, wanted = dinov2
    other = saved({name: t + 1 for name, t in tensors.items()}, "pytorch_model.bin").read_bytes()
    files = {"model.safetensors": saved(tensors, "model.safetensors").read_bytes(), "pytorch_model.bin": other}
    put(hub, "lab/both", files)
    assert_same(convert("hf-hub:lab/both", tmp_path / "first", **DINOV2), wanted)
    assert not any("pytorch_model.bin" in str(request) for request in hub.requests if "/resolve/" in str(request))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    requests = len(hub.requests)
    offline = convert("hf-hub:lab/both", **DINOV2)
    assert_same(offline, wanted)
    assert offline.provenance.settings["conversion"]["source"] == "hf-hub:lab/both"
    assert len(hub.requests) == requests


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_hub_with_shards(suffix, hub, dinov2, tmp_path):
    tensors, wanted = dinov2
    folder = shards(tmp_path / "sharded", tensors, suffix)
    put(hub, "lab/sharded", {path.name: path.read_bytes() for path in folder.iterdir()})
    assert_same(convert("hf-hub:lab/sharded", **DINOV2), wanted)


def test_hub_with_a_pickle_alone_and_a_config(hub, tmp_path, saved):
    model = GOLDEN / "hf_vit/model"
    pickled = saved(load_file(model / "model.safetensors"), "pytorch_model.bin").read_bytes()
    put(hub, "lab/pickle", {"pytorch_model.bin": pickled, "config.json": (model / "config.json").read_bytes()})
    assert_same(convert("hf-hub:lab/pickle"), convert(model))


def test_hub_without_what_is_asked_for(hub, saved, refused):
    assert "no repository lab/nothing" in refused("hf-hub:lab/nothing", HubError)
    put(hub, "lab/empty", {"notes.txt": b"nothing"})
    assert "hf-hub:lab/empty holds no weights" in refused("hf-hub:lab/empty")
    assert "no such branch" in refused("hf-hub:lab/empty@elsewhere", HubError)


@pytest.mark.parametrize("text", ['{"weight_map": {"a": "../b"}}', '{"weight_map": {"a": 1}}'])
def test_hub_with_a_damaged_index(text, hub, refused):
    put(hub, "lab/index", {"model.safetensors.index.json": text.encode()})
    refused("hf-hub:lab/index")
