"""The main job on embedded data: train, bundle, verify, draw, and optionally publish and load back."""

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from timm.data import create_transform, resolve_model_data_config

from vitreg_hub.analysis.figures.maps import token_figure
from vitreg_hub.bundle.doors import verify
from vitreg_hub.bundle.model_bundle import ModelBundle
from vitreg_hub.errors import BundleError, TrainingError
from vitreg_hub.files import whole_file
from vitreg_hub.hub.publish import pull, push, require_token
from vitreg_hub.images.embedded import digits
from vitreg_hub.images.source import Transform
from vitreg_hub.model_cards.card import with_doors
from vitreg_hub.training.loop import train
from vitreg_hub.training.recipes.named import RECIPES
from vitreg_hub.training.recipes.settings import Recipe

FIGURE, NUM_IMAGES = "tokens.png", 4


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartResult:
    """What the quickstart has made.

    Attributes:
        figure: PNG of inputs, patch norms and attention.
        accuracy: Top-1 on the held-out digits, in [0, 1].
        doors: Largest difference in the model's outputs for each way to open it.
    """

    model: Path
    figure: Path
    accuracy: float
    doors: dict[str, float]
    commit: str | None = None


def quickstart(
    out: str | Path = "quickstart", *, push_to: str | None = None, recipe: Recipe | None = None
) -> QuickstartResult:
    """Train a ViT with registers on scikit-learn's digits and do everything with it, or resume an earlier call.

    Args:
        out: The run's folder, with what `train` writes (the bundle is `model`) and `tokens.png`.
        push_to: ``org/name`` to publish the model under; it is then loaded back and compared.
        recipe: A supervised run on digits to use instead of `supervised_digits`.

    Raises:
        RecipeError: `out` holds a run of another recipe.
        BundleError: `out` holds something else or cannot be written to, or the Hub returned another model than was
            sent.
        TrainingError: The run was asked to stop.
        HubError: Publishing failed; `out` is complete nevertheless.
    """
    if push_to:
        require_token(push_to)
    result = train(recipe or RECIPES["supervised_digits"](), out)
    if result.model is None:
        raise TrainingError(
            f"stopped after step {result.step} of {result.total_steps}: run the same command again to go on."
        )
    figure = _draw(result.model, result.folder / FIGURE)
    doors = verify(result.model)
    commit = None
    if push_to:
        commit = push(result.model, push_to).url
        _compare_with_hub(result.model, push_to)
    return QuickstartResult(
        model=result.model, figure=figure, accuracy=result.metrics["eval/accuracy"], doors=doors, commit=commit
    )


def _draw(model: Path, file: Path) -> Path:
    """Draw the tokens of some held-out digits."""
    vit = ModelBundle.load(model).build()
    transform = cast(Transform, create_transform(**resolve_model_data_config(vit)))
    images = torch.stack([transform(image) for image in digits("test")[:NUM_IMAGES]["image"]])
    with whole_file(file, replace=True) as path:
        token_figure(vit, images, file=path)
    return file


def _compare_with_hub(folder: Path, repo_id: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        back = ModelBundle.load(pull(repo_id, Path(scratch, "model")))
        sent = with_doors(ModelBundle.load(folder), back.provenance.doors)  # told by the push
        same = sent.to_json() == back.to_json() and all(
            torch.equal(tensor, back.state_dict[name]) for name, tensor in sent.state_dict.items()
        )
        if not same:
            raise BundleError(f"what {repo_id} returned is not what was sent: someone else may have pushed to it.")
