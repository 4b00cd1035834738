"""Augmentations: from an image to normalised views."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image
from timm.data import create_transform
from timm.data.auto_augment import rand_augment_transform
from torch import Tensor
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from vitreg_hub.errors import RecipeError
from vitreg_hub.images.pictures import Gray
from vitreg_hub.training.recipes.settings import Augment, CropAugment, MultiCrop, ThreeAugment


@dataclass(frozen=True, kw_only=True, slots=True)
class Views:
    """Makes one view after the other of the same image, and draws from the global generators for it."""

    transforms: tuple[Callable[[Image.Image], Tensor], ...]

    def __call__(self, image: Image.Image) -> tuple[Tensor, ...]:
        """Views [C, H, W] of an RGB image."""
        return tuple(transform(image) for transform in self.transforms)


def build_augment(
    settings: Augment,
    *,
    img_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    interpolation: str,
    in_chans: int = 3,
) -> Views:
    """Make the transform of a recipe, which can be pickled.

    It makes one view of `img_size` pixels a side, or with multi-crop two such global ones and then the local ones.
    The interpolation has timm's name. For one channel, views are grey.

    Raises:
        RecipeError: timm cannot read the configuration of RandAugment.
    """
    target = {"mean": tuple(mean), "std": tuple(std), "interpolation": interpolation}
    if in_chans == 1:
        rgb = build_augment(settings, img_size=img_size, **target)
        return Views(transforms=tuple(Gray(transform=transform) for transform in rgb.transforms))
    match settings:
        case CropAugment():
            return Views(transforms=(_crop_augment(settings, img_size, target),))
        case ThreeAugment():
            return Views(transforms=(_three_augment(settings, img_size, target),))
        case MultiCrop():
            first, second, local = settings.blur
            global_crops = (
                _crop(settings, img_size, settings.global_scale, first, 0.0, **target),
                _crop(settings, img_size, settings.global_scale, second, settings.solarize, **target),
            )
            local_crop = _crop(settings, settings.local_size, settings.local_scale, local, 0.0, **target)
            return Views(transforms=global_crops + (local_crop,) * settings.num_local)


def _crop_augment(settings: CropAugment, img_size: int, target: dict[str, Any]) -> transforms.Compose:
    if settings.rand_augment is not None:
        try:
            rand_augment_transform(settings.rand_augment)
        except (AssertionError, ValueError) as error:
            raise RecipeError(
                f"augment.rand_augment is {settings.rand_augment!r}, which timm cannot read: give something like "
                "rand-m9-mstd0.5-inc1, or null for none."
            ) from error
    return create_transform(  # pyright: ignore[reportReturnType]  # not asked for in parts
        input_size=img_size,
        is_training=True,
        scale=settings.scale,
        ratio=settings.ratio,
        hflip=settings.hflip,
        color_jitter=None,  # pyright: ignore[reportArgumentType]  # timm reads it so
        auto_augment=settings.rand_augment,
        re_prob=settings.erasing,
        re_mode="pixel",  # noise, as in DeiT and OpenCLIP
        **target,
    )


def _three_augment(settings: ThreeAugment, img_size: int, target: dict[str, Any]) -> transforms.Compose:
    """timm's policy "3a" is DeiT-III's choice of three; "src" changes only the crop before it."""
    crop, colors, to_tensor = create_transform(  # pyright: ignore[reportGeneralTypeIssues]  # asked for in parts
        input_size=img_size,
        is_training=True,
        hflip=settings.hflip,
        color_jitter=settings.color_jitter,
        auto_augment="3a",
        separate=True,
        **target,
    )
    if settings.crop == "src":
        crop = transforms.Compose(
            [
                transforms.Resize(img_size, InterpolationMode(target["interpolation"])),
                transforms.RandomCrop(img_size, padding=4, padding_mode="reflect"),
                transforms.RandomHorizontalFlip(settings.hflip),
            ]
        )
    return transforms.Compose([crop, colors, to_tensor])


def _crop(
    settings: MultiCrop,
    size: int,
    scale: tuple[float, float],
    blur: float,
    solarize: float,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    interpolation: str,
) -> transforms.Compose:
    """One crop of DINOv2, with the classes that upstream uses: torchvision's newer ones differ in the last bit.

    Source: dinov2/data/augmentations.py.
    """
    jitter = transforms.ColorJitter(brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
    return transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale, settings.ratio, InterpolationMode(interpolation)),
            transforms.RandomHorizontalFlip(settings.hflip),
            transforms.RandomApply([jitter], settings.color_jitter),
            transforms.RandomGrayscale(settings.gray),
            transforms.RandomApply([transforms.GaussianBlur(9, (0.1, 2.0))], blur),
            transforms.RandomSolarize(128, solarize),
            transforms.ToTensor(),
            transforms.Normalize(mean, std),
        ]
    )
