"""The rule by which a lineage resamples position embeddings for another grid; imports no torch until it is applied."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from vitreg_hub.errors import BundleError

if TYPE_CHECKING:
    from torch import Tensor

Grid = tuple[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class PositionRule:
    """Bicubic interpolation of a position table, as one lineage does it. The defaults are timm's.

    Attributes:
        antialias: Whether the filter is widened when the grid shrinks; it also has another cubic coefficient.
        offset: Added to the new height and width before the scale is computed, and the table is then sampled at that
            scale (dinov2/models/vision_transformer.py, `interpolate_pos_encoding`); 0 samples by size.
        keep_equal_count: Whether a table with as many rows as the new grid is used as it is, whatever its shape
            (open_clip/model.py, `resize_pos_embed`).
    """

    antialias: bool = True
    offset: float = 0.0
    keep_equal_count: bool = False

    def __post_init__(self) -> None:
        for name in ("antialias", "keep_equal_count"):
            if not isinstance(getattr(self, name), bool):
                raise BundleError(f"positions.{name} must be true or false, not {getattr(self, name)!r}")
        if type(self.offset) not in (int, float) or not 0 <= self.offset < 1:  # also refuses anything but numbers
            raise BundleError(f"positions.offset must be a number from 0 to 1, 1 excluded, not {self.offset!r}")

    def resample(self, table: Tensor, *, old: Grid, new: Grid) -> Tensor:
        """Resample the rows of the patches; rows of other tokens, which come first, are kept.

        Args:
            table: [1, P + h * w, D] for P other tokens and a grid `old` = (h, w) of patches.
            old: Its grid.
            new: The wanted grid (H, W).

        Returns:
            [1, P + H * W, D], in the table's dtype; the table itself where nothing changes.
        """
        import torch

        (old_height, old_width), (height, width) = old, new
        # Without an offset the same grid gives the same table, so an exported program need not depend on this branch.
        if (self.offset or not torch.compiler.is_exporting()) and (old_height, old_width) == (height, width):
            return table
        if self.keep_equal_count and old_height * old_width == height * width:
            return table
        others, patches = table.tensor_split([table.shape[1] - old_height * old_width], dim=1)
        image = patches.float().unflatten(1, (old_height, old_width)).permute(0, 3, 1, 2)
        if self.offset:
            scale = ((height + self.offset) / old_height, (width + self.offset) / old_width)
            image = torch.nn.functional.interpolate(image, scale_factor=scale, mode="bicubic", antialias=self.antialias)
        else:
            image = torch.nn.functional.interpolate(
                image, size=(height, width), mode="bicubic", antialias=self.antialias
            )
        patches = image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
        return torch.cat([others, patches], dim=1)


TIMM_RULE = PositionRule()
