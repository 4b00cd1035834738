"""One picture at a time: what a stranger's file can do, and pictures made of what a network takes."""

import os
import resource
import zlib

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from vitreg_hub.errors import DataError
from vitreg_hub.images.pictures import BROKEN, Gray, displayable, read_rgb

TEAL = (0, 70, 72)


def flat_png(side: int, padding: int = 0) -> bytes:
    """A PNG of one colour, however large."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 0, 0, 0, 0])
    packer = zlib.compressobj(9)
    pixels = b"".join(packer.compress(bytes(side + 1)) for _ in range(side)) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [6000, 13_000, 20_000])
def test_decompression_bombs_are_not_unpacked(side, tmp_path):
    bomb = flat_png(side)
    assert len(bomb) < 2**19
    (tmp_path / "bomb.png").write_bytes(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for value in ({"bytes": bomb, "path": None}, tmp_path / "bomb.png"):
        with pytest.raises(BROKEN, match="decompression bomb"):
            read_rgb(value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_large_photographs_and_flat_drawings_are_read():
    noise = Image.effect_noise((4200, 4200), 90)
    file = os.path.join("/dev/shm" if os.path.isdir("/dev/shm") else "/tmp", f"noise-{os.getpid()}.jpg")
    try:
        noise.save(file, quality=30)
        assert read_rgb(file).size == (4200, 4200)
    finally:
        os.remove(file)
    assert read_rgb({"bytes": flat_png(4000), "path": None}).size == (4000, 4000)


def test_what_is_no_ordinary_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("/dev/zero")
    (tmp_path / "c.png").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        with pytest.raises(ValueError, match="not an ordinary file"):
            read_rgb(tmp_path / name)


def test_postscript_is_not_run(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.png")
    with pytest.raises(OSError, match="cannot identify image file"):
        read_rgb(tmp_path / "a.png")


def test_rows_name_files_of_their_own_folder_only(tmp_path, monkeypatch):
    mine, others = tmp_path / "mine", tmp_path / "others"
    for folder in (mine / "deep", others):
        folder.mkdir(parents=True)
        Image.new("RGB", (2, 2), TEAL).save(folder / "a.png")
    (mine / "link.png").symlink_to(others / "a.png")

    def pixel(path, within=str(mine)):
        return read_rgb({"bytes": None, "path": str(path)}, within=within).getpixel((0, 0))

    assert pixel(mine / "deep/a.png") == pixel("deep/a.png") == pixel("deep/../deep/a.png") == TEAL
    monkeypatch.chdir(tmp_path)
    assert pixel("mine/deep/a.png") == pixel("mine/deep/a.png", "mine") == TEAL
    assert pixel(others / "a.png", None) == TEAL
    elsewhere = (others / "a.png", "../others/a.png", "link.png", "/etc/passwd", "http://127.0.0.1:1/a.png")
    for path in (*elsewhere, f"file://{mine}/deep/a.png"):
        with pytest.raises(DataError, match=r"train with data\.allow_remote if you trust"):
            pixel(path)
    with pytest.raises(FileNotFoundError):
        pixel("deep/missing.png")


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        "hf://datasets/lab/other@main/a.png",
        "hf://datasets/lab/set@main/../../private/a.png",
        "file:///etc/passwd::hf://datasets/lab/set@main/a.zip",
        "zip://a.png::file:///etc/a.zip",
        "https://huggingface.co/datasets/lab/set@main/a.png",
    ],
)
def test_rows_of_the_hub_name_files_of_their_own_repository_only(path):
    with pytest.raises(DataError, match="not below hf://datasets/lab/set@"):
        read_rgb({"bytes": None, "path": path}, within="hf://datasets/lab/set@")


def transform_of(mean, std):
    return create_transform(input_size=(3, 8, 8), mean=mean, std=std, crop_pct=1.0)


@pytest.mark.parametrize("color", [TEAL, (0, 0, 0), (255, 255, 255), (200, 30, 90)])
@pytest.mark.parametrize(
    ("mean", "std"),
    [((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)), ((0.5,) * 3, (0.5,) * 3), ((0.0,) * 3, (1.0,) * 3)],
)
def test_a_flat_picture_comes_back_as_it_was(color, mean, std):
    picture = Image.new("RGB", (8, 8), color)
    shown = displayable(transform_of(mean, std)(picture), mean, std)
    assert np.abs(shown * 255 - color).max() < 1
    gray = displayable(Gray(transform=transform_of(mean, std))(picture), mean, std)
    assert np.abs(gray * 255 - picture.convert("L").getpixel((0, 0))).max() < 1


def test_channels_without_a_normalisation_are_stretched():
    image = torch.linspace(-3, 5, 4 * 6).reshape(4, 2, 3)
    shown = displayable(image, None, None)
    assert shown.shape == (2, 3, 3)
    assert (shown[..., 0] == shown[..., 2]).all()
    assert 0 <= shown.min() < shown.max() <= 1
    assert displayable(torch.zeros(3, 2, 2), None, None).max() == 0
