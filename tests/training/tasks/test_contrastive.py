"""The contrastive task against open_clip: its loss in one and two processes, its files, its zero-shot classifier."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import HfApi
from models import randomised
from optional import usable
from PIL import Image
from processes import run_in_two
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from training_runs import RUN
from training_runs import TINY as RUNS

import vitreg_hub  # noqa: F401  (registers the models, also in processes that are started here)
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.bundle.provenance import Provenance
from vitreg_hub.errors import BundleError, DataError, RecipeError
from vitreg_hub.training.tasks.base import Batch
from vitreg_hub.training.tasks.contrastive.open_clip_files import save_open_clip
from vitreg_hub.training.tasks.contrastive.settings import Contrastive
from vitreg_hub.training.tasks.contrastive.task import ContrastiveTask, TwoTowers

open_clip = usable("open_clip", project="open_clip_torch")

TINY = {"embed_dim": 32, "depth": 2, "num_heads": 2, "patch_size": 8}
SETTINGS = Contrastive(text_width=32, text_heads=2, text_layers=2, context_length=12, embed_dim=24)
TEXTS = (
    "a red square",
    "two blue circles",
    "a dog",
    "the moon above a house",
    "rain",
    "a cup",
    "a tree",
    "a long road",
)
NAMES = ("square", "circle", "dog", "moon", "rain")
SAVED = {"vit_nano_reg0": 32, "vit_nano_reg4": 32, "vit_base_reg2_clip": (32, 48)}


def task_of(arch: str = "vit_nano_reg4", *, settings: Contrastive = SETTINGS, img_size=32) -> ContrastiveTask:
    torch.manual_seed(0)
    backbone = randomised(timm.create_model(arch, num_classes=0, img_size=img_size, **TINY))
    task = ContrastiveTask(settings, backbone, replace(RUN, label_names=NAMES))
    with torch.no_grad():  # its first weights are so small that all texts look alike
        task.network.text.token_embedding.weight.mul_(20)
    return task


def batch_of(rows: slice = slice(None)) -> Batch:
    images = torch.randn(len(TEXTS), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    positions = torch.arange(len(TEXTS))[rows]
    return Batch(step=0, positions=positions, names=TEXTS[rows], crops=(images[rows],), texts=TEXTS[rows])


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def bundle_of(towers: TwoTowers, arch: str) -> ModelBundle:
    return ModelBundle.from_timm(towers.backbone, arch=arch, provenance=Provenance(origin="a test"))


def upstream_name(name: str) -> str:
    """What open_clip calls a parameter of ours."""
    name = name.replace("projection.weight", "visual.head.proj.weight") if name.startswith("projection") else name
    return f"visual.trunk.{name.removeprefix('backbone.')}" if name.startswith("backbone.") else name


def upstream_clip(task: ContrastiveTask, folder: Path) -> open_clip.CustomTextCLIP:
    """open_clip's own class of the same sizes, with the same weights."""
    bundle_of(task.network, "vit_nano_reg4").save(folder)
    clip = open_clip.CustomTextCLIP(
        embed_dim=24,
        vision_cfg={"timm_model_name": f"local-dir:{folder}", "timm_pool": "token", "image_size": 32},
        text_cfg={"context_length": 12, "width": 32, "heads": 2, "layers": 2},
        nonscalar_logit_scale=True,
    )
    clip.load_state_dict({upstream_name(name): tensor for name, tensor in task.network.state_dict().items()})
    return clip.eval()


def test_loss_and_gradients_are_open_clips(folder):
    task, batch = task_of(), batch_of()
    clip = upstream_clip(task, folder)
    tokens = open_clip.get_tokenizer("ViT-B-16", context_length=12)(list(TEXTS))
    expected = open_clip.ClipLoss()(*clip(batch.crops[0], tokens))
    expected.backward()
    output = task.training_step(task.network, batch)
    output.loss.backward()

    assert expected < 0.98 * math.log(len(TEXTS)) or expected > 1.02 * math.log(len(TEXTS))  # it depends on the weights
    torch.testing.assert_close(output.loss, expected, rtol=1e-6, atol=0)
    theirs = gradients(clip)
    for name, gradient in gradients(task.network).items():
        torch.testing.assert_close(gradient, theirs[upstream_name(name)], rtol=1e-5, atol=1e-7, msg=name)
        assert gradient.any(), name
    assert output.metrics["logit_scale"] == pytest.approx(1 / 0.07)


def test_first_weights_are_drawn_as_open_clip_draws_them():
    settings = Contrastive(text_width=128, text_heads=2, text_layers=3, embed_dim=96, context_length=20)
    ours = ContrastiveTask(settings, timm.create_model("vit_nano_reg0", num_classes=0), RUN).network
    vision = {"layers": 1, "width": 128, "head_width": 32, "patch_size": 16, "image_size": 32}
    text = {"context_length": 20, "width": 128, "heads": 2, "layers": 3}
    theirs = open_clip.CLIP(embed_dim=96, vision_cfg=vision, text_cfg=text)
    wanted = dict(theirs.named_parameters())
    named = {f"text.{name}": wanted[name] for name, _ in ours.text.named_parameters()}
    named |= {"projection.weight": wanted["visual.proj"].T, "logit_scale": wanted["logit_scale"][None]}
    for name, tensor in named.items():
        drawn = ours.get_parameter(name)
        assert drawn.shape == tensor.shape
        tolerance = 5 * (tensor.std(correction=0) / drawn.numel() ** 0.5).item() + 1e-6
        assert drawn.mean().item() == pytest.approx(tensor.mean().item(), abs=tolerance), name
        assert drawn.std(correction=0).item() == pytest.approx(tensor.std(correction=0).item(), rel=0.05), name


def test_loss_is_computed_in_float32_under_autocast():
    task, batch = task_of(settings=replace(SETTINGS, logit_scale=100.0)), batch_of()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        image_features, text_features, scale = task.network(batch.crops[0], task.tokenize(TEXTS))
        loss = task.training_step(task.network, batch).loss
    assert image_features.dtype == text_features.dtype == loss.dtype == torch.float32
    assert torch.equal(loss, open_clip.ClipLoss()(image_features, text_features, scale))


def two_processes(rank: int, folder: Path) -> None:
    """One of two processes with half of the batch; the first writes what they have in common."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    rows, found = slice(4 * rank, 4 * rank + 4), {}
    for local_loss in (False, True):
        for sharding in ("ddp", "fsdp2"):
            task = task_of(settings=replace(SETTINGS, local_loss=local_loss))
            if sharding == "ddp":
                network = DistributedDataParallel(task.network)
            else:
                for block in (*task.network.backbone.blocks, *task.network.text.transformer.resblocks):
                    fully_shard(block)
                network = fully_shard(task.network)
            loss = task.training_step(network, batch_of(rows)).loss
            loss.backward()
            distributed.all_reduce(loss.detach_())
            tensors = gradients(task.network)
            with torch.no_grad():
                task.network.logit_scale.fill_(9)
            task.after_step(0)
            tensors |= {"clamped": task.network.logit_scale.detach()}
            if sharding == "fsdp2":
                tensors = {name: tensor.full_tensor() for name, tensor in tensors.items()}
            tensors |= {"loss": loss / 2}
            found |= {f"{sharding}/{local_loss}/{name}": tensor for name, tensor in tensors.items()}
    if rank == 0:
        save_file(found, folder / "found.safetensors")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found_by_two(tmp_path_factory) -> dict[str, Tensor]:
    folder = tmp_path_factory.mktemp("two")
    run_in_two(two_processes, folder)
    return load_file(folder / "found.safetensors")


@pytest.mark.parametrize("local_loss", [False, True])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp2"])
def test_two_processes_are_one_with_the_global_batch(found_by_two, sharding, local_loss):
    task = task_of()
    loss = task.training_step(task.network, batch_of()).loss
    loss.backward()
    expected = gradients(task.network) | {"loss": loss.detach(), "clamped": torch.tensor([math.log(100)])}
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found_by_two[f"{sharding}/{local_loss}/{name}"], tensor, rtol=1e-5, atol=1e-6, msg=f"{name} differs"
        )


@pytest.mark.parametrize(("before", "after"), [(-0.5, 0.0), (2.0, 2.0), (4.7, math.log(100))])
def test_logit_scale_is_clamped(before, after):
    task = task_of()
    with torch.no_grad():
        task.network.logit_scale.fill_(before)
    task.after_step(0)
    assert task.network.logit_scale.item() == pytest.approx(after)


def test_a_few_steps_learn():
    task, batch = task_of(), batch_of()
    task.network.text.token_embedding.requires_grad_(False)  # most of the work, and not needed
    optimizer = torch.optim.AdamW([p for p in task.network.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for step in range(20):
        loss = task.training_step(task.network, batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        task.after_step(step)
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


PLAIN_OPEN_CLIP = """
import sys, open_clip, torch
from safetensors.torch import load_file, save_file

for folder in sys.argv[1:]:
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    assert "vitreg_hub" not in sys.modules
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(["a dog", "two blue circles on a very long road " * 3])
    with torch.no_grad():
        images = load_file(f"{folder}-images.safetensors")["images"]
        found = {"image": model.eval().encode_image(images), "text": model.encode_text(tokens)}
    save_file(found | {"scale": model.logit_scale}, f"{folder}-features.safetensors")
"""


@pytest.fixture(scope="module")
def saved_pairs(tmp_path_factory, warm_python) -> dict[str, tuple[ContrastiveTask, Path]]:
    """Towers that were written, and opened by an open_clip that knows nothing of this package."""
    root, pairs = tmp_path_factory.mktemp("pairs"), {}
    for arch, size in SAVED.items():
        task = task_of(arch, img_size=size)
        with torch.no_grad():
            task.network.logit_scale.fill_(3.25)
        pairs[arch] = task, save_open_clip(task.network, root / arch, bundle=bundle_of(task.network, arch))
        images = torch.randn(2, 3, *task.network.backbone.patch_embed.img_size)
        save_file({"images": images}, f"{pairs[arch][1]}-images.safetensors")
    folders = [str(folder) for _, folder in pairs.values()]
    subprocess.run([warm_python.executable, "-c", PLAIN_OPEN_CLIP, *folders], check=True)
    return pairs


@pytest.mark.parametrize("arch", SAVED)
@torch.no_grad()
def test_plain_open_clip_gives_the_same_features(saved_pairs, arch):
    task, folder = saved_pairs[arch]
    found = load_file(f"{folder}-features.safetensors")
    images = load_file(f"{folder}-images.safetensors")["images"]
    tokens = task.tokenize(["a dog", "two blue circles on a very long road " * 3])
    towers = task.network.eval()
    assert (found["image"] - towers.encode_image(images)).abs().max() <= 1e-6
    assert (found["text"] - towers.encode_text(tokens)).abs().max() <= 1e-6
    assert found["scale"].item() == 3.25
    assert (found["image"][0] - found["image"][1]).abs().max() > 0.1  # neither tower is constant
    assert (found["text"][0] - found["text"][1]).abs().max() > 0.01


@pytest.mark.parametrize("arch", SAVED)
def test_images_are_prepared_alike(saved_pairs, arch):
    task, folder = saved_pairs[arch]
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    if arch != "vit_base_reg2_clip":  # open_clip fits a rectangle in a way of its own
        image = Image.effect_mandelbrot((90, 61), (-2, -1.5, 1, 1.5), 40).convert("RGB")
        ours = timm.data.create_transform(**timm.data.resolve_model_data_config(task.network.backbone))
        assert torch.equal(preprocess(image), ours(image))
    config = json.loads((folder / "open_clip_config.json").read_text())["preprocess_cfg"]
    assert config["mean"] == list(task.network.backbone.pretrained_cfg["mean"])


def test_files_name_the_trunk_that_was_given_and_replace_nothing(tmp_path, caplog):
    task = task_of("vit_tiny_reg0_plain")
    bundle = bundle_of(task.network, "vit_tiny_reg0_plain")
    folder = save_open_clip(task.network, tmp_path / "pair", bundle=bundle, trunk="hf-hub:lab/model")
    vision = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]["vision_cfg"]
    assert vision["timm_model_name"] == "hf-hub:lab/model"
    assert "12.5 %" in caplog.text  # deit's crop, which open_clip does not have
    with pytest.raises(BundleError, match="exists"):
        save_open_clip(task.network, folder, bundle=bundle)
    assert [path.name for path in tmp_path.iterdir()] == ["pair"]


def test_trunk_may_be_a_published_bundle(hub, folder, tmp_path):
    task = task_of()
    bundle = bundle_of(task.network, "vit_nano_reg4")
    api = HfApi()
    api.create_repo("lab/tower")
    api.upload_folder(repo_id="lab/tower", folder_path=bundle.save(folder))
    pair = save_open_clip(task.network, tmp_path / "pair", bundle=bundle, trunk="hf-hub:lab/tower")
    moved = pair.rename(tmp_path / "moved")  # it names no folder
    model, images = open_clip.create_model(f"local-dir:{moved}").eval(), batch_of().crops[0]
    assert (model.encode_image(images) - task.network.eval().encode_image(images)).abs().max() <= 1e-6


@torch.no_grad()
def test_zero_shot_score_is_open_clips(folder):
    task = task_of(settings=replace(SETTINGS, templates=("a photo of a {}.", "{}", "many {}s")))
    images, labels = torch.randn(40, 3, 1, 1).expand(40, 3, 32, 32), torch.arange(40) % 5
    labels[7] = -1
    backbone, projection = task.network.eval().backbone, task.network.projection.weight
    common = backbone.forward_head(backbone.forward_features(images), pre_logits=True).mean(0)
    projection -= projection @ common.outer(common) / common.square().sum()  # else all images are one class
    model = upstream_clip(task, folder)
    weights = open_clip.build_zero_shot_classifier_legacy(
        model, open_clip.get_tokenizer("ViT-B-16", context_length=12), NAMES, task.settings.templates
    )
    predicted = (100 * model.encode_image(images, normalize=True) @ weights).argmax(1)
    assert len(predicted.unique()) > 1
    labels[0] = predicted[0]
    score = task.scorer(task.network)(images, labels)
    assert score.keys() == {"zero_shot_accuracy"}
    known = labels >= 0
    assert score["zero_shot_accuracy"][known].tolist() == (predicted == labels)[known].float().tolist()
    assert score["zero_shot_accuracy"][7].isnan()  # no label, no score


def test_no_names_no_score():
    task = task_of()
    unnamed = ContrastiveTask(SETTINGS, task.network.backbone, RUN)
    assert unnamed.scorer(unnamed.network)(torch.randn(2, 3, 32, 32), torch.tensor([0, 1])) == {}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"text_heads": 3}, "3 heads do not divide"),
        ({"text_heads": 0}, "task.text_heads is 0, give at least 1"),
        ({"logit_scale": 0.5}, "task.logit_scale is 0.5, give at least 1"),
        ({"templates": ()}, "at least one sentence"),
        ({"templates": ("a {}", "a photo")}, "'a photo', which has no {}"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, sentence):
    with pytest.raises(RecipeError, match=sentence):
        replace(RUNS["contrastive"], task=replace(SETTINGS, **changes))


def test_captions_and_open_clip_are_asked_for(monkeypatch):
    task = task_of()
    with pytest.raises(DataError, match="needs captions"):
        task.training_step(task.network, replace(batch_of(), texts=None))
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with pytest.raises(RecipeError, match=r"pip install 'vitreg_hub\[clip\]'"):
        task_of()
