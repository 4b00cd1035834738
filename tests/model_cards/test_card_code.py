"""Code of cards, executed in fresh processes, and the cards of the models that the project distributes."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import huggingface_hub as hf
import open_clip
import pytest
import timm
import torch
from cards import sections
from huggingface_hub import ModelCard
from models import ONE_OF_EACH_KIND, random_bundle
from PIL import Image
from safetensors.torch import save_file

from vitreg_hub.bundle.provenance import provenance_from_json
from vitreg_hub.conversion import convert
from vitreg_hub.errors import BundleError
from vitreg_hub.hub.towers import tower_files
from vitreg_hub.model_cards.card import render
from vitreg_hub.model_cards.distributed import CARDS, DINOV2_TAG, distributed_cards
from vitreg_hub.timm_models import SHIPPED_WEIGHTS

pytestmark = pytest.mark.usefixtures("warm")


def code_of(card: str) -> list[str]:
    """The Python blocks of a card, each with a check of the shapes that its comments tell."""
    blocks = []
    for code in re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL):
        shapes = re.findall(r"^ *(\w+) = .*# (\[[\d, ]+\])", code, flags=re.MULTILINE)
        assert shapes
        code += "".join(f"\nassert list({name}.shape) == {shape}, {name}.shape" for name, shape in shapes)
        counts = re.findall(r"^(hidden_states) = .*# (\d+):", code, flags=re.MULTILINE)
        blocks.append(code + "".join(f"\nassert len({name}) == {number}" for name, number in counts))
    return blocks


def run(blocks: list[str], folder: Path, *, plugin: bool) -> None:
    """Execute code in one fresh process, in a folder with a photo."""
    Image.effect_mandelbrot((90, 70), (-2, -1, 1, 1), 50).save(folder / "photo.jpg")
    script = f"import sys\nfor code in {blocks!r}:\n    exec(compile(code, code, 'exec'), {{}})\n"
    script += f"assert ('vitreg_hub' in sys.modules) == {plugin}"
    env = {**os.environ, "HF_HOME": str(folder / f"home{plugin}")}
    done = subprocess.run([sys.executable, "-P", "-c", script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture
def published(hub, tmp_path) -> list[str]:
    """Cards of models on the Hub: with a head, a projection, two heads and no registers, and no head on a branch."""
    api = hf.HfApi()

    def publish(arch: str, num_classes: int, repo: str, *, projects: bool = False, branch: str = "main") -> str:
        bundle = random_bundle(arch, num_classes=num_classes, **ONE_OF_EACH_KIND.get(arch, {}))
        bundle = replace(bundle, label_names=None) if projects else bundle
        card = render(bundle, repo=repo, revision=branch)
        folder = bundle.save(tmp_path / arch, card=card)
        api.create_repo(repo, exist_ok=True)
        if branch != "main":
            api.create_branch(repo, branch=branch)
        api.upload_folder(repo_id=repo, folder_path=folder, revision=branch)
        ModelCard(hub.repos[repo].files(branch)["README.md"].decode()).validate()
        return card

    return [
        publish("vit_nano_reg4", 10, "lab/head"),
        publish("vit_base_reg8_clip", 24, "lab/projection", projects=True),
        publish("vit_tiny_reg0_deit_distilled", 10, "lab/two"),
        publish("vit_nano_reg2", 0, "lab/head", branch="best"),  # other shapes than those of main
    ]


def test_code_runs_in_a_fresh_process_without_this_package(published, tmp_path):
    plain = [code for card in published for code in code_of(card) if "vitreg_hub" not in code]
    assert len(plain) == 2 * len(published)
    run(plain, tmp_path, plugin=False)


def test_code_runs_in_a_fresh_process_with_this_package(published, hub, tmp_path):
    repo = "lab/source"
    timm.models.push_to_hf_hub(timm.create_model("vit_small_patch14_reg4_dinov2"), repo, safe_serialization=True)
    hub.repos["timm/vit_small_patch14_reg4_dinov2.lvd142m"] = hub.repos[repo]
    distributed = [path.read_text(encoding="utf-8") for path in sorted(CARDS.glob("*.md"))]
    codes = [code for card in (*published, *distributed) for code in code_of(card) if "vitreg_hub" in code]
    assert len(codes) == len(published) + 2 * len(list(SHIPPED_WEIGHTS.iterdir())) + 1
    run(codes, tmp_path, plugin=True)


@pytest.mark.parametrize("branch", ["main", "best"])
def test_code_of_both_towers_loads_their_branch(branch, hub, tmp_path):
    text = {"context_length": 7, "vocab_size": 49408, "width": 64, "heads": 1, "layers": 1}
    vision = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    model = open_clip.CLIP(embed_dim=24, vision_cfg=vision, text_cfg=text, quick_gelu=True)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "clip.pt")
    out, how = tmp_path / "bundle", {"num_heads": 2, "act": "quick_gelu", "license": "mit"}
    converted = convert(tmp_path / "clip.pt", out, num_registers=4, text_tower=True, **how)
    found = sections((out / "README.md").read_text(encoding="utf-8"))
    assert "bundle-open_clip" not in found["Usage"]
    assert "-open_clip`." in found["Usage"]
    assert "(text tower; kept beside the bundle, in open_clip's own form)" in found["Conversion"]
    assert "--text-tower" not in found["Conversion"]
    alone = render(convert(tmp_path / "clip.pt", **how))
    assert "text tower; --text-tower keeps it" in alone
    assert "-open_clip`" not in alone

    files = tower_files(Path(f"{out}-open_clip"), bundle_repo="lab/m", branch=branch, license="mit")
    card = files["README.md"].decode()
    assert converted.model_args["reg_tokens"] == 4
    assert ModelCard(card).data.tags == ["open_clip", "clip"]  # the tower beside has none
    page = "https://huggingface.co/lab/m" + ("" if branch == "main" else f"/tree/{branch}")
    assert f"[lab/m]({page})" in card
    api = hf.HfApi()
    api.create_repo("lab/m-open_clip")
    if branch != "main":
        api.create_branch("lab/m-open_clip", branch=branch)
    for name, content in files.items():
        api.upload_file(repo_id="lab/m-open_clip", path_or_fileobj=content, path_in_repo=name, revision=branch)
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, flags=re.MULTILINE | re.DOTALL)
    check = "assert model.encode_text(tokenizer(['a'], context_length=7)).shape == (1, 24)"
    run([f"{code}\n{check}"], tmp_path, plugin=False)


def test_towers_with_registers_are_tagged_so(tmp_path):
    (tmp_path / "open_clip_config.json").write_text('{"model_cfg": {}}')
    weights = tmp_path / "open_clip_model.safetensors"
    for name, tags in (("visual.trunk.reg_token", ["registers"]), ("visual.trunk.reg_tokens.x", [])):
        save_file({name: torch.zeros(1)}, weights)
        card = tower_files(tmp_path, bundle_repo="lab/m", branch="main", license=None)["README.md"].decode()
        assert ModelCard(card).data.tags == ["open_clip", "clip", *tags]
    weights.write_bytes(b"x")
    with pytest.raises(BundleError, match="cannot be read") as caught:
        tower_files(tmp_path, bundle_repo="lab/m", branch="main", license=None)
    assert "\n" not in str(caught.value)


def test_committed_cards_are_those_that_are_made():
    made = distributed_cards()
    assert {path.name for path in CARDS.glob("*.md")} == made.keys()
    assert {f"{folder.name}.md" for folder in SHIPPED_WEIGHTS.iterdir()} == made.keys() - {f"{DINOV2_TAG}.md"}
    for name, text in made.items():
        assert (CARDS / name).read_text(encoding="utf-8") == text, f"run: python -m vitreg_hub.model_cards ({name})"


@pytest.mark.parametrize("card", sorted(CARDS.glob("*.md")), ids=lambda path: path.stem)
def test_distributed_cards_hold_together(card):
    text = card.read_text(encoding="utf-8")
    assert all(sections(text).values())
    assert "None" not in text
    assert "your-name" not in text
    for link in re.findall(r"\]\((?!https:)(.*?)\)", text):
        if link.startswith("../../vitreg_hub/weights/"):
            assert (SHIPPED_WEIGHTS / link.removeprefix("../../vitreg_hub/weights/")).is_file()
        else:
            assert (CARDS / link).is_file()


@pytest.mark.parametrize("folder", sorted(SHIPPED_WEIGHTS.iterdir()), ids=lambda path: path.name)
def test_cards_of_shipped_models_tell_the_numbers_of_all(folder):
    text = (CARDS / f"{folder.name}.md").read_text(encoding="utf-8")
    table = sections(text)["With and without registers"].splitlines()
    for other in SHIPPED_WEIGHTS.iterdir():
        provenance = json.loads((other / "config.json").read_text())["vitreg"]["provenance"]
        (row,) = (line for line in table if f"[{other.name}]({other.name}.md)" in line)
        for value in provenance["metrics"].values():
            assert f"{value:.4f}" in row
        assert ("not measured" in row.split("|")[-3]) == (provenance_from_json(provenance).artifacts is None)
    told = {result.metric_value for result in ModelCard(text).data.eval_results}
    assert told <= set(json.loads((folder / "config.json").read_text())["vitreg"]["provenance"]["metrics"].values())
    assert told


def test_dinov2_card_tells_what_timm_knows_and_claims_nothing():
    text = (CARDS / f"{DINOV2_TAG}.md").read_text(encoding="utf-8")
    found = sections(text)
    assert found["Results"] == "Not measured."
    for size in ("small", "base", "large", "giant"):
        upstream = f"vit_{size}_patch14_reg4_dinov2.lvd142m"
        cfg = timm.get_pretrained_cfg(upstream)
        (row,) = (line for line in text.splitlines() if f"[timm/{upstream}]" in line)
        assert f"`vit_{size}_reg4.{DINOV2_TAG}`" in row
        params = sum(p.numel() for p in timm.create_model(upstream, device="meta", num_classes=0).parameters())
        assert f"| {params / 1e6:,.1f} M |" in row
        assert row.endswith(f"| {cfg.license} |")
        assert f"{cfg.input_size[1]} x {cfg.input_size[2]} pixels, mean {', '.join(map(str, cfg.mean))}" in text
