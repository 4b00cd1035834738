"""Zero-shot classification and segmentation against open_clip's own code, and on embeddings that are known."""

import json
import shutil

import numpy as np
import pytest
import timm
import torch
from checkpoints import GOLDEN
from models import random_bundle, randomised
from optional import usable
from PIL import Image
from recorded import expected, inputs
from safetensors.torch import load_file
from training_runs import RUN

from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.evaluation import zero_shot as module
from vitreg_hub.evaluation.zero_shot import (
    Towers,
    class_embeddings,
    named_templates,
    open_towers,
    patch_embeddings,
    zero_shot,
    zero_shot_logits,
    zero_shot_masks,
)
from vitreg_hub.images.source import Batch
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.contrastive.task import ContrastiveTask

open_clip = usable("open_clip", project="open_clip_torch")

META = json.loads((GOLDEN / "zero_shot/meta.json").read_text())
NAMES, TEMPLATES = META["class_names"], META["templates"]


@pytest.fixture(scope="module")
def official():
    model = open_clip.CLIP(**META["constructor"]).eval()
    model.load_state_dict(load_file(GOLDEN / "zero_shot/checkpoint.safetensors"))
    return model


def tokenize(texts):
    ids = inputs("zero_shot")["input_ids"]
    known = {t.format(name): ids[i, j] for i, name in enumerate(NAMES) for j, t in enumerate(TEMPLATES)}
    return torch.stack([known[text] for text in texts])


@pytest.fixture(scope="module")
def classifier(official):
    return class_embeddings(official, tokenize, NAMES, TEMPLATES)


def images():
    return torch.cat([inputs("zero_shot")["images"], inputs("zero_shot")["images_rest"]])


def batches(size):
    labels = inputs("zero_shot")["labels"]
    for start in range(0, 22, size):
        rows = torch.arange(22)[start : start + size]
        yield Batch(indices=rows, images=images()[rows], labels=labels[rows])


def towers_of(model, **changes):
    size = model.visual.image_size
    said = {"name": "tiny", "tokenize": tokenize, "transform": None, "size": tuple(size)}
    return Towers(model=model, **said | {"mean": (0.5,) * 3, "std": (0.25,) * 3} | changes)


def test_official_run(official, classifier):
    wanted = expected("zero_shot")
    assert (classifier - wanted["classifier"]).abs().max() < 2e-5
    logits = zero_shot_logits(official, images(), classifier)
    assert (logits - wanted["logits100"]).abs().max() < 1e-4
    assert torch.equal(logits.argmax(dim=1), wanted["prediction"])
    for size in (22, 5, 1):
        score = zero_shot(towers_of(official), batches(size), names=NAMES, templates=TEMPLATES)
        assert score.top1.value == pytest.approx(wanted["top1"].item())
        assert score.top5.value == pytest.approx(wanted["top5"].item())
        assert score.num_images == 22


def test_unlabelled_images_do_not_count(official):
    (batch,) = batches(22)
    batch.labels[3:] = -1
    assert zero_shot(towers_of(official), [batch], names=NAMES, templates=TEMPLATES).num_images == 3
    batch.labels[:] = -1
    with pytest.raises(DataError, match="no image has a label"):
        zero_shot(towers_of(official), [batch], names=NAMES, templates=TEMPLATES)


@torch.no_grad()
def test_patches_as_trained_are_open_clips(official):
    trained = patch_embeddings(official, images()[:3], values=False)
    assert trained.shape == (3, 4, 4, 16)
    official.visual.output_tokens = True
    _, tokens = official.visual(images()[:3])
    official.visual.output_tokens = False
    wanted = torch.nn.functional.normalize(tokens @ official.visual.proj, dim=-1)
    assert (trained.flatten(1, 2) - wanted).abs().max() < 1e-5


@torch.no_grad()
def test_patches_by_values_are_maskclips(official):
    found = []
    last = official.visual.transformer.resblocks[-1]
    handle = last.register_forward_pre_hook(lambda block, args: found.append(args[0]))
    ours = patch_embeddings(official, images()[:2])
    handle.remove()
    x = found[0]
    values = torch.nn.functional.linear(last.ln_1(x), last.attn.in_proj_weight, last.attn.in_proj_bias).chunk(3, -1)[2]
    x = x + last.attn.out_proj(values)
    x = official.visual.ln_post(x + last.mlp(last.ln_2(x)))[:, 1:] @ official.visual.proj
    assert (ours.flatten(1, 2) - torch.nn.functional.normalize(x, dim=-1)).abs().max() < 1e-5
    assert (ours - patch_embeddings(official, images()[:2], values=False)).abs().max() > 1e-3


@pytest.fixture
def pair(tmp_path):
    """A trained pair: the bundle's folder, and both towers beside it."""
    torch.manual_seed(0)
    tiny = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
    backbone = randomised(timm.create_model("vit_nano_reg4", num_classes=0, img_size=32, **tiny))
    settings = Contrastive(text_width=32, text_heads=2, text_layers=2, context_length=12, embed_dim=24)
    task = ContrastiveTask(settings, backbone, RUN)
    bundle = ModelBundle.from_timm(
        backbone, arch="vit_nano_reg4", provenance=Provenance(origin="random weights", license="mit")
    )
    folder = bundle.save(tmp_path / "pair")
    task.write_beside(task.network, bundle, folder)
    return task.network.eval(), folder


@torch.no_grad()
def test_a_bundle_opens_with_the_towers_beside_it(pair):
    network, folder = pair
    towers = open_towers(folder)
    x = torch.randn(3, 3, 32, 32)
    assert (towers.model.encode_image(x) - network.encode_image(x)).abs().max() < 1e-5
    assert towers.tokenize(["a square"]).shape == (1, 12)
    assert towers.size == (32, 32)
    assert towers.transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
    same = open_towers(folder.with_name("pair-open_clip"))
    assert torch.equal(same.model.visual.head.proj.weight, towers.model.visual.head.proj.weight)
    embedded = patch_embeddings(towers.model, x, values=False)
    tokens = network.backbone.forward_features(x)[:, 5:]  # after a class token and four registers
    wanted = torch.nn.functional.normalize(network.projection(tokens), dim=-1)
    assert (embedded.flatten(1, 2) - wanted).abs().max() < 1e-5
    assert (patch_embeddings(towers.model, x) - embedded).abs().max() > 1e-3


def test_a_module_of_open_clip_opens(official):
    towers = open_towers(official)
    assert towers.tokenize(["sea"]).shape == (1, 14)
    assert towers.size == (32, 32)


def test_planted_patches_are_segmented():
    """A tower that passes the mean of red, green and blue of each patch on to three classes."""
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
    text = {"context_length": 14, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=3, vision_cfg=vision, text_cfg=text).eval()
    visual = model.visual
    with torch.no_grad():
        for block in visual.transformer.resblocks:
            for parameter in block.parameters():
                parameter.zero_()
        visual.positional_embedding.zero_()
        visual.conv1.weight.zero_()
        for channel in range(3):
            visual.conv1.weight[channel, channel] = 1 / 64
        visual.proj.zero_()
        visual.proj[:3] = torch.eye(3)
    pixels = np.zeros((48, 64, 3), dtype=np.uint8)
    wanted = np.zeros((48, 64), dtype=np.int64)
    for rows, columns, channel in ((slice(0, 24), slice(0, 32), 2), (slice(24, 48), slice(0, 32), 1)):
        pixels[rows, columns, channel], wanted[rows, columns] = 255, channel
    pixels[:, 32:, 0] = 255
    (mask,) = zero_shot_masks(towers_of(model), [Image.fromarray(pixels)], torch.eye(3))
    assert mask.shape == (48, 64)
    assert mask.dtype == torch.int64
    assert (mask.numpy() == wanted).mean() > 0.95
    assert (mask.numpy()[::12, ::16][:, 0] == [2, 2, 1, 1]).all()


def test_a_random_network_is_at_chance(pair):
    _, folder = pair
    towers = open_towers(folder)
    labels = torch.arange(480) % 8
    batch = Batch(indices=torch.arange(480), images=torch.randn(480, 3, 32, 32), labels=labels)
    score = zero_shot(towers, [batch], names=[f"thing {i}" for i in range(8)], templates=["{}"])
    assert score.top1.low <= 1 / 8 <= score.top1.high


def test_templates():
    assert len(named_templates("openai")) == 80
    assert len(named_templates("simple")) == 7
    with pytest.raises(DataError, match="no templates 'best'"):
        named_templates("best")


def test_mistakes(official, tmp_path, pair, monkeypatch):
    with pytest.raises(DataError, match="has no text tower"):
        open_towers(torch.nn.Linear(2, 2))
    folder = random_bundle().save(tmp_path / "alone")
    with pytest.raises(DataError, match="alone has no text tower"):
        open_towers(folder)
    with pytest.raises(DataError, match=r"vit_nano_reg4.digits has no text tower"):
        open_towers("vit_nano_reg4.digits")
    with pytest.raises(DataError, match=r"'a photo' has no \{\}"):
        class_embeddings(official, tokenize, NAMES, ["a photo"])
    with pytest.raises(DataError, match="at least one of each"):
        class_embeddings(official, tokenize, [], TEMPLATES)
    _, pair_folder = pair
    shutil.rmtree(pair_folder)
    both = pair_folder.with_name("pair-open_clip").rename(tmp_path / "moved")
    with pytest.raises(BundleError, match="cannot be loaded by open_clip"):
        open_towers(both)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install 'vitreg_hub\[clip\]'"):
        open_towers(official)
