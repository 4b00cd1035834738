"""The whole analysis on a model in which everything that it looks for was planted, and on models of every kind."""

import dataclasses
import json
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
import transformers
from models import ONE_OF_EACH_KIND, TINY, random_bundle, randomised
from planted import GRID, planted
from torch.nn.functional import cosine_similarity

from vitreg_hub.analysis import measures
from vitreg_hub.analysis.measures import analyze
from vitreg_hub.analysis.meters.examples import ExampleMeter, pca_maps
from vitreg_hub.analysis.results import load_reports, to_json
from vitreg_hub.analysis.telemetry import telemetry
from vitreg_hub.errors import DataError
from vitreg_hub.images.embedded import digits
from vitreg_hub.tokens import attention_maps, observe


@pytest.fixture(scope="module")
def truth():
    return planted()


@pytest.fixture(scope="module")
def report(truth):
    return analyze(truth.model, truth.data, batch_size=32)


def test_planted_outliers_are_counted_where_and_from_when_they_are(truth, report):
    share = truth.outliers.double().mean().item()
    assert report.outlier_fraction == (0, pytest.approx(share, abs=1e-12), pytest.approx(share, abs=1e-12))
    assert report.first_outlier_block == 1
    assert report.cutoff[0] is None
    assert 100 < report.cutoff[1] < 400
    assert report.block == 2
    per_position = truth.outliers.double().mean(0).reshape(GRID, GRID)
    assert np.allclose(report.places.per_position, per_position, atol=1e-12)
    assert report.places.per_image == tuple(torch.bincount(truth.outliers.sum(1)).tolist())


def test_planted_outliers_hold_the_class_and_nothing_local(report):
    local = report.local_information
    assert local.normal.position_accuracy == 1
    assert local.normal.position_distance == 0
    assert local.normal.pixel_error < 0.3 * local.normal.chance_error
    three_sigma = 3 * (0.07 * 0.93 / local.outlier.num_test) ** 0.5
    assert abs(local.outlier.position_accuracy - local.outlier.chance_accuracy) < three_sigma
    assert local.outlier.pixel_error == pytest.approx(local.outlier.chance_error, rel=0.05)
    accuracy = {token.token: token.accuracy for token in report.global_information.tokens}
    assert accuracy["outlier patch"] == 1
    assert abs(accuracy["normal patch"] - 0.25) < 3 * (0.25 * 0.75 / report.global_information.num_test) ** 0.5
    assert accuracy["class"] > 0.6  # attends to the outliers


def test_redundancy_is_that_of_the_patch_embeddings(truth, report):
    embedded = truth.model.patch_embed(truth.pixels).detach().reshape(-1, GRID, GRID, truth.model.embed_dim)
    similarities = {False: [], True: []}
    for image, marked in zip(embedded[:100], truth.outliers.reshape(-1, GRID, GRID), strict=False):
        for row in range(GRID):
            for column in range(GRID):
                around = [(row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)]
                near = [image[r, c] for r, c in around if 0 <= r < GRID and 0 <= c < GRID]
                mean = cosine_similarity(image[row, column], torch.stack(near), dim=-1).mean().item()
                similarities[bool(marked[row, column])].append(mean)
    found = measures.neighbor_redundancy(truth.model, truth.data, max_images=None) if len(embedded) == 100 else None
    assert found is None
    first = measures.neighbor_redundancy(truth.model, truth.data.select(range(100)))
    for group, expected in ((first.normal, similarities[False]), (first.outlier, similarities[True])):
        assert group.num_patches == len(expected)
        assert group.mean == pytest.approx(np.mean(expected), abs=1e-5)
    assert report.redundancy.normal.num_patches == (~truth.outliers).sum()


def test_attention_mass_is_the_sum_of_attention(truth, report):
    weights = attention_maps(truth.model, truth.pixels)[-1].weights.double().mean(1)
    marked = truth.outliers.double()
    for i, mass in enumerate(report.attention):
        to_patches = weights[:, i, 3:]
        assert mass.source == ("class", "register 1", "register 2")[i]
        assert mass.to_outliers == pytest.approx((to_patches * marked).sum(1).mean().item(), abs=1e-6)
        assert mass.to_normal == pytest.approx((to_patches * (1 - marked)).sum(1).mean().item(), abs=1e-6)
        assert mass.to_class == pytest.approx(weights[:, i, 0].mean().item(), abs=1e-6)
        assert mass.to_registers == pytest.approx(weights[:, i, 1:3].sum(-1).mean().item(), abs=1e-6)


def test_examples_show_the_planted_outliers(truth, report):
    assert len(report.examples) == 4
    for index, example in zip((0, 133, 266, 399), report.examples, strict=True):
        assert np.array_equal(example.outliers.flatten(), truth.outliers[index].numpy())
        assert np.array_equal(example.norms > 200, example.outliers)
        assert example.class_attention.shape == (2, GRID, GRID)
        assert example.register_attention.shape == (2, 2, GRID, GRID)
    expected = attention_maps(truth.model, truth.pixels[133:134])[-1]
    assert np.allclose(report.examples[1].class_attention, expected.cls[0, :, 0], atol=1e-6)
    assert np.allclose(report.examples[1].register_attention, expected.registers[0].transpose(0, 1), atol=1e-6)
    chosen = truth.pixels[[0, 133, 266, 399]]
    with torch.no_grad():
        components = pca_maps(truth.model.forward_features(chosen)[:, 3:], (GRID, GRID))
    for pixels, colours, example in zip(chosen.numpy(), components, report.examples, strict=True):
        as_given = pixels * 0.5 + 0.5  # without the normalisation of the model
        assert np.allclose(example.image, np.moveaxis(as_given, 0, 2), atol=1e-6)
        assert np.allclose(example.components, colours, atol=1e-3)


def test_examples_are_in_the_order_of_the_images(truth):
    seen = observe(truth.model, truth.pixels[:4], norms=True, normed=True, attention=(2,))
    meter = ExampleMeter(block=2, chosen=(3, 5, 7))
    meter.update(seen, torch.tensor([7, 3, 6, 5]), None, truth.outliers[:4])
    for place, example in zip((1, 3, 0), meter.result(), strict=True):
        assert np.array_equal(example.norms.flatten(), seen.norms[2, place, 3:])


def test_outliers_are_those_of_the_chosen_block_by_its_own_cutoff():
    truth = planted(num_images=100)
    truth.model.blocks[2].register_forward_hook(lambda block, args, output: 10 * output)
    found = analyze(truth.model, truth.data, block=1)
    assert found.block == 1
    assert 10 * found.cutoff[1] == pytest.approx(found.cutoff[2], rel=0.2)
    assert found.places.per_image == tuple(torch.bincount(truth.outliers.sum(1)).tolist())
    for index, example in zip((0, 33, 66, 99), found.examples, strict=True):
        assert np.array_equal(example.outliers.flatten(), truth.outliers[index].numpy())
        assert example.norms.max() == pytest.approx(400, rel=1e-3)
    assert not [note for note in found.notes if "choose another one" in note]
    elsewhere = analyze(truth.model, truth.data, block=0)
    assert elsewhere.places.per_image == (100,)
    assert any(
        note.startswith("Blocks 1, 2 have outliers, but the chosen block 0 has none") for note in elsewhere.notes
    )


def test_a_norm_that_equals_a_given_cutoff_is_no_outlier(truth):
    norms = observe(truth.model, truth.pixels[:8], norms=True).norms[2, :, 3:]
    cutoff = norms.flatten().sort().values[-20].item()
    found = measures.outlier_places(truth.model, truth.pixels[:8], cutoff=cutoff)
    assert found.per_image == tuple(torch.bincount((norms > cutoff).sum(1)).tolist())


def test_each_measure_alone_is_what_all_measure_together(truth):
    some = truth.data.select(range(100))
    whole = analyze(truth.model, some)
    assert measures.patch_norms(truth.model, some) == whole.blocks
    assert measures.outlier_places(truth.model, some) == whole.places
    assert measures.neighbor_redundancy(truth.model, some) == whole.redundancy
    assert measures.local_information(truth.model, some) == whole.local_information
    assert measures.global_information(truth.model, some) == whole.global_information
    assert measures.attention_mass(truth.model, some) == whole.attention


def test_the_seed_decides_which_images_are_seen(truth):
    first, again, other = (measures.patch_norms(truth.model, truth.data, max_images=9, seed=seed) for seed in (0, 0, 1))
    assert first == again != other
    assert len(measures.token_examples(truth.model, truth.data, max_images=9, number=3, seed=1)) == 3


def same(first, second, *, rel: float) -> None:
    """Everything that is counted is equal, everything that is computed is equal up to rounding."""
    first, second = (json.loads(to_json([report]))["reports"][0] for report in (first, second))
    assert first["places"] == second["places"]
    for a, b in zip(first["blocks"], second["blocks"], strict=True):
        assert a["outlier_fraction"] == b["outlier_fraction"]
        assert a["quantiles"] == pytest.approx(b["quantiles"], rel=rel)
        assert a["class_norms"] + a["register_norms"] == pytest.approx(b["class_norms"] + b["register_norms"], rel=rel)
    for name in ("local_information", "global_information", "attention", "redundancy"):
        for a, b in zip(_numbers(first[name]), _numbers(second[name]), strict=True):
            assert a == pytest.approx(b, rel=10 * rel, abs=10 * rel), name


def _numbers(value) -> list[float]:
    if isinstance(value, dict):
        return [n for key, v in value.items() if key != "counts" for n in _numbers(v)]
    if isinstance(value, list):
        return [n for v in value for n in _numbers(v)]
    return [value] if isinstance(value, int | float) else []


@pytest.mark.parametrize("batch_size", [1, 7, 400])
def test_batch_size_does_not_matter(truth, report, batch_size):
    same(analyze(truth.model, truth.data, batch_size=batch_size), report, rel=1e-4)


def test_number_type_does_not_matter(truth, report):
    half = planted()
    half.model.bfloat16()
    found = analyze(half.model, half.data)
    assert found.outlier_fraction == report.outlier_fraction
    assert found.places == report.places
    for a, b in zip(found.blocks, report.blocks, strict=True):
        assert a.quantiles == pytest.approx(b.quantiles, rel=0.02)
    for a, b in zip(found.attention, report.attention, strict=True):
        assert dataclasses.astuple(a)[1:] == pytest.approx(dataclasses.astuple(b)[1:], abs=0.01)


TWO_PROCESSES = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import vitreg_hub
from accelerate import PartialState
from planted import planted
from vitreg_hub.analysis.measures import analyze
from vitreg_hub.analysis.results import to_json

torch.set_num_threads(1)
truth = planted()
for number in map(int, sys.argv[3:]):
    report = analyze(truth.model, truth.data.select(range(number)), batch_size=8)
    assert len(report.examples) == min(4, number)
    rank = PartialState().process_index
    assert PartialState().num_processes == 2
    open(f"{sys.argv[2]}/{number}_{rank}.json", "w").write(to_json([report]))
PartialState().destroy_process_group()
"""


@pytest.mark.usefixtures("warm")
def test_number_of_processes_does_not_matter(truth, tmp_path, request):
    numbers = (399, 1)  # odd; fewer images than processes
    script = tmp_path / "script.py"
    script.write_text(TWO_PROCESSES)
    tests = str(request.path.parents[1])
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", str(script)]
    done = subprocess.run(
        [*command, tests, str(tmp_path), *map(str, numbers)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    for number in numbers:
        (first,), (second,) = (load_reports(tmp_path / f"{number}_{rank}.json") for rank in range(2))
        assert first == second
        same(first, analyze(truth.model, truth.data.select(range(number))), rel=1e-4)


def test_reports_survive_json(report, tmp_path):
    checkpoint = dataclasses.replace(report, model=dataclasses.replace(report.model, step=7))
    (tmp_path / "report.json").write_text(to_json([report, checkpoint]))
    assert load_reports(tmp_path / "report.json") == (report, checkpoint)
    content = json.loads((tmp_path / "report.json").read_text())["reports"][0]
    assert content["outlier_fraction"] == list(report.outlier_fraction)
    assert content["first_outlier_block"] == 1
    for text in (
        "",
        "[]",
        "{}",
        '{"form": 1, "reports": [{}]}',
        '{"form": 2, "reports": []}',
        '{"form": 0, "reports": []}',
        '{"form": 1, "reports": 3}',
    ):
        (tmp_path / "other.json").write_text(text)
        with pytest.raises(DataError, match=r"other\.json"):
            load_reports(tmp_path / "other.json")


KINDS = ONE_OF_EACH_KIND | {
    "vit_base_patch16_siglip_224": TINY | {"img_size": 64},
    "vit_small_patch16_dinov3": TINY | {"img_size": 64},
}


@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_model_gives_a_whole_report(name):
    vit = randomised(timm.create_model(name, **KINDS[name]))
    found = analyze(vit, digits("test").select(range(60)))
    assert len(found.blocks) == len(vit.blocks)
    order = (found.model.num_class_tokens, found.model.num_registers)
    assert sum(order) == vit.num_prefix_tokens
    assert len(found.attention) == sum(order)
    for mass in found.attention:
        assert mass.to_class + mass.to_registers + mass.to_normal + mass.to_outliers == pytest.approx(1, abs=1e-5)
    assert found.images.size == tuple(vit.patch_embed.img_size)
    assert found.model.num_params == sum(p.numel() for p in vit.parameters())
    assert (found.model.embed_dim, found.model.depth) == (vit.embed_dim, len(vit.blocks))
    assert found.model.patch_size == vit.patch_embed.patch_size
    assert found.images.grid == vit.patch_embed.grid_size
    counted = sum(number * images for number, images in enumerate(found.places.per_image))
    assert counted == pytest.approx(found.outlier_fraction[-1] * 60 * vit.patch_embed.num_patches)


def test_a_distillation_token_is_the_second_class_token():
    vit = randomised(timm.create_model("vit_tiny_reg0_deit_distilled", **KINDS["vit_tiny_reg0_deit_distilled"]))
    images = torch.randn(3, 3, 48, 64)
    weights = attention_maps(vit, images)[-1].weights
    for found in (analyze(vit, images, num_examples=1), telemetry(vit, images)):
        assert [mass.source for mass in found.attention] == ["class", "class 2"]
    (example,) = measures.token_examples(vit, images, number=1)
    assert np.allclose(example.class_attention.reshape(2, 12), weights[0, :, 0, 2:], atol=1e-6)


def test_parameters_of_a_head_are_not_the_networks():
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64, image_size=32, num_labels=9
    )
    model = transformers.ViTForImageClassification(config).eval()
    found = analyze(model, torch.randn(4, 3, 32, 32))
    assert found.model.num_params == sum(p.numel() for p in model.vit.parameters())


def test_it_is_said_what_the_model_and_the_images_are(report):
    untrained = analyze("vit_nano_reg1", torch.randn(4, 3, 32, 32))
    assert untrained.images.preprocessing == "given as tensors" != report.images.preprocessing
    assert any("weights are random" in note for note in untrained.notes)
    assert not any("weights are random" in note for note in report.notes)


def test_a_bundle_by_folder_and_by_transformers_and_as_a_module(folder):
    from transformers import AutoModel

    bundle = random_bundle("vit_nano_reg4")
    bundle.save(folder)
    images = torch.randn(20, 3, 32, 32)
    by_name = analyze(str(folder), images)
    for other in (bundle.build(), AutoModel.from_pretrained(folder)):
        same(analyze(other, images), by_name, rel=1e-4)
    assert by_name.model.name == str(folder)


def test_telemetry_is_the_analysis_of_a_batch(truth):
    found = telemetry(truth.model, truth.pixels)
    whole = analyze(truth.model, truth.pixels, batch_size=400)
    assert found.blocks == whole.blocks
    some = analyze(truth.model, truth.pixels[:25], batch_size=25, cutoff=whole.cutoff[-1])
    for ours, theirs in zip(found.attention, some.attention, strict=True):
        assert dataclasses.astuple(ours)[1:] == pytest.approx(dataclasses.astuple(theirs)[1:], abs=1e-6)
    scalars = found.scalars()
    assert scalars["artifacts/block_1/outlier_fraction"] == pytest.approx(truth.outliers.double().mean().item())
    assert scalars["artifacts/block_0/outlier_fraction"] == 0
    assert scalars["artifacts/class_attention_on_outliers"] == found.attention[0].to_outliers
    assert scalars["artifacts/block_2/norm_q100"] == whole.blocks[2].quantiles[-1]
    assert len(scalars) == 3 * (4 + 2) + 3 * 2
    norms = observe(truth.model, truth.pixels, norms=True).norms[1]
    for share, name in ((0.5, "q50"), (0.99, "q99")):
        expected = np.quantile(norms[:, 3:], share)
        assert scalars[f"artifacts/block_1/norm_{name}"] == pytest.approx(expected, rel=0.012)
    assert scalars["artifacts/block_1/register_1_norm"] == pytest.approx(norms[:, 1].mean().item(), rel=1e-5)
    assert scalars["artifacts/register_2_attention_on_registers"] == found.attention[2].to_registers


def test_telemetry_of_few_images_with_a_given_cutoff(truth):
    found = telemetry(truth.model, truth.pixels[:3], cutoff=30.0)
    norms = observe(truth.model, truth.pixels[:3], norms=True).norms[:, :, 3:]
    assert [block.outlier_fraction for block in found.blocks] == (norms > 30).double().mean((1, 2)).tolist()
    weights = attention_maps(truth.model, truth.pixels[:1])[-1].weights.mean(1)[0]
    on_outliers = (weights[:3, 3:] * (norms[-1, 0] > 30)).sum(1)
    assert [mass.to_outliers for mass in found.attention] == pytest.approx(on_outliers.tolist(), abs=1e-6)


def test_telemetry_leaves_a_training_run_as_it_is():
    def losses(*, with_telemetry: bool) -> list[float]:
        torch.manual_seed(0)
        vit = timm.create_model("vit_nano_reg4", drop_path_rate=0.3, proj_drop_rate=0.2).train()
        optimizer = torch.optim.AdamW(vit.parameters(), lr=1e-3)
        values = []
        for _ in range(4):
            loss = vit(torch.randn(8, 3, 32, 32)).logsumexp(1).mean()
            loss.backward()
            if with_telemetry:
                telemetry(vit, torch.ones(8, 3, 32, 32))
            optimizer.step()
            optimizer.zero_grad()
            values.append(loss.item())
        return values

    assert losses(with_telemetry=True) == losses(with_telemetry=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"block": 3}, "block 3 does not exist: _Numbered has 3, 0 to 2 or -3 to -1"),
        ({"images": "nowhere"}, "there are no images 'nowhere'"),
        ({"model": "vit_nano_reg4", "images": torch.full((2, 3, 32, 32), torch.nan)}, "not finite"),
        ({"images": torch.zeros(0, 3, 64, 64)}, "holds no images"),
        ({"images": torch.zeros(2, 3, 32, 32)}, "the images have 32 x 32 pixels, but the model was built for 64 x 64"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear cannot be read"),
        ({"model": timm.create_model("resnet18")}, "ResNet cannot be read"),
        ({"max_images": 0}, "max_images is 0"),
        ({"cutof": 3.0}, "there is no option cutof: choose from cutoff, block"),
        ({"cutoff": -1.0}, "cutoff is -1.0: give a norm above 0"),
        ({"cutoff": float("nan")}, "cutoff is nan"),
        ({"seed": -1}, "seed is -1"),
        ({"device": "tpu9"}, "device 'tpu9' cannot be used here"),
        ({"num_examples": -1}, "there cannot be -1 examples"),
    ],
)
def test_what_cannot_be_analyzed_is_said_in_a_sentence(truth, change, message):
    options = {"model": truth.model, "images": truth.data} | change
    with pytest.raises(DataError, match=message) as caught:
        analyze(**options)
    assert "\n" not in str(caught.value)
