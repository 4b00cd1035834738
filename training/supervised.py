"""Supervised training of a register ViT with accelerate: one recipe, one loop, one bundle."""

import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from typing import Any

import datasets
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed, tqdm
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm

from vitreg_hub.bundle import ModelBundle, Provenance

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run, completely. The defaults suit a few thousand small images that are not mirror-symmetric.

    Attributes:
        arch: Architecture to train from scratch.
        epochs: Passes over the training images.
        batch_size: Images per step and process.
        opt: timm's name of the optimiser.
        lr: Peak learning rate.
        weight_decay: Decoupled; timm's ViTs exempt biases, norms, positions, class token and registers.
        warmup_epochs: Linear warm-up; a cosine to 0 follows.
        layer_scale: Initial LayerScale. DINOv2's 1e-5 is for hundreds of thousands of steps: a few hundred go by before
            its blocks do anything.
        label_smoothing: Of the cross-entropy.
        crop_scale: Range of the random crop's area, as a share of the image.
        seed: Of everything that is random.
    """

    arch: str = "vit_nano_reg4"
    epochs: int = 10
    batch_size: int = 32
    opt: str = "nadamuon"
    lr: float = 2e-3
    weight_decay: float = 0.05
    warmup_epochs: int = 1
    layer_scale: float = 0.1
    label_smoothing: float = 0.0
    crop_scale: tuple[float, float] = (0.8, 1.0)
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainResult:
    """A trained model and how it got there.

    Attributes:
        bundle: The model after the last epoch.
        accuracy: Top-1 on the held-out split, in [0, 1].
        history: Per epoch: epoch, mean training loss, held-out accuracy.
    """

    bundle: ModelBundle
    accuracy: float
    history: list[dict[str, float]] = field(default_factory=list)


def train(recipe: Recipe, *, train_set: datasets.Dataset, test_set: datasets.Dataset, dataset: str) -> TrainResult:
    """Train a classifier from scratch and measure it on the held-out split after every epoch.

    Args:
        recipe: The run.
        train_set: Columns `image` and `label`.
        test_set: The same columns; never trained on.
        dataset: Name of the data, for the record.

    Returns:
        The model of the last epoch with its measured accuracy.
    """
    set_seed(recipe.seed)
    accelerator = Accelerator()
    labels = train_set.features["label"].names
    model = timm.create_model(recipe.arch, num_classes=len(labels), init_values=recipe.layer_scale)
    loader, test_loader = _loaders(recipe, model, train_set, test_set)
    optimizer = create_optimizer_v2(model, opt=recipe.opt, lr=recipe.lr, weight_decay=recipe.weight_decay)
    network, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
    steps = len(loader)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps,
        warmup_t=recipe.warmup_epochs * steps,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    criterion = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)

    history = []
    with logging_redirect_tqdm(), tqdm(total=recipe.epochs * steps, desc=f"train {recipe.arch}", unit="step") as bar:
        for epoch in range(1, recipe.epochs + 1):
            losses = []
            for step, (images, targets) in enumerate(loader, start=(epoch - 1) * steps):
                schedule.step_update(step)
                loss = criterion(network(images), targets)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(loss.detach())
                bar.update()
            mean_loss = accelerator.gather(torch.stack(losses)).mean().item()
            accuracy = _accuracy(accelerator, network, test_loader)
            history.append({"epoch": epoch, "loss": mean_loss, "accuracy": accuracy})
            logger.info("epoch %d/%d  loss %.3f  held-out accuracy %.3f", epoch, recipe.epochs, mean_loss, accuracy)

    provenance = Provenance(
        origin=f"trained from scratch on {dataset} with vitreg_hub's supervised recipe",
        license="apache-2.0",
        dataset=dataset,
        metrics={"accuracy": accuracy},
        settings=asdict(recipe) | {"test_images": len(test_set), "train_images": len(train_set)},
        versions={name: version(name) for name in ("vitreg_hub", "torch", "timm", "accelerate")},
    )
    bundle = ModelBundle.from_timm(
        accelerator.unwrap_model(network), arch=recipe.arch, provenance=provenance, label_names=tuple(labels)
    )
    return TrainResult(bundle=bundle, accuracy=accuracy, history=history)


def _loaders(recipe: Recipe, model: nn.Module, *sets: datasets.Dataset) -> Iterator[DataLoader]:
    """Yield a shuffled, augmented loader for the first set and a plain one for each other."""
    config = resolve_model_data_config(model)
    augment = create_transform(
        **config, is_training=True, scale=recipe.crop_scale, ratio=(0.9, 1.1), hflip=0.0, color_jitter=None
    )
    plain = create_transform(**config)

    def collate(transform: Any):
        def batch(rows: list[dict[str, Any]]) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.stack([transform(row["image"]) for row in rows]), torch.tensor([row["label"] for row in rows])

        return batch

    for i, data in enumerate(sets):
        transform, shuffle = (augment, True) if i == 0 else (plain, False)
        yield DataLoader(data, batch_size=recipe.batch_size, shuffle=shuffle, collate_fn=collate(transform))


@torch.inference_mode()
def _accuracy(accelerator: Accelerator, network: nn.Module, loader: DataLoader) -> float:
    network.eval()
    hits = [accelerator.gather_for_metrics(network(images).argmax(1) == targets) for images, targets in loader]
    network.train()
    return torch.cat(hits).float().mean().item()
