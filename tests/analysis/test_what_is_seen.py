"""The pictures that an analysis looks at: what is shown of them, their channels, and how far shares depend on them."""

import json

import numpy as np
import pytest
import timm
import torch
from models import TINY, random_bundle
from PIL import Image
from planted import planted
from reports import report as synthetic_report
from reports import with_cutoff

from vitreg_hub.analysis.figures.maps import token_figure
from vitreg_hub.analysis.many import analyze_all
from vitreg_hub.analysis.measures import analyze, outlier_places, patch_norms, token_examples
from vitreg_hub.analysis.meters.histogram import EDGES, NUM_BINS, bins_of
from vitreg_hub.analysis.meters.outliers import find_cutoff
from vitreg_hub.analysis.meters.places import PlaceMeter
from vitreg_hub.analysis.report.write import draw_attention
from vitreg_hub.analysis.results import Cutoff, load_reports, to_json
from vitreg_hub.analysis.wording import verdict
from vitreg_hub.any_vit import open_vit
from vitreg_hub.cli import main
from vitreg_hub.errors import DataError
from vitreg_hub.tokens import TokenOrder

TEAL = (0, 70, 72)


@pytest.fixture
def teal(tmp_path):
    file = tmp_path / "teal.png"
    Image.new("RGB", (40, 40), TEAL).save(file)
    return file


def vit_of(in_chans, **options):
    return timm.create_model("vit_base_patch16_siglip_224", img_size=32, in_chans=in_chans, **TINY, **options)


def has_colour(figure, color):
    """Whether a good part of a PNG has a colour, up to two steps of 255."""
    with Image.open(figure) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    return (np.abs(pixels - color).max(-1) <= 2).mean() > 0.02


def test_dark_pictures_are_shown_dark(teal, tmp_path):
    bundle = random_bundle("vit_nano_reg4").save(tmp_path / "bundle")
    (example,) = token_examples(bundle, [Image.open(teal)], number=1)
    assert np.abs(example.image * 255 - TEAL).max() < 2
    assert has_colour(draw_attention(bundle, [teal], tmp_path / "attention.png"), TEAL)
    vit = open_vit(bundle)
    images = vit.transform(Image.open(teal).convert("RGB"))[None]
    assert has_colour(token_figure(vit.model, images, file=tmp_path / "tokens.png"), TEAL)
    (from_tensor,) = token_examples(vit.model, images, number=1)
    assert np.abs(from_tensor.image * 255 - TEAL).max() < 2


def test_one_channel_sees_grey_pictures(teal, tmp_path):
    vit, gray = vit_of(1), Image.open(teal).convert("L").getpixel((0, 0))
    opened = open_vit(vit)
    assert opened.in_chans == 1
    assert opened.preprocessing.startswith("grey, ")
    images = opened.transform(Image.open(teal))
    assert images.shape == (1, 32, 32)
    mean, std = (torch.tensor(vit.pretrained_cfg[key]).mean() for key in ("mean", "std"))
    assert torch.allclose(images, (gray / 255 - mean) / std, atol=1e-5)
    (example,) = token_examples(vit, [Image.open(teal)], number=1)
    assert np.abs(example.image * 255 - gray).max() < 2
    found = analyze(vit, "digits", max_images=8, num_examples=1)
    assert found.images.num_images == 8
    assert analyze(vit, torch.randn(4, 1, 32, 32)).images.num_images == 4


@pytest.mark.parametrize("in_chans", [2, 4, 6, 13])
def test_other_channels_come_as_tensors(in_chans, teal, tmp_path):
    vit = vit_of(in_chans)
    for images in ("digits", [Image.open(teal)], torch.randn(4, 3, 32, 32)):
        with pytest.raises(
            DataError, match=rf"takes images of {in_chans} channels, but .*give a tensor \[N, {in_chans}"
        ):
            analyze(vit, images)
    with pytest.raises(DataError, match=f"takes images of {in_chans} channels, but these are pictures of 3"):
        draw_attention(vit, [teal], tmp_path / "maps.png")
    found = analyze(vit, torch.randn(4, in_chans, 32, 32), num_examples=1)
    assert found.images.num_images == 4
    (example,) = found.examples
    assert example.image.shape == (32, 32, 3)
    assert (example.image[..., 0] == example.image[..., 1]).all()


def test_lists_of_tensors_and_arrays_are_images():
    vit, images = vit_of(3), torch.randn(4, 3, 32, 32)
    wanted = patch_norms(vit, images)
    for form in (list(images), tuple(images), images.numpy(), list(images.double().numpy())):
        assert patch_norms(vit, form) == wanted
    bytes_of = np.random.default_rng(0).integers(0, 256, (3, 40, 40, 3), dtype=np.uint8)
    wanted = patch_norms(vit, [Image.fromarray(pixels) for pixels in bytes_of])
    assert patch_norms(vit, bytes_of) == patch_norms(vit, list(bytes_of)) == wanted
    with pytest.raises(DataError, match=r"the images have the shapes \(3, 24, 32\) and \(3, 32, 32\): resize or crop"):
        patch_norms(vit, [images[0], images[0, :, 8:]])


def test_large_networks_see_whole_pictures():
    vit = timm.create_model("vit_base_patch16_siglip_224", img_size=272, **TINY)
    found = analyze(vit, num_examples=0)
    assert (found.images.name, found.images.num_images) == ("photos", 15)
    assert any("15 whole pictures" in note for note in found.notes)
    assert not any("tiles of 15" in note for note in found.notes)
    assert found.places.num_pictures == 15
    assert analyze(vit_of(3), num_examples=0, max_images=30).images.num_images == 30


def places_of(outliers, labels=None, *, portions=1, **options):
    """What is found at places [N, P], in several portions of images."""
    meters = []
    for part in np.array_split(np.arange(len(outliers)), portions):
        meter = PlaceMeter(**options)
        marked = torch.from_numpy(outliers[part])
        seen = type("Seen", (), {"order": TokenOrder(num_class=1, grid=(1, outliers.shape[1]))})
        meter.update(seen, torch.from_numpy(part), None if labels is None else torch.from_numpy(labels[part]), marked)
        meters.append(meter)
    first, *others = meters
    for other in others:
        first.merge(other)
    return first.result()


def test_the_interval_is_that_of_a_bootstrap_over_pictures():
    rng = np.random.default_rng(1)
    share = rng.gamma(0.5, 0.1, 12).clip(0, 0.8)
    labels = np.repeat(np.arange(12), rng.integers(2, 9, 12))
    outliers = rng.random((len(labels), 50)) < share[labels][:, None]
    for by_label, groups in ((False, np.arange(len(labels))), (True, labels)):
        found = places_of(outliers, labels, by_label=by_label)
        number = len(np.unique(groups))
        assert found.num_pictures == number
        drawn = []
        for _ in range(2000):
            chosen = rng.integers(0, number, number)
            drawn.append(outliers[np.concatenate([np.flatnonzero(groups == c) for c in chosen])].mean())
        assert found.interval == pytest.approx(np.quantile(drawn, (0.025, 0.975)), rel=0.1)
        assert places_of(outliers, labels, by_label=by_label, portions=5) == found
        assert places_of(outliers, labels, by_label=by_label, seed=1).interval != found.interval
    assert places_of(np.zeros((3, 4), dtype=bool)).interval is None


def test_the_interval_and_the_gap_are_said():
    truth = planted()
    found = analyze(truth.model, truth.data, batch_size=32)
    low, high = found.places.interval
    assert low < found.outlier_fraction[2] < high
    below, above = found.blocks[2].cutoff.gap
    assert below < found.cutoff[2] < above
    said = verdict(found)
    assert f"would have {100 * low:.3g} % to {100 * high:.3g} % (95 % interval)" in said
    assert f"norms up to {below:.3g}, outliers from {above:.3g}" in said
    again = outlier_places(truth.model, truth.data, batch_size=7)
    assert again.interval == found.places.interval


def test_the_gap_ends_at_the_norms_beside_the_cutoff():
    rng = np.random.default_rng(0)
    norms = np.concatenate([rng.uniform(35, 45, 9000), rng.uniform(80, 110, 20), rng.uniform(180, 260, 300)])
    counts = np.bincount(bins_of(norms), minlength=NUM_BINS)
    cutoff = find_cutoff(counts)
    below, above = norms[norms <= cutoff.value].max(), norms[norms > cutoff.value].min()
    assert below <= cutoff.gap[0] <= below * 1.012
    assert above / 1.012 <= cutoff.gap[1] <= above
    assert cutoff.gap[0] in EDGES


def test_reports_of_older_versions_are_read(tmp_path):
    found = with_cutoff(synthetic_report(), Cutoff(value=100.0, source="found", why="the norms have two modes"))
    content = json.loads(to_json([found]))
    (old,) = content["reports"]
    del old["places"]["interval"], old["places"]["num_pictures"]
    for block in old["blocks"]:
        del block["cutoff"]["gap"]
    (tmp_path / "report.json").write_text(json.dumps(content))
    assert load_reports(tmp_path / "report.json") == (found,)
    main(["analyze", str(tmp_path / "report.json"), "--out", str(tmp_path / "again")])
    assert "interval" not in verdict(found)


def damaged(change):
    content = json.loads(to_json([synthetic_report()]))
    change(content["reports"][0])
    return json.dumps(content)


DAMAGED = {
    "deep": lambda: "[" * 10**5,
    "digits": lambda: '{"form": ' + "9" * 5000 + "}",
    "text": lambda: "\udce9".encode("utf-8", "surrogateescape").decode("latin-1"),
    "bins": lambda: damaged(lambda r: r["blocks"][0]["histogram"].update(first_bin=10**9)),
    "block": lambda: damaged(lambda r: r.update(block=99)),
    "blocks": lambda: damaged(lambda r: r["blocks"].pop()),
    "quantiles": lambda: damaged(lambda r: r["blocks"][0].update(quantiles=[1.0])),
    "registers": lambda: damaged(lambda r: r["blocks"][0].update(register_norms=[1.0])),
    "places": lambda: damaged(lambda r: r["places"].update(per_position=[[0.0]])),
    "step": lambda: damaged(lambda r: r["model"].update(step=10**300)),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_reports_are_refused(kind, tmp_path):
    (tmp_path / "report.json").write_text(DAMAGED[kind]())
    with pytest.raises(DataError) as caught:
        load_reports(tmp_path / "report.json")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_reports_are_ordinary_files(tmp_path):
    (tmp_path / "report.json").symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not an ordinary file"):
        load_reports(tmp_path / "report.json")


def test_a_folder_without_models_names_the_likely_mistake(teal, tmp_path):
    with pytest.raises(DataError, match=r"nor checkpoints .*: it holds images, which --images takes"):
        analyze_all([tmp_path])
    (tmp_path / "best").mkdir()
    (tmp_path / "best" / "config.json").write_text("{}")
    with pytest.raises(DataError, match=r"it holds models, give one, such as .*/best"):
        analyze_all([tmp_path])


def test_help_says_whose_attention(capsys):
    with pytest.raises(SystemExit):
        main(["attention", "--help"])
    assert "block whose attention is drawn" in " ".join(capsys.readouterr().out.split())
