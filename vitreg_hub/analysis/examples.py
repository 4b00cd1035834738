"""What one image looks like inside a model: the maps behind the pictures of a report."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Example:
    """Maps of one image. Rows and columns are those of the grid of patches.

    Attributes:
        image: [height, width, 3] in [0, 1].
        norms: [rows, columns] norms of the patch tokens, before the final norm.
        outliers: [rows, columns] bool, which of them are outliers.
        class_attention: [heads, rows, columns] from the class token to the patches; None without a class token.
        register_attention: [R, heads, rows, columns] from each register to the patches; R = 0 without registers.
        components: [rows, columns, 3] in [0, 1], the first principal components as colours (`pca_maps`).
    """

    __pydantic_config__: ClassVar = {"arbitrary_types_allowed": True}  # not stored as JSON

    image: np.ndarray
    norms: np.ndarray
    outliers: np.ndarray
    class_attention: np.ndarray | None
    register_attention: np.ndarray
    components: np.ndarray
