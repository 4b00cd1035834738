"""Commands that read pictures: `vitreg predict` and `vitreg features`."""

import csv
import json

import pytest

from vitreg_hub.cli import main
from vitreg_hub.evaluation.feature_files import load_features
from vitreg_hub.images.embedded import digits

MODEL = "vit_nano_reg4.digits"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Three digits."""
    folder = tmp_path_factory.mktemp("drawn")
    for i, row in enumerate(digits("test").select(range(3))):
        row["image"].save(folder / f"{i}.png")
    return folder


def test_predict(drawn, tmp_path, capsys):
    names = [str(row["label"]) for row in digits("test").select(range(3))]
    main(["predict", MODEL, str(drawn), "--top", "2"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["image", "probability", "class"]
    assert [line.split()[0] for line in lines[::2]] == [str(drawn / f"{i}.png") for i in range(3)]
    assert [line.split()[-1] for line in lines[::2]] == names
    files = [str(file) for file in sorted(drawn.iterdir())]
    main(["predict", MODEL, *files, "--top", "2", "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert [entry["guesses"][0]["name"] for entry in told] == names
    main(["predict", MODEL, *files, "--top", "2", "--format", "csv", "--out", str(tmp_path / "told.csv")])
    assert capsys.readouterr().out.startswith("classes of 3 pictures ")
    rows = list(csv.DictReader((tmp_path / "told.csv").open()))
    assert [(row["image"], row["rank"]) for row in rows] == [(file, rank) for file in files for rank in "12"]
    assert [row["name"] for row in rows[::2]] == names
    assert float(rows[0]["probability"]) == pytest.approx(told[0]["guesses"][0]["probability"], abs=1e-6)


def test_features(tmp_path, capsys):
    line = ["features", MODEL, "--images", "digits", "--max-images", "6", "--out", str(tmp_path / "out")]
    main([*line, "--kind", "dense", "--dtype", "float16", "--img-size", "16"])
    assert capsys.readouterr().out.splitlines() == [
        "features 6 images, 4 x 4 x 128 numbers each, in 1 files",
        f"index    {tmp_path}/out/index.json",
    ]
    assert load_features(tmp_path / "out").features.shape == (6, 4, 4, 128)
    with pytest.raises(SystemExit) as done:
        main(line)
    assert str(done.value.code).startswith(f"vitreg: {tmp_path}/out holds features of another preprocessing (")


def test_nothing_could_be_read(tmp_path, capsys):
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(SystemExit) as done:
        main(["predict", MODEL, str(tmp_path), "--out", str(tmp_path / "told")])
    assert done.value.code == f"vitreg: none of the pictures of {tmp_path} could be read: give others."
    assert not (tmp_path / "told").exists()
