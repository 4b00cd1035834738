"""What CLIP models tell from the names of classes alone, by their text tower: classes of images, and of patches."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import huggingface_hub as hf
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.evaluation.discovery import normalised
from vitreg_hub.evaluation.scores import ClassScores, classification_scores
from vitreg_hub.files import OPENCLIP_CONFIG, OPENCLIP_WEIGHTS, TOWER_SUFFIX, find_tower
from vitreg_hub.images.source import Batch
from vitreg_hub.names import ModelName
from vitreg_hub.network.layout import VitLayout, evaluating
from vitreg_hub.passes import failing_together, gathered, in_order
from vitreg_hub.remote.client import hub_errors

LOGIT_SCALE = 100.0
"""Source: open_clip_train/zero_shot.py, whatever the model's own scale is."""
CLASSES_AT_ONCE = 10
"""Classes whose sentences pass the text tower together, as in open_clip."""

Templates = Sequence[str] | Sequence[Callable[[str], str]]
"""Sentences around a class's name, with {} in its place, or functions that make them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Towers:
    """Both towers of a CLIP model.

    Attributes:
        name: As it was given.
        model: As open_clip's, with `encode_image`, `encode_text` and `visual`.
        tokenize: Makes tokens [B, L] of texts.
        transform: Makes a tensor [3, H, W] of an RGB image.
        size: Height and width of the images.
        mean: Of the channels, for pixels in [0, 1].
        std: Standard deviations of the channels.
    """

    name: str
    model: Any
    tokenize: Callable[[list[str]], Tensor]
    transform: Callable[[Image.Image], Tensor]
    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def open_towers(
    model: nn.Module | str | Path,
    *,
    tokenize: Callable[[list[str]], Tensor] | None = None,
    device: torch.device | str | None = None,
) -> Towers:
    """Open a CLIP model with its text tower.

    Args:
        model: A bundle's folder that has both towers beside it, a folder of open_clip's form, the same two as
            ``hf-hub:org/name[@revision]``, or a model of open_clip.
        tokenize: For a model of open_clip, by default CLIP's own tokenizer.
        device: Where a model by name is put, the CPU by default. A module stays where it is.

    Raises:
        DataError: open_clip is not installed, or the model has no text tower.
        BundleError: The towers cannot be loaded.
        HubError: The Hub refused or cannot be reached.
    """
    library = _open_clip()
    words: Any = tokenize
    if isinstance(model, nn.Module):
        name, network = type(model).__name__, model
        if not hasattr(network, "encode_text"):
            raise DataError(f"{name} has no text tower, which zero-shot needs: give a CLIP model of open_clip.")
        words = words or library.SimpleTokenizer(context_length=getattr(network, "context_length", 77))
    else:
        name = str(model)
        place = f"local-dir:{_folder(model)}"
        try:
            network, _ = library.create_model_from_pretrained(place, device=device or "cpu")
            words = words or library.get_tokenizer(place)
        except (OSError, RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error).strip().partition("\n")[0]
            raise BundleError(
                f"both towers of {name} cannot be loaded by open_clip ({reason}): write them again; a trained pair "
                "whose folder was moved names the old place in its open_clip_config.json."
            ) from error
        network.eval()
    settings = library.transform.PreprocessCfg(**library.get_model_preprocess_cfg(network))
    size = settings.size
    return Towers(
        name=name,
        model=network,
        tokenize=words,
        transform=library.transform.image_transform_v2(settings, is_train=False),
        size=(size, size) if isinstance(size, int) else (size[0], size[1]),
        mean=tuple(settings.mean),
        std=tuple(settings.std),
    )


def _folder(model: str | Path) -> Path:
    """The folder of both towers."""
    name = ModelName.parse(model)
    if name.repo_id:
        with hub_errors(name.repo_id):
            own = hf.file_exists(name.repo_id, OPENCLIP_CONFIG, revision=name.revision)
            repo = name.repo_id if own else name.repo_id + TOWER_SUFFIX
            wanted = [OPENCLIP_WEIGHTS, "*.json", "*.txt"]
            return Path(hf.snapshot_download(repo, revision=name.revision, allow_patterns=wanted))
    if name.path:
        if (name.path / OPENCLIP_CONFIG).is_file():
            return name.path.absolute()
        if beside := find_tower(name.path):
            return beside
    raise DataError(
        f"{model} has no text tower, which zero-shot needs: give a CLIP model with both towers beside it, such as "
        "`vitreg convert --text-tower` and contrastive training write."
    )


def named_templates(name: Literal["openai", "simple"]) -> Templates:
    """open_clip's sentences for ImageNet: OpenAI's 80, or the 7 that are nearly as good.

    Raises:
        DataError: There are none of that name, or open_clip is not installed.
    """
    library = _open_clip()
    known = {"openai": library.OPENAI_IMAGENET_TEMPLATES, "simple": library.SIMPLE_IMAGENET_TEMPLATES}
    if name not in known:
        raise DataError(
            f"there are no templates {name!r}: choose from {', '.join(known)}, or give sentences with {{}}."
        )
    return known[name]


def class_embeddings(
    model: Any,
    tokenize: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Templates,
    *,
    progress: bool = False,
) -> Tensor:
    """What the text tower makes of names: of length 1, the mean over templates of embeddings of length 1.

    Source: open_clip/zero_shot_classifier.py, which runs here, ten classes at a time.

    Args:
        model: With `encode_text` as open_clip's.
        tokenize: Makes tokens [B, L] of texts.
        names: Of the classes.
        templates: Sentences around a name.
        progress: Show a bar.

    Returns:
        [E, C] on the model's device.

    Raises:
        DataError: There are no names or templates, a template has no place for a name, or open_clip is not installed.
    """
    if not names or not templates:
        raise DataError("zero-shot needs names of classes and sentences around them: give at least one of each.")
    if wrong := [text for text in templates if isinstance(text, str) and "{}" not in text]:
        raise DataError(f"the template {wrong[0]!r} has no {{}} in the place of a class's name.")
    return _open_clip().build_zero_shot_classifier(
        model,
        tokenize,
        list(names),
        templates,
        num_classes_per_batch=CLASSES_AT_ONCE,
        device=next(model.parameters()).device,
        use_tqdm=progress,
    )


def zero_shot_logits(model: Any, images: Tensor, classifier: Tensor) -> Tensor:
    """Logits [B, C] of images [B, 3, H, W]: a hundred times their cosines to embeddings of classes [E, C]."""
    with evaluating(model):
        features = model.encode_image(images.to(classifier.device, classifier.dtype), normalize=True)
        return LOGIT_SCALE * features @ classifier


def zero_shot(
    towers: Towers,
    batches: Iterable[Batch],
    *,
    names: Sequence[str],
    templates: Templates | None = None,
    progress: bool = False,
    world_size: int = 1,
) -> ClassScores:
    """Classify images by the names of the classes. Images without a label do not count.

    Source: open_clip_train/zero_shot.py.

    Args:
        towers: From `open_towers`.
        batches: Labelled images, this process's share, made by the towers' transform (`ImageSource.batches`).
        names: Of the classes.
        templates: By default OpenAI's 80 for ImageNet.
        progress: Show a bar while texts are embedded.
        world_size: Number of processes, which share the images; all must call it.

    Raises:
        DataError: As of `class_embeddings`, no image has a label, or an image cannot be used.
    """
    classifier = class_embeddings(
        towers.model, towers.tokenize, names, templates or named_templates("openai"), progress=progress
    )
    parts = []
    with failing_together(world_size=world_size):
        for batch in batches:
            if batch.labels is None:
                raise DataError("the images have no labels: give images in one folder per class.")
            logits = zero_shot_logits(towers.model, batch.images, classifier).float().cpu()
            parts.append({"indices": batch.indices, "logits": logits, "labels": batch.labels})
    shares = [part for share in gathered(parts, world_size=world_size) for part in share]
    seen = in_order(shares)
    if not seen or not (seen["labels"] >= 0).any():
        raise DataError("no image has a label: give labelled images.")
    known = seen["labels"] >= 0
    return classification_scores(seen["logits"][known], seen["labels"][known])


def patch_embeddings(model: Any, images: Tensor, *, values: bool = True) -> Tensor:
    """Patches in the space of texts, of length 1: through the final norm and the image tower's projection.

    Source: MaskCLIP (Zhou et al., Extract free dense labels from CLIP, 2022), whose last block attends from each patch
    to itself alone, since the values are what the class token gathers.

    Args:
        model: A CLIP model of open_clip.
        images: [B, 3, H, W], preprocessed.
        values: Let tokens of the last block attend to themselves alone, as MaskCLIP; otherwise as trained.

    Returns:
        [B, rows, columns, E] in float32.

    Raises:
        DataError: The image tower is not a ViT that can be read, or pools by attention.
    """
    visual = model.visual
    if (trunk := getattr(visual, "trunk", None)) is not None:
        layout = VitLayout.of(trunk)
        last, norm, grid = layout.blocks[-1], layout.norm, layout.grid(images)
        pools = getattr(trunk, "attn_pool", None) is not None
    elif isinstance(blocks := getattr(getattr(visual, "transformer", None), "resblocks", None), nn.ModuleList):
        last, norm, grid = blocks[-1], visual.ln_post, visual.grid_size
        pools = visual.attn_pool is not None
    else:
        raise DataError(f"the patches of a {type(visual).__name__} cannot be read: give a CLIP model with a ViT.")
    if pools:
        raise DataError("the image tower pools by attention, so its patches have no place among the texts.")
    found: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        found.append(output)

    with evaluating(model), ExitStack() as hooks:
        if values:
            hooks.callback(last.register_forward_pre_hook(_attend_to_themselves, with_kwargs=True).remove)
        hooks.callback(last.register_forward_hook(keep).remove)
        visual(images)
        patches = norm(found[0])[:, -grid[0] * grid[1] :]
        patches = visual.head(trunk.head(patches)) if trunk is not None else patches @ visual.proj
        return F.normalize(patches.float(), dim=-1).unflatten(1, grid)


def _attend_to_themselves(
    block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    tokens = args[0]
    mask = tokens.new_full((tokens.shape[1],) * 2, float("-inf")).fill_diagonal_(0)
    return args, kwargs | {"attn_mask": mask}


def zero_shot_masks(
    towers: Towers, images: Iterable[Image.Image], classifier: Tensor, *, values: bool = True
) -> Iterator[Tensor]:
    """Yield the class [H, W] of every pixel of each picture: the nearest text of its patch.

    Pictures are resized to the size that the image tower takes, all of the picture, and cosines of patches are
    enlarged bilinearly to the picture's own size.

    Args:
        towers: From `open_towers`.
        images: Of any size.
        classifier: [E, C] from `class_embeddings`.
        values: As in `patch_embeddings`.

    Raises:
        DataError: As of `patch_embeddings`.
    """
    height, width = towers.size
    for image in images:
        resized = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
        pixels = normalised(resized, mean=towers.mean, std=towers.std)[None]
        patches = patch_embeddings(towers.model, pixels.to(classifier.device, classifier.dtype), values=values)
        cosines = (patches @ classifier.float()).permute(0, 3, 1, 2)
        yield F.interpolate(cosines, size=(image.height, image.width), mode="bilinear")[0].argmax(dim=0).cpu()


def _open_clip() -> ModuleType:
    """Import open_clip, which is an extra and takes seconds to import."""
    if find_spec("open_clip") is None:
        raise DataError("zero-shot needs open_clip: pip install 'vitreg_hub[clip]'.")
    import open_clip

    return open_clip
