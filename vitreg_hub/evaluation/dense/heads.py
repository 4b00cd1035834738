"""Linear heads on the patches of a frozen ViT: what they share, and the one that tells every pixel's class."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vitreg_hub.errors import BundleError, DataError
from vitreg_hub.evaluation.dense.features import Fit, dense_features
from vitreg_hub.evaluation.dense.maps import resized
from vitreg_hub.evaluation.dense.saved import Fits, read_head, write_head
from vitreg_hub.evaluation.dense.windows import by_windows
from vitreg_hub.network.layout import VitLayout, evaluating

Images = Tensor | Image.Image
"""Preprocessed images [B, 3, H, W], one image [3, H, W], or a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeadSettings:
    """What a head reads, and how.

    Attributes:
        blocks: As of `dense_features`, like the next four.
        normed: Each block passes through the final norm.
        use_cls: Each block's class token follows its patches.
        use_registers: The mean of the registers follows them.
        fit: What is done to images that the patch does not divide. After "pad" and "cut", what the head tells of the
            changed image is stretched over the image, as in the official code; "resize" avoids that shift.
        batchnorm: Normalise the features by batch norm before they are read.
        dropout: Share of the features' channels that is left out at each step of training.
        mean: Of the channels of the model's images, for pixels in [0, 1]; needed only for pictures.
        std: Standard deviations of the channels.
    """

    blocks: tuple[int, ...] = (-1,)
    normed: bool = True
    use_cls: bool = False
    use_registers: bool = False
    fit: Fit = "pad"
    batchnorm: bool = True
    dropout: float = 0.0
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None

    def __post_init__(self) -> None:
        if not self.blocks or not 0 <= self.dropout < 1 or self.fit not in get_args(Fit):
            raise DataError(
                f"blocks is {list(self.blocks)}, dropout is {self.dropout:g} and fit is {self.fit!r}: give at least "
                f"one block, a share below 1, and one of {', '.join(get_args(Fit))}."
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentationSettings(HeadSettings):
    """What a head for segmentation reads, and what it tells.

    Attributes:
        num_classes: How many classes there are.
        class_names: What they are called, if that is known.
    """

    num_classes: int
    class_names: tuple[str, ...] | None = None
    dropout: float = 0.1


Settings = TypeVar("Settings", bound=HeadSettings)


class DenseHead(nn.Module, Generic[Settings]):
    """A linear layer that reads the features of a frozen ViT, which is no part of it: neither trained nor saved."""

    settings_type: ClassVar[type[HeadSettings]]

    def __init__(self, model: nn.Module, settings: Settings, *, out_channels: int) -> None:
        """Draw the weights from N(0, 0.01^2), as officially.

        Raises:
            DataError: The model cannot be read, or has no such block or registers.
        """
        super().__init__()
        layout = VitLayout.of(model)
        depth, device = len(layout.blocks), layout.embedding.weight.device
        if wrong := [block for block in settings.blocks if not -depth <= block < depth]:
            raise DataError(f"block {wrong[0]} does not exist: the model has {depth}, 0 to {depth - 1}.")
        self.settings = settings
        self._frozen = (model,)  # in a tuple, so that it is no child
        parts = 1 + settings.use_cls + settings.use_registers
        channels = layout.embedding.out_channels * len(settings.blocks) * parts
        self.dropout = nn.Dropout2d(settings.dropout)
        self.norm = nn.BatchNorm2d(channels, device=device) if settings.batchnorm else nn.Identity()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size=1, device=device)
        nn.init.normal_(self.conv.weight, std=0.01)
        nn.init.zeros_(self.conv.bias)  # pyright: ignore[reportArgumentType]  # it has one

    @property
    def model(self) -> nn.Module:
        """The frozen ViT."""
        return self._frozen[0]

    def save(self, path: str | Path) -> Path:
        """Write the head's weights and settings to a new .safetensors file, without the model.

        Raises:
            BundleError: The file exists or cannot be written.
        """
        settings = {"kind": type(self).__name__, **asdict(self.settings)}
        write_head(Path(path), self.state_dict(), settings=settings, fits=Fits.of(self.model))
        return Path(path)

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """Read a head that `save` wrote, in evaluation mode.

        Args:
            path: The file.
            model: The ViT that it was trained on.

        Raises:
            BundleError: The file cannot be read or holds another kind of head.
            DataError: The model is of another width, depth or patch size.
        """
        settings, tensors = read_head(Path(path), cls.settings_type, kind=cls.__name__, fits=Fits.of(model))
        head = cls(model, **asdict(settings))
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise BundleError(
                f"{path} does not hold the weights that its settings tell: save the head again."
            ) from error
        return head.eval()

    def features(self, images: Tensor) -> Tensor:
        """Features [B, C, rows, columns] that the head reads of images [B, 3, H, W]."""
        chosen = self.settings
        return dense_features(
            self.model,
            images,
            blocks=chosen.blocks,
            normed=chosen.normed,
            use_cls=chosen.use_cls,
            use_registers=chosen.use_registers,
            fit=chosen.fit,
        )

    def read(self, features: Tensor) -> Tensor:
        """What the head tells from features, at their own resolution."""
        return self.conv(self.norm(self.dropout(features)))

    def forward(self, images: Tensor) -> Tensor:
        """What the head tells of images [B, 3, H, W], at the resolution of the patches."""
        return self.read(self.features(images))

    def maps(
        self,
        images: Images,
        *,
        size: tuple[int, int] | None = None,
        crop: int | None = None,
        stride: int | None = None,
        input_size: tuple[int, int] | None = None,
        flip: bool = False,
    ) -> Tensor:
        """What the head tells of every pixel, [B, C, height, width].

        Args:
            images: Preprocessed images [B, 3, H, W] or [3, H, W], or a picture, which is normalised by `mean` and
                `std` of the settings.
            size: Height and width of the maps; by default the images'.
            crop: Side of sliding windows, see `by_windows`; None: the whole images at once.
            stride: Pixels from one window to the next.
            input_size: Resize the images to this height and width first.
            flip: Average with what the head tells of the mirrored images.

        Raises:
            DataError: These are no images for this head, or the numbers make no sense.
        """
        images = self.normalised(images)
        own = (images.shape[-2], images.shape[-1])
        if input_size is not None:
            images = resized(images, input_size)

        def told(images: Tensor) -> Tensor:
            maps = self(images)
            return (maps + self(images.flip(-1)).flip(-1)) / 2 if flip else maps

        with evaluating(self):
            if crop is None:
                return resized(told(images), size or own)
            slid = by_windows(lambda x: resized(told(x), (x.shape[-2], x.shape[-1])), images, crop=crop, stride=stride)
            return resized(slid, size or own)

    def normalised(self, images: Images) -> Tensor:
        """Images [B, 3, H, W] on the head's device, from whatever `maps` takes."""
        if isinstance(images, Image.Image):
            if self.settings.mean is None or self.settings.std is None:
                raise DataError(
                    "the head does not know the mean and std of the model's images: give them, or a tensor."
                )
            images = as_tensor(images, mean=self.settings.mean, std=self.settings.std)
        if images.ndim == 3:
            images = images[None]
        if images.ndim != 4 or not images.is_floating_point():
            raise DataError(f"images must be [B, 3, H, W] of floating-point numbers, not {list(images.shape)}.")
        return images.to(self.conv.weight.device)


class SegmentationHead(DenseHead[SegmentationSettings]):
    """Tells the class of every pixel from the patches of a frozen ViT: batch norm and a linear layer.

    Source: DINOv2 and DINOv3, section "linear segmentation": the last block for both; DINOv2's "+ms" reads the last
    four. DINOv2 has no dropout.

        head = SegmentationHead(model, num_classes=21)
        logits = head(images)  # [B, 21, H / patch, W / patch]
        classes = head.predict(images, crop=512)  # [B, H, W]
    """

    settings_type = SegmentationSettings

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        """A new head.

        Args:
            model: A ViT of timm or transformers, on the device where it is to run.
            **settings: Of `SegmentationSettings`; `num_classes` is needed.

        Raises:
            DataError: The model cannot be read, or the settings make no sense for it.
        """
        chosen = SegmentationSettings(**tuples(settings))
        if chosen.num_classes < 1 or (chosen.class_names and len(chosen.class_names) != chosen.num_classes):
            raise DataError(
                f"num_classes is {chosen.num_classes}, and {len(chosen.class_names or ())} classes have names: give at "
                "least one class, and a name for each or none."
            )
        super().__init__(model, chosen, out_channels=chosen.num_classes)

    def probabilities(self, images: Images, *, flip: bool = False, **how: Any) -> Tensor:
        """Probabilities [B, C, height, width] of the classes of every pixel.

        Args:
            images: As of `maps`.
            flip: Average with the probabilities in the mirrored images.
            **how: Further arguments of `maps`.
        """
        images = self.normalised(images)
        found = self.maps(images, **how).softmax(dim=1)
        return (found + self.maps(images.flip(-1), **how).softmax(dim=1).flip(-1)) / 2 if flip else found

    def predict(self, images: Images, *, flip: bool = False, **how: Any) -> Tensor:
        """Classes [B, height, width] of all pixels; arguments as of `probabilities`."""
        found = self.probabilities(images, flip=True, **how) if flip else self.maps(images, **how)
        return found.argmax(dim=1)


def as_tensor(picture: Image.Image, *, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """A picture as [3, H, W], normalised in the range 0 to 255 as officially."""
    pixels = torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32)).permute(2, 0, 1)
    shift, scale = (255 * torch.tensor(values, dtype=torch.float32)[:, None, None] for values in (mean, std))
    return (pixels - shift) / scale


def tuples(settings: dict[str, Any]) -> dict[str, Any]:
    """Lists as the tuples that settings hold."""
    return {name: tuple(value) if isinstance(value, list | range) else value for name, value in settings.items()}
