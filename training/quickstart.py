"""The main job on embedded data: train, bundle, verify, look, and, if asked, publish and load back."""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import create_transform, resolve_model_data_config

from vitreg_hub.analysis.figures import token_figure
from vitreg_hub.bundle import ModelBundle
from vitreg_hub.bundle_form import write_folder
from vitreg_hub.datasets import digits
from vitreg_hub.doors import verify
from vitreg_hub.errors import BundleError
from vitreg_hub.hub import pull, push, require_token
from vitreg_hub.model_cards.card import render
from vitreg_hub.training.supervised import Recipe, train


@dataclass(frozen=True, kw_only=True, slots=True)
class QuickstartResult:
    """What the quickstart made.

    Attributes:
        model: Folder of the bundle.
        figure: PNG of inputs, patch norms and attention.
        accuracy: Top-1 on the held-out digits, in [0, 1].
        doors: Largest difference between the ways to open the model, per way.
        commit: Address of the commit, if it was published.
    """

    model: Path
    figure: Path
    accuracy: float
    doors: dict[str, float]
    commit: str | None = None


def quickstart(
    out: str | Path = "quickstart", *, push_to: str | None = None, recipe: Recipe | None = None
) -> QuickstartResult:
    """Train a register ViT on scikit-learn's digits and take it all the way.

    Args:
        out: New folder: `model` is the bundle, `tokens.png` the figure.
        push_to: ``org/name`` to publish it under; it is then loaded back and compared.
        recipe: Another run than the default one.

    Raises:
        BundleError: `out` exists or cannot be written to, or what came back from the Hub is not what was sent.
        HubError: Publishing failed; `out` is complete all the same.
    """
    out = Path(out)
    if push_to:
        require_token(push_to)
    test_set, accuracies = digits("test"), []

    def fill(staging: Path) -> None:
        result = train(recipe or Recipe(), train_set=digits("train"), test_set=test_set, dataset="scikit-learn digits")
        accuracies.append(result.accuracy)
        result.bundle.save(staging / "model", card=render(result.bundle))
        vit = result.bundle.build()
        transform = create_transform(**resolve_model_data_config(vit))
        images = torch.stack([transform(row["image"]) for row in test_set.select(range(4))])
        token_figure(vit, images, file=staging / "tokens.png")

    write_folder(out, fill)
    doors = verify(out / "model")
    commit = None
    if push_to:
        commit = push(out / "model", push_to)
        _compare_with_hub(out / "model", push_to)
    return QuickstartResult(
        model=out / "model", figure=out / "tokens.png", accuracy=accuracies[0], doors=doors, commit=commit
    )


def _compare_with_hub(folder: Path, repo_id: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        sent, back = ModelBundle.load(folder), ModelBundle.load(pull(repo_id, Path(scratch, "model")))
        same = sent.config() == back.config() and all(
            torch.equal(tensor, back.state_dict[name]) for name, tensor in sent.state_dict.items()
        )
        if not same:
            raise BundleError(f"what {repo_id} returned is not what was sent: someone else may have pushed to it.")
