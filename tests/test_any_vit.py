"""Models by name, folder, Hub id and module, against timm and transformers used directly."""

import json

import huggingface_hub as hf
import numpy as np
import pytest
import timm
import torch
import transformers
from bounds import within_bounds
from models import TINY, random_bundle, randomised
from PIL import Image
from torch import nn
from torchvision import transforms

from vitreg_hub.any_vit import UNKNOWN, open_vit
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, DataError, HubError, UnknownArchError

SHAPE = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
VISION = SHAPE | dict(image_size=32, patch_size=8)
CLIP_TEXT = SHAPE | dict(vocab_size=16, max_position_embeddings=8, eos_token_id=1, bos_token_id=0, pad_token_id=1)
CROPPED = dict(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})
SQUASHED = dict(size={"height": 32, "width": 32})
IMAGENET = "mean (0.485, 0.456, 0.406), std (0.229, 0.224, 0.225)"
HALF = "mean (0.5, 0.5, 0.5), std (0.5, 0.5, 0.5)"
CLIP = "mean (0.481, 0.458, 0.408), std (0.269, 0.261, 0.276)"
SAVED_BY_TRANSFORMERS = {
    "Dinov2": (VISION, "Bit", CROPPED, f"resize shorter side to 36 (bicubic), crop 32x32 from the centre, {CLIP}"),
    "Dinov2WithRegisters": (
        VISION | {"num_register_tokens": 3},
        "Bit",
        CROPPED,
        f"resize shorter side to 36 (bicubic), crop 32x32 from the centre, {CLIP}",
    ),
    "DINOv3ViT": (
        VISION | {"num_register_tokens": 3},
        "DINOv3ViT",
        SQUASHED,
        f"resize to 32x32 (bilinear), {IMAGENET}",
    ),
    "ViT": (VISION, "ViT", SQUASHED, f"resize to 32x32 (bilinear), {HALF}"),
    "DeiT": (
        VISION,
        "DeiT",
        dict(size={"height": 40, "width": 40}, crop_size={"height": 32, "width": 32}),
        f"resize to 40x40 (bicubic), crop 32x32 from the centre, {HALF}",
    ),
    "CLIP": (
        dict(vision_config=VISION, text_config=CLIP_TEXT),
        "CLIP",
        CROPPED,
        f"resize shorter side to 36 (bicubic), crop 32x32 from the centre, {CLIP}",
    ),
    "Siglip": (
        dict(vision_config=VISION, text_config=CLIP_TEXT),
        "Siglip",
        SQUASHED,
        f"resize to 32x32 (bicubic), {HALF}",
    ),
}


@pytest.fixture
def picture():
    pixels = np.random.default_rng(0).integers(0, 256, (7, 5, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((60, 45), Image.Resampling.BICUBIC)


def hf_model(kind, **settings):
    """A model of transformers with random weights that nothing can hide behind."""
    model = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(**settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=generator)
    return model.eval()


def timm_transform(model, size):
    """What the timm model expects, out of torchvision's parts."""
    cfg = model.pretrained_cfg
    return transforms.Compose(
        [
            transforms.Resize(int(size / cfg["crop_pct"]), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(size),
            transforms.ToTensor(),
            transforms.Normalize(cfg["mean"], cfg["std"]),
        ]
    )


def same_weights(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@pytest.mark.parametrize("kind", SAVED_BY_TRANSFORMERS)
def test_folder_of_transformers(kind, tmp_path, picture):
    settings, processor, sizes, words = SAVED_BY_TRANSFORMERS[kind]
    source = hf_model(kind, **settings)
    source.save_pretrained(tmp_path)
    getattr(transformers, f"{processor}ImageProcessor")(**sizes).save_pretrained(tmp_path)

    vit = open_vit(tmp_path)

    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path)(picture, return_tensors="pt").pixel_values
    assert torch.equal(vit.transform(picture), pixels[0])
    assert vit.preprocessing == words
    tower = source.vision_model if kind in ("CLIP", "Siglip") else source
    with torch.no_grad():
        assert torch.equal(vit.model(pixels).last_hidden_state, tower(pixels).last_hidden_state)
    assert not [name for name, _ in vit.model.named_parameters() if "text" in name]
    assert not vit.model.training
    assert (vit.name, vit.untrained) == (str(tmp_path), False)


@pytest.mark.parametrize("kind", SAVED_BY_TRANSFORMERS)
def test_other_size_of_transformers(kind, tmp_path, picture):
    settings, processor, _, _ = SAVED_BY_TRANSFORMERS[kind]
    hf_model(kind, **settings).save_pretrained(tmp_path)
    processor = getattr(transformers, f"{processor}ImageProcessor")
    processor(**SAVED_BY_TRANSFORMERS[kind][2]).save_pretrained(tmp_path)
    larger = {
        key: {side: pixels * 2 for side, pixels in size.items()} for key, size in SAVED_BY_TRANSFORMERS[kind][2].items()
    }
    vit = open_vit(tmp_path, img_size=64)
    assert torch.equal(vit.transform(picture), processor(**larger)(picture, return_tensors="pt").pixel_values[0])
    assert open_vit(tmp_path, img_size=(24, 40)).transform(picture).shape == (3, 24, 40)
    with pytest.raises(DataError, match="60x60 pixels does not divide into patches of 8x8"):
        open_vit(tmp_path, img_size=60)


def test_model_of_transformers_without_an_image_processor_takes_tensors_only(tmp_path):
    transformers.ViTModel(transformers.ViTConfig(**VISION)).save_pretrained(tmp_path)
    opened = open_vit(tmp_path)
    assert (opened.transform, opened.preprocessing) == (None, "unknown")
    assert opened.model(torch.randn(1, 3, 32, 32)).last_hidden_state.shape[0] == 1


def test_classifier_of_transformers_is_opened_without_its_head(tmp_path):
    source = transformers.ViTForImageClassification(transformers.ViTConfig(**VISION)).eval()
    source.save_pretrained(tmp_path)
    transformers.ViTImageProcessor(**SQUASHED).save_pretrained(tmp_path)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = open_vit(tmp_path).model(images).last_hidden_state
        assert torch.equal(tokens, source.vit(images).last_hidden_state)


def test_half_precision_weights_are_opened_in_float32_unless_asked(tmp_path):
    hf_model("ViT", **VISION).half().save_pretrained(tmp_path)
    transformers.ViTImageProcessor(**SQUASHED).save_pretrained(tmp_path)
    assert open_vit(tmp_path).model.dtype == torch.float32
    assert open_vit(tmp_path, dtype=torch.bfloat16).model.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["vit_nano_reg4", "vit_nano_reg4.digits"])
def test_weights_that_ship_with_the_package(name, picture):
    vit = open_vit(name)
    assert same_weights(vit.model, timm.create_model("vit_nano_reg4", pretrained=True))
    assert (vit.name, vit.untrained) == ("vit_nano_reg4.digits", False)
    assert torch.equal(vit.transform(picture), timm_transform(vit.model, 32)(picture))
    assert vit.preprocessing == f"resize shorter side to 32 (bicubic), crop 32x32 from the centre, {IMAGENET}"


@pytest.mark.parametrize("name", ["vit_nano_reg2", "test_vit4", "vit_small_reg1"])
def test_names_without_weights_are_untrained_and_the_same_every_time(name, picture):
    before = torch.get_rng_state()
    vit = open_vit(name)
    assert torch.equal(torch.get_rng_state(), before)
    assert vit.untrained
    assert not vit.model.training
    assert vit.name == f"{name} (untrained)"
    torch.manual_seed(1)
    assert same_weights(open_vit(name).model, vit.model)
    assert not same_weights(vit.model, timm.create_model(name))
    size = vit.model.patch_embed.img_size[0]
    assert torch.equal(vit.transform(picture), timm_transform(vit.model, size)(picture))


def test_bundle_at_another_size(tmp_path, picture):
    bundle = random_bundle("vit_base_reg1_deit3", **TINY, img_size=64)
    bundle.save(tmp_path / "bundle")
    vit = open_vit(tmp_path / "bundle", img_size=(32, 48))
    assert same_weights(vit.model, ModelBundle.load(tmp_path / "bundle").build(img_size=(32, 48)))
    assert vit.transform(picture).shape == (3, 32, 48)
    assert vit.model(vit.transform(picture)[None]).shape == (1, 10)
    assert vit.preprocessing.startswith("resize to cover 32x48 (bicubic), crop 32x48 from the centre, mean")
    with pytest.raises(DataError, match="60x60 pixels does not divide into patches of 16x16"):
        open_vit(tmp_path / "bundle", img_size=60)


def test_folder_of_timm(tmp_path, picture):
    source = randomised(timm.create_model("test_vit", num_classes=3))
    timm.models.save_for_hf(source, tmp_path, model_config=dict(num_classes=3), safe_serialization=True)
    vit = open_vit(tmp_path)
    assert same_weights(vit.model, source)
    assert torch.equal(vit.transform(picture), timm_transform(source, 160)(picture))
    larger = open_vit(tmp_path, img_size=192)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=192)
    assert same_weights(larger.model, theirs)
    assert larger.transform(picture).shape == (3, 192, 192)


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_words_follow_timms_crop_modes(mode, picture):
    model = timm.create_model("test_vit", pretrained_cfg_overlay={"crop_mode": mode, "crop_pct": 0.8})
    vit = open_vit(model)
    assert {"squash": "resize to 200x200", "border": "resize to fit into 200x200"}[mode] in vit.preprocessing
    resize = vit.transform.transforms[0](picture).size
    assert resize == {"squash": (200, 200), "border": (200, 150)}[mode]


@pytest.mark.parametrize("wrapped", [lambda m: m, torch.compile, nn.DataParallel])
def test_module_is_returned_as_it_is(wrapped, picture):
    model = timm.create_model("test_vit", img_size=64).double().train()
    vit = open_vit(wrapped(model), device="meta", dtype=torch.float16)
    assert next(vit.model.parameters()) is model.cls_token
    assert vit.model.training
    assert (model.cls_token.dtype, model.cls_token.device.type) == (torch.float64, "cpu")
    assert vit.name == "VisionTransformer"
    assert torch.equal(vit.transform(picture), timm_transform(model, 64)(picture))


def test_module_of_fixed_size_takes_no_other():
    args = dict(depth=1, img_size=64)
    with pytest.raises(DataError, match="takes images of 64x64 pixels only, not 32x32"):
        open_vit(timm.create_model("vit_tiny_patch16_224", **args), img_size=32)
    dynamic = timm.create_model("vit_tiny_patch16_224", **args, dynamic_img_size=True)
    assert "crop 32x32" in open_vit(dynamic, img_size=32).preprocessing


def test_module_of_transformers_has_the_processor_beside_its_weights(tmp_path, picture):
    settings, _, sizes, words = SAVED_BY_TRANSFORMERS["CLIP"]
    built = hf_model("CLIP", **settings)
    assert (open_vit(built).transform, open_vit(built).preprocessing) == (None, UNKNOWN)
    built.save_pretrained(tmp_path)
    without = transformers.CLIPModel.from_pretrained(tmp_path)
    assert open_vit(without).transform is None
    processor = transformers.CLIPImageProcessor(**sizes)
    processor.save_pretrained(tmp_path)
    loaded = open_vit(transformers.CLIPModel.from_pretrained(tmp_path))
    assert loaded.preprocessing == words
    assert torch.equal(loaded.transform(picture), processor(picture, return_tensors="pt").pixel_values[0])


def test_module_around_timms_network_has_timms_preprocessing(tmp_path, picture):
    random_bundle("vit_small_reg0", **TINY, img_size=56).save(tmp_path / "bundle")
    model = transformers.AutoModel.from_pretrained(tmp_path / "bundle")
    vit = open_vit(model, img_size=28)
    assert vit.model is model
    assert torch.equal(vit.transform(picture), timm_transform(model.timm_model, 28)(picture))


def test_preprocessing_of_transformers_wrapper_is_that_of_its_configuration(tmp_path, picture):
    cfg = dict(input_size=[3, 64, 64], mean=[0.1, 0.2, 0.3], std=[0.4, 0.5, 0.6], crop_pct=0.8, interpolation="bicubic")
    config = transformers.TimmWrapperConfig(architecture="test_vit", pretrained_cfg=cfg, model_args={"img_size": 64})
    transformers.TimmWrapperModel(config).save_pretrained(tmp_path)
    vit = open_vit(tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path)
    assert torch.equal(vit.transform(picture), processor(picture).pixel_values[0])
    assert vit.preprocessing.endswith("mean (0.1, 0.2, 0.3), std (0.4, 0.5, 0.6)")


def test_module_that_tells_nothing():
    assert open_vit(nn.Linear(1, 1)).preprocessing == UNKNOWN


def save_each_kind(folder, seed):
    """A bundle, a model of timm and one of transformers."""
    random_bundle(f"vit_nano_reg{seed}").save(folder / "bundle")
    source = randomised(timm.create_model("test_vit"), seed=seed)
    timm.models.save_for_hf(source, folder / "timm", safe_serialization=True)
    hf_model("Dinov2", **VISION | {"num_hidden_layers": seed}).save_pretrained(folder / "transformers")
    sizes = {"size": {"shortest_edge": 32 + seed}, "crop_size": {"height": 32, "width": 32}}
    transformers.BitImageProcessor(**sizes).save_pretrained(folder / "transformers")


@pytest.mark.parametrize("kind", ["bundle", "timm", "transformers"])
def test_repository_is_opened_as_its_folder(kind, hub, tmp_path, picture):
    repo, api = f"lab/{kind}", hf.HfApi()
    api.create_repo(repo)
    for seed in (1, 2):
        save_each_kind(tmp_path / str(seed), seed)
        api.upload_folder(repo_id=repo, folder_path=tmp_path / str(seed) / kind)
    older = hub.repos[repo].commits[-2].oid
    for name, folder in ((f"hf-hub:{repo}", "2"), (f"hf-hub:{repo}@{older}", "1")):
        vit, by_folder = open_vit(name), open_vit(tmp_path / folder / kind)
        assert vit.name == name
        assert same_weights(vit.model, by_folder.model)
        assert vit.preprocessing == by_folder.preprocessing
        assert torch.equal(vit.transform(picture), by_folder.transform(picture))
    with pytest.raises(HubError, match="no such branch, tag or commit"):
        open_vit(f"hf-hub:{repo}@nothing")


@pytest.mark.parametrize("name", ["test_vit.r160_in1k", "test_vit"])
def test_name_with_and_without_a_tag_asks_for_the_same_weights(hub, name):
    with pytest.raises(HubError, match=rf"no repository {name}"):
        open_vit(name)
    source = randomised(timm.create_model("test_vit"))
    timm.models.push_to_hf_hub(source, "lab/source", safe_serialization=True)
    hub.repos["timm/test_vit.r160_in1k"] = hub.repos["lab/source"]
    vit = open_vit(name)
    assert not vit.untrained
    assert same_weights(vit.model, source)


@pytest.mark.parametrize(
    ("name", "error", "says"),
    [
        ("vit_smal_reg4", UnknownArchError, "closest: vit_small_reg4"),
        ("vit_tiny_patch16_22", UnknownArchError, "closest: vit_tiny_patch16_224"),
        ("vit_tiny_patch16_224.none", UnknownArchError, "has no weights 'none'; it has augreg_in21k"),
        ("vit_nano_reg4.none", UnknownArchError, "has no weights 'none'; it has digits"),
        ("some/folder", UnknownArchError, "there is no folder and no architecture 'some/folder'"),
        ("hf-hub:too/many/parts", HubError, "is not a repository id"),
        ("hf-hub:lab/model", HubError, "cannot be reached"),
    ],
)
def test_unknown_names(name, error, says):
    with pytest.raises(error, match=says) as caught:
        open_vit(name)
    assert "\n" not in str(caught.value)


def test_network_without_a_choice_of_size():
    with pytest.raises(DataError, match="resnet10t takes no other image size"):
        open_vit("resnet10t", img_size=64)


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": "{"},
        {"config.json": "{}"},
        {"config.json": '{"model_type": "no_such_model"}'},
        {"config.json": '{"model_type": "vit"}'},
        {"config.json": '{"architecture": "test_vit"}'},
        {"config.json": '{"architecture": "no_such_model"}', "model.safetensors": "x"},
        {"config.json": '{"architecture": "test_vit"}', "model.safetensors": "x"},
        {"config.json": '{"vitreg": {}}'},
        {"config.json": "[]"},
    ],
    ids=str,
)
def test_folder_that_holds_no_model(files, tmp_path):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(BundleError, match=str(tmp_path)) as caught:
        open_vit(tmp_path)
    assert "\n" not in str(caught.value)


TINIEST = {
    "timm": lambda folder: timm.models.save_for_hf(timm.create_model("test_vit"), folder, safe_serialization=True),
    "transformers": lambda folder: hf_model("ViT", **VISION).save_pretrained(folder),
}
MORE_THAN_ITS_WEIGHTS = [
    ("transformers", {"num_hidden_layers": 10**9}, "500 is the most"),
    ("transformers", {"hidden_size": 10**7}, "32,768 is the most"),
    ("transformers", {"num_hidden_layers": 500, "hidden_size": 32_000}, "cannot fill"),
    ("transformers", {"num_hidden_layers": 500}, "cannot fill"),
    ("transformers", {"num_hidden_layers": 3}, "lack 16 tensors of blocks"),
    ("transformers", {"image_size": 99_999, "patch_size": 1}, "cannot fill"),
    ("timm", {"depth": 500, "embed_dim": 1024, "num_heads": 1}, "cannot fill"),
    ("timm", {"embed_dim": 32_000, "num_heads": 1}, "cannot fill"),
    ("timm", {"img_size": 16_000, "patch_size": 1}, "cannot fill"),
]


@pytest.mark.timeout(60)  # for ever, without a bound
@pytest.mark.parametrize(("kind", "asked", "says"), MORE_THAN_ITS_WEIGHTS)
def test_config_asks_for_more_than_its_weights(kind, asked, says, tmp_path):
    TINIEST[kind](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_args": asked} if kind == "timm" else asked
    (tmp_path / "config.json").write_text(json.dumps(config))
    with within_bounds(), pytest.raises(BundleError, match=says) as caught:
        open_vit(tmp_path)
    assert "\n" not in str(caught.value)


def test_repository_asks_for_more_than_its_weights(hub, tmp_path):
    TINIEST["timm"](tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_args": {"embed_dim": 32_000, "num_heads": 1}}))
    hf.HfApi().create_repo("lab/huge")
    hf.HfApi().upload_folder(repo_id="lab/huge", folder_path=tmp_path)
    with within_bounds(), pytest.raises(BundleError, match="cannot fill"):
        open_vit("hf-hub:lab/huge")
    assert not any("model.safetensors" in path and method == "GET" for method, path, _ in hub.requests)
