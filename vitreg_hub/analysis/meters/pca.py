"""Principal components of patch tokens as colours."""

import numpy as np
from sklearn.decomposition import PCA
from torch import Tensor

from vitreg_hub.errors import DataError

QUANTILES = (0.01, 0.99)
"""Shares of the patches below full darkness and full brightness, so that single outliers do not flatten the rest."""
SMALLEST_VARIANCE = 1e-12
"""Relative to the first component; what varies less is float32 rounding."""


def pca_maps(patches: Tensor, grid: tuple[int, int]) -> np.ndarray:
    """Show each patch by the first three principal components of its token, as red, green and blue.

    One decomposition is fitted to the patches of all images together, after subtracting their mean; thus equal colours
    mean similar tokens, also in different images. Each component is scaled on its own: its 1 % quantile becomes 0, its
    99 % quantile 1, and what lies outside is clipped. Its sign makes its largest loading positive. A component in which
    the tokens do not differ is 0.5 everywhere.

    Args:
        patches: [B, P, D], row by row.
        grid: Rows and columns, P in all.

    Returns:
        [B, rows, columns, 3] in [0, 1], float32.

    Raises:
        DataError: The patches do not fill the grid, or hold values that are not finite.

    Source: Oquab et al., "DINOv2", 2023, figure 1, which leaves out the background by a threshold; this does not.
    """
    num_images, num_patches, channels = patches.shape
    if num_patches != grid[0] * grid[1]:
        raise DataError(
            f"{num_patches} patches do not fill a grid of {grid[0]} x {grid[1]}; give the model's own grid."
        )
    tokens = patches.detach().cpu().double().numpy().reshape(-1, channels)
    if not np.isfinite(tokens).all():
        raise DataError("tokens are not finite, so they have no principal components; run the model in float32.")
    scaled = np.full((len(tokens), 3), 0.5)
    if (tokens != tokens[0]).any():
        pca = PCA(n_components=min(3, *tokens.shape), svd_solver="covariance_eigh").fit(tokens)
        varies = pca.explained_variance_ > SMALLEST_VARIANCE * pca.explained_variance_[0]
        scores = pca.transform(tokens)[:, varies]
        low, high = np.quantile(scores, QUANTILES, axis=0)
        spread = np.where(high > low, high - low, 1.0)
        scaled[:, : scores.shape[1]] = np.where(high > low, (scores - low) / spread, 0.5).clip(0, 1)
    return scaled.reshape(num_images, *grid, 3).astype(np.float32)
