"""Networks and files that `convert` refuses, with one sentence and without a trace on disk."""

import bz2
import gzip
import io
import lzma
import pickle
import re
import tarfile
import zipfile

import pytest
import torch
from checkpoints import DINOV2, Payload, openai_archive, random_tensors, replaced, tensors_of, vit
from torch import nn

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


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize("hidden", [False, True], ids=["bare", "beside good weights"])
def test_pickled_code_is_not_run(zipped, hidden, saved, refused, tmp_path):
    payload = Payload(tmp_path / "was here")
    content = {"model": tensors_of("deit_base"), "optimizer": payload} if hidden else payload
    source = saved(content, _use_new_zipfile_serialization=zipped)
    says = refused(source, num_heads=2)
    assert "nothing of it was run (it asks for posix.mkdir): save its state_dict alone" in says
    assert not payload.mark.exists()


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


def in_zip(content: bytes, name: str = "w.pth") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, content)
    return file.getvalue()


def in_tar(content: bytes, name: str = "w.pth") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


def checkpoint_bytes() -> bytes:
    file = io.BytesIO()
    torch.save(vit(), file)
    return file.getvalue()


POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 346292833\n".encode()
OTHERS = {
    "lfs.pth": (POINTER, "is a Git LFS pointer: run `git lfs pull`"),
    "lfs.safetensors": (POINTER, "is a Git LFS pointer: run `git lfs pull`"),
    "page.pth": (b"\n<!DOCTYPE html><html><body>Access denied</body></html>", "is a web page, .* /resolve/"),
    "denied.bin": (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
    "error.bin": (b'{"error": "Repository not found"}', "is JSON text"),
    "text.pth": (b"Entry not found, sorry", "is text that begins with 'Entry not found, sorry'"),
    "empty.safetensors": (b"", "is empty"),
    "ViT-B_16.npz": (in_zip(b"", "cls.npy"), r"is a numpy archive \(.npz\).* timm reads"),
    "flax_model.msgpack": (b"\x82\xa6params\x80" + b"x" * 99, "is MessagePack .*Flax.*: take model.safetensors"),
    "large.msgpack": (b"\xde\x00\x20\xa6params\x80" + b"x" * 99, "is MessagePack .*Flax"),
    "tf_model.h5": (b"\x89HDF\r\n\x1a\n" + bytes(200), "is HDF5 .*Keras.*: take model.safetensors"),
    "weights.tar": (in_tar(checkpoint_bytes()), "is a tar archive that holds w.pth: unpack it"),
    "weights.pth": (
        in_tar(checkpoint_bytes(), "a\x1b/w.pth"),
        r"is a tar archive that holds 'a\\x1b/w.pth': unpack it",
    ),
    "weights.zip": (in_zip(checkpoint_bytes()), "is a zip archive that holds w.pth: unpack it"),
    "weights.pth.gz": (gzip.compress(checkpoint_bytes()), "is a gzip archive: unpack it"),
    "weights.pth.xz": (lzma.compress(b"x"), "is an xz archive: unpack it"),
    "weights.pth.bz2": (bz2.compress(b"x"), "is a bzip2 archive: unpack it"),
    "picture.bin": (b"\x89PNG\r\n\x1a\n" + bytes(99), "is a picture"),
    "__0_0.distcp": (checkpoint_bytes(), "is a part of a distributed checkpoint .*: give its folder"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_files_of_another_kind_are_told_what_they_are(name, tmp_path, refused):
    content, says = OTHERS[name]
    (tmp_path / name).write_bytes(content)
    assert re.search(f"^{tmp_path / name} {says}", refused(tmp_path / name))


RUNS = {
    "dcp": ((".metadata", "__0_0.distcp"), r"dcp_to_torch \S+/run OUT.pth"),
    "accelerate": (("optimizer_0/__0_0.distcp", "pytorch_model_fsdp_0/__0_0.distcp"), "run/pytorch_model_fsdp_0 OUT"),
    "deepspeed": (("latest", "global_step10/mp_rank_00_model_states.pt"), "a run of DeepSpeed: .*zero_to_fp32"),
    "ranks": (("w.rank_0.pth", "w.rank_1.pth"), "merge the ranks"),
    "flax": (("config.json", "flax_model.msgpack"), "no weights of torch, only flax_model.msgpack"),
    "deeper": (
        ("args.yaml", "checkpoint-5/model.safetensors"),
        "folders in it do: give checkpoint-5/model.safetensors",
    ),
}


@pytest.mark.parametrize("run", RUNS)
def test_folders_of_another_kind_are_told_what_they_are(run, tmp_path, refused):
    files, says = RUNS[run]
    for name in files:
        (tmp_path / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "run" / name).write_bytes(b"x")
    assert re.search(says, refused(tmp_path / "run"))


LENGTHS = (0, 1, 8, 9, 100, 5000, 50_000, -2000, -1)


@pytest.mark.parametrize("kind", ["zip", "legacy", "safetensors"])
@pytest.mark.parametrize("length", LENGTHS)
def test_truncated_files(kind, length, saved, refused):
    name = "weights.safetensors" if kind == "safetensors" else "weights.pth"
    how = {"_use_new_zipfile_serialization": False} if kind == "legacy" else {}
    path = saved(tensors_of("dinov2_vit_mlp_hub"), name, **how)
    path.write_bytes(path.read_bytes()[:length])
    assert str(path) in refused(path, **DINOV2)


def test_records_that_are_not_where_the_directory_says(saved, refused):
    path = saved(tensors_of("dinov2_vit_mlp_hub"))
    with zipfile.ZipFile(path) as archive:
        record = archive.getinfo("weights/data/7")
    data = bytearray(path.read_bytes())
    data[record.header_offset + 28] ^= 4  # the length of the field before the numbers
    path.write_bytes(data)
    moved = torch.load(path, weights_only=True, mmap=True)  # torch does not see it
    assert not all(torch.equal(tensor, moved[name]) for name, tensor in tensors_of("dinov2_vit_mlp_hub").items())
    assert "weights/data/7 is not where the directory says" in refused(path, **DINOV2)


def test_damaged_description_of_the_tensors(saved, refused):
    path = saved(tensors_of("dinov2_vit_mlp_hub"))
    data = bytearray(path.read_bytes())
    position = data.index(b"blocks.0.norm1.weight")
    data[position] ^= 1
    path.write_bytes(data)
    assert "CRC" in refused(path, **DINOV2)


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
    assert "longer than 300 characters" in refused(saved(tensors | {f"blocks.{'9' * 5000}.x": torch.ones(1)}), **DINOV2)
    for number in ("99999999999", "01", "-1"):
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
        (torch.full((32,), 1 / 3, dtype=torch.float64), "float64 numbers that float32 cannot hold"),
        (torch.full((32,), 1e300, dtype=torch.float64), "float64 numbers that float32 cannot hold"),
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
