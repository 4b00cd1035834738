"""What a model's own head tells of pictures."""

import logging

import pytest
import timm
import torch
from models import random_bundle

from vitreg_hub.any_vit import open_vit
from vitreg_hub.errors import DataError
from vitreg_hub.evaluation.labels import class_names, in_words
from vitreg_hub.evaluation.predict import predict
from vitreg_hub.images.embedded import digits

SHIPPED = "vit_nano_reg4.digits"


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """Forty digits that the model was not trained on, in files that begin with what they show."""
    folder = tmp_path_factory.mktemp("drawn")
    for i, row in enumerate(digits("test").select(range(40))):
        row["image"].save(folder / f"{row['label']}-{i}.png")
    return folder


def test_shipped_model_recognises_digits(drawn):
    assert class_names(open_vit(SHIPPED).model) == tuple("0123456789")
    told = predict(SHIPPED, drawn, top=3, progress=False)
    assert [prediction.image for prediction in told] == sorted(str(file) for file in drawn.iterdir())
    right = [prediction.guesses[0].name == prediction.image.removeprefix(f"{drawn}/")[0] for prediction in told]
    assert sum(right) >= 38
    assert {len(prediction.guesses) for prediction in told} == {3}


def test_probabilities_are_the_softmax_of_the_model():
    model, images = random_bundle().build(), torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        wanted = model(images).softmax(dim=1)
    told = predict(model, images, top=99, batch_size=2, progress=False)
    assert [prediction.image for prediction in told] == ["0", "1", "2", "3", "4"]
    for prediction, row in zip(told, wanted, strict=True):
        assert [guess.number for guess in prediction.guesses] == row.argsort(descending=True).tolist()
        assert [guess.name for guess in prediction.guesses] == [f"class {guess.number}" for guess in prediction.guesses]
        found = torch.tensor([guess.probability for guess in prediction.guesses])
        assert torch.allclose(found, row.sort(descending=True).values, atol=1e-6)


def test_several_files_and_one_are_read_as_their_folder_is(drawn):
    files = sorted(map(str, drawn.iterdir()))[:2]
    of_folder = predict(SHIPPED, drawn, progress=False)[:2]
    for told in (predict(SHIPPED, files, progress=False), [*predict(SHIPPED, files[0], progress=False), of_folder[1]]):
        for a, b in zip(told, of_folder, strict=True):
            assert a.image == b.image
            assert a.guesses[0].name == b.guesses[0].name
            assert a.guesses[0].probability == pytest.approx(b.guesses[0].probability, abs=1e-5)


def test_unreadable_pictures_are_left_out(drawn, tmp_path, caplog):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    good = sorted(map(str, drawn.iterdir()))[0]
    with caplog.at_level(logging.WARNING):
        (told,) = predict(SHIPPED, [broken, good, tmp_path / "missing.png"], progress=False)
    assert told.image == good
    assert [record.message.partition(" of the list ")[0] for record in caplog.records] == [
        "left out: image 0",
        "left out: image 2",
    ]
    with pytest.raises(DataError, match=r"none of the pictures of .* could be read"):
        predict(SHIPPED, tmp_path, progress=False)


def test_names_of_a_head_that_was_replaced_are_not_used():
    model = timm.create_model(SHIPPED, pretrained=True)
    assert class_names(model) == tuple("0123456789")
    model.reset_classifier(3)
    (told,) = predict(model, torch.randn(1, 3, 32, 32), progress=False)
    assert {guess.name for guess in told.guesses} == {"0", "1", "2"}
    assert class_names(model) == ()


def test_imagenet_is_told_in_words():
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    assert in_words(class_names(model)[1]) == "goldfish, Carassius auratus (n01443537)"
    assert in_words("n00000000") == "n00000000"


def test_mistakes():
    images = torch.randn(1, 3, 32, 32)
    with pytest.raises(DataError, match="without classes cannot classify: give a model with a head"):
        predict(random_bundle(num_classes=0).build(), images, progress=False)
    with pytest.raises(DataError, match="top is 0"):
        predict(SHIPPED, images, top=0)
    with pytest.raises(DataError, match=r"there are no images 'nowhere\.png'"):
        predict(SHIPPED, "nowhere.png")
