"""What is pushed opens everywhere: timm, transformers and open_clip in fresh processes, with and without the plugin."""

import json
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from models import TINY, random_bundle
from pushers import plan, push
from safetensors.torch import load_file, save_file

from vitreg_hub.arch import ARCHS, FAMILIES, REGISTER_COUNTS
from vitreg_hub.bundle import plain_doors
from vitreg_hub.bundle.config import config_text
from vitreg_hub.errors import BundleError, HubError, LicenseError
from vitreg_hub.hub import list_models, pull

pytestmark = pytest.mark.usefixtures("warm")

SHAPES = {
    "vit_nano_reg{}": {},
    "vit_base_reg{}_deit3": TINY | {"img_size": 64},
    "vit_base_reg{}_clip": TINY | {"img_size": (48, 64)},
    "vit_base_reg{}_clip_quickgelu": TINY | {"img_size": 64},
    "vit_tiny_reg{}_plain": TINY | {"img_size": 64},
}
PUBLISHED = {name.format(count): shape for name, shape in SHAPES.items() for count in REGISTER_COUNTS} | {
    "vit_tiny_reg0_deit_distilled": TINY | {"img_size": (48, 64)},  # there is no room for registers
    "vit_giant_reg4": TINY | {"img_size": 56},  # SwiGLU
}

DOORS = """
import importlib.util, sys
{plugin}
from safetensors.torch import load_file, save_file
import timm, torch

spec = importlib.util.spec_from_file_location("doors", sys.argv[1])
doors = importlib.util.module_from_spec(spec)
spec.loader.exec_module(doors)
images, found = load_file(sys.argv[2]), {{}}
with torch.inference_mode():
    for repo, batch in images.items():
        model = timm.create_model("hf-hub:" + repo, pretrained=True).eval()
        outputs = {{"timm": doors.timm_outputs(model, batch)}}
        outputs["transformers"] = doors.transformers_outputs(repo, batch, num_classes=model.num_classes)
        found |= {{f"{{repo}} {{door}} {{key}}": t.contiguous() for door, o in outputs.items() for key, t in o.items()}}
save_file(found, sys.argv[3])
assert ("vitreg_hub" in sys.modules) == {loaded}
assert type(doors.AutoModel.from_pretrained(repo)).__name__ == "{model}"
"""


def run(script, *arguments):
    done = subprocess.run([sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]


@torch.inference_mode()
def test_every_family_and_register_count_is_the_same_through_every_door(hub, tmp_path, monkeypatch):
    assert {ARCHS[name].family for name in PUBLISHED} == FAMILIES.keys()
    images, expected = {}, {}
    for name, shape in PUBLISHED.items():
        bundle, repo = random_bundle(name, **shape), f"lab/{name}"
        push(bundle.save(tmp_path / name), repo)
        images[repo] = torch.randn(2, *bundle.preprocess.input_size)
        for key, tensor in plain_doors.timm_outputs(bundle.build(), images[repo]).items():
            expected |= {f"{repo} {door} {key}": tensor for door in ("timm", "transformers")}
    save_file(images, tmp_path / "images.safetensors")
    for plugin, model in (("import vitreg_hub", "VitRegModel"), ("", "TimmWrapperModel")):
        monkeypatch.setenv("HF_HOME", str(tmp_path / model))
        script = DOORS.format(plugin=plugin, loaded=bool(plugin), model=model)
        run(script, plain_doors.__file__, tmp_path / "images.safetensors", tmp_path / f"{model}.safetensors")
        found = load_file(tmp_path / f"{model}.safetensors")
        assert found.keys() == expected.keys()
        assert len(found) == len(PUBLISHED) * 2 * 3  # doors; tokens, pooled, logits
        different = [key for key, tensor in expected.items() if not torch.equal(found[key], tensor)]
        assert not different


TOWERS = """
import sys, open_clip, torch
from safetensors.torch import load_file, save_file
model, preprocess = open_clip.create_model_from_pretrained("hf-hub:" + sys.argv[1])
tokens = open_clip.get_tokenizer("hf-hub:" + sys.argv[1])(["a dog", "two cats"])
assert "vitreg_hub" not in sys.modules
with torch.inference_mode():
    images = load_file(sys.argv[2])["images"]
    found = {"image": model.eval().encode_image(images), "text": model.encode_text(tokens)}
save_file(found, sys.argv[3])
"""


@pytest.fixture
def towers(tmp_path):
    """A bundle, and both towers beside it as a training run leaves them, whose trunk is named by a folder of here."""
    bundle = random_bundle("vit_nano_reg4", num_classes=0)
    folder, both = bundle.save(tmp_path / "model"), tmp_path / "model-open_clip"
    both.mkdir()
    (both / "config.json").write_text(config_text(bundle.to_json()))
    vision = dict(timm_model_name=f"local-dir:{both}", timm_pool="token", timm_proj="linear", image_size=32)
    text = dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=1)
    config = dict(embed_dim=16, vision_cfg=vision, text_cfg=text)
    model = open_clip.CustomTextCLIP(**config)
    model.visual.trunk.load_state_dict(dict(bundle.state_dict))
    images = dict(mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", resize_mode="shortest")
    told = dict(model_cfg=config | {"custom_text": True}, preprocess_cfg=images)
    (both / "open_clip_config.json").write_text(json.dumps(told))
    save_file(model.state_dict(), both / "open_clip_model.safetensors", metadata={"format": "pt"})
    (both / "notes.txt").write_text("mine")
    return folder, model.eval()


@torch.inference_mode()
def test_both_towers_open_in_open_clip_from_anywhere(hub, towers, tmp_path, monkeypatch):
    folder, model = towers
    repo = "lab/vit_nano_reg4"
    planned = plan(folder, repo).text_tower
    assert (planned.repo_id, planned.left_out) == (f"{repo}-open_clip", ("notes.txt",))
    pushed = push(folder, repo)
    files = hub.repos[f"{repo}-open_clip"].files()
    assert pushed.text_tower.repo_id == f"{repo}-open_clip"
    assert pushed.text_tower.commit == hub.repos[f"{repo}-open_clip"].branches["main"]
    assert set(pushed.text_tower.sent) == files.keys() - {".gitattributes"} == {file.name for file in planned.files}
    assert str(tmp_path) not in files["open_clip_config.json"].decode()
    card = ModelCard(files["README.md"].decode())
    assert (card.data.license, card.data.library_name) == ("mit", "open_clip")
    assert f"https://huggingface.co/{repo})" in card.text

    tokens, images = open_clip.get_tokenizer("ViT-B-32")(["a dog", "two cats"]), torch.randn(2, 3, 32, 32)
    expected = {"image": model.encode_image(images), "text": model.encode_text(tokens)}
    save_file({"images": images}, tmp_path / "images.safetensors")
    folder.with_name("model-open_clip").rename(tmp_path / "elsewhere")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    run(TOWERS, f"{repo}-open_clip", tmp_path / "images.safetensors", tmp_path / "features.safetensors")
    for key, tensor in load_file(tmp_path / "features.safetensors").items():
        assert torch.equal(tensor, expected[key]), key
        assert (tensor[0] - tensor[1]).abs().max() > 1e-4

    with pytest.raises(BundleError, match="lab/vit_nano_reg4-open_clip is not a bundle but an OpenCLIP model"):
        pull(f"{repo}-open_clip", tmp_path / "pulled")
    assert [model.repo_id for model in list_models()] == [repo]


def test_towers_on_a_branch_name_it_and_an_unchanged_one_is_not_sent(hub, towers):
    folder, _ = towers
    first = push(folder, "lab/m", branch="best")
    repo = hub.repos["lab/m-open_clip"]
    config = json.loads(repo.files("best")["open_clip_config.json"])
    assert config["model_cfg"]["vision_cfg"]["timm_model_name"] == "hf-hub:lab/m-open_clip@best"
    again = push(folder, "lab/m", branch="best")
    assert again.text_tower.commit == first.text_tower.commit
    assert len(repo.commits) == 2


def test_towers_are_as_private_as_the_bundle(hub, towers):
    folder, _ = towers
    both = folder.with_name("model-open_clip")
    both.rename(both.with_name("later"))
    push(folder, "lab/m", private=True)
    both.with_name("later").rename(both)
    assert push(folder, "lab/m").text_tower.private
    assert hub.repos["lab/m-open_clip"].private


def test_what_the_towers_cannot_be_stops_the_push_before_it_starts(hub, towers, tmp_path):
    folder, _ = towers
    push(folder, "lab/m", tag="v1")
    before = {name: dict(repo.branches) for name, repo in hub.repos.items()}
    del hub.repos["lab/m"].tags["v1"]
    push(random_bundle("vit_nano_reg8", num_classes=0).save(tmp_path / "other"), "lab/other")
    (folder / "recipe.yaml").write_text("epochs: 1\n")
    config = folder.with_name("model-open_clip") / "open_clip_config.json"
    config.write_text(config.read_text().replace("bicubic", "bilinear"))
    with pytest.raises(HubError, match="m-open_clip has a tag v1 already"):
        push(folder, "lab/m", tag="v1")
    folder.with_name("model-open_clip").rename(tmp_path / "other-open_clip")
    with pytest.raises(HubError, match="no repository lab/other-open_clip to open a pull request in"):
        push(tmp_path / "other", "lab/other", create_pr=True)
    assert {name: dict(hub.repos[name].branches) for name in before} == before
    assert not hub.repos["lab/other"].pull_requests


def test_towers_card_follows_the_license_and_keeps_its_authors_words(hub, towers):
    folder, _ = towers
    push(folder, "lab/m")
    card = hub.repos["lab/m-open_clip"].files()["README.md"].decode()
    api = HfApi(endpoint=hub.endpoint, token="hf_good")
    api.upload_file(repo_id="lab/m-open_clip", path_or_fileobj=f"{card}\nMine.\n".encode(), path_in_repo="README.md")
    assert push(folder, "lab/m").text_tower.sent == ()
    for name in ("lab/m", "lab/m-open_clip"):
        text = hub.repos[name].files()["README.md"].decode().replace("license: mit", "license: cc-by-4.0")
        api.upload_file(repo_id=name, path_or_fileobj=text.encode(), path_in_repo="README.md")
    with pytest.raises(LicenseError, match="several licenses"):
        push(folder, "lab/m")
    push(folder, "lab/m", license="mit")
    after = hub.repos["lab/m-open_clip"].files()["README.md"].decode()
    assert ModelCard(after).data.license == "mit"
    assert after.endswith("\nMine.\n")


BROKEN = {
    "has no open_clip_model.safetensors": lambda both: (both / "open_clip_model.safetensors").unlink(),
    "holds old.pt: such files can run code": lambda both: (both / "old.pt").write_bytes(b"pickle"),
    "open_clip_config.json is not JSON": lambda both: (both / "open_clip_config.json").write_text("{"),
    "has no 'model_cfg', as open_clip wants it": lambda both: (both / "open_clip_config.json").write_text("{}"),
    "has no config.json, from which timm builds": lambda both: (both / "config.json").unlink(),
}


@pytest.mark.parametrize("says", BROKEN)
def test_broken_towers_stop_the_push_before_it_starts(hub, towers, says):
    folder, _ = towers
    BROKEN[says](Path(f"{folder}-open_clip"))
    with pytest.raises(BundleError, match=says) as caught:
        push(folder, "lab/m")
    assert "\n" not in str(caught.value)
    assert not hub.requests
