"""Fixed average pools of the five feature levels of a ResNet, as OpenSelfSup and ORL have them.

Linear probes and SVMs on maps of any level see vectors of about 9000 numbers (8192 to 9216 for a
ResNet-50 at 224 px). Pooling over a rectangle is separable: one small matrix for rows, one for columns.
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

LEVELS = ("conv1", "stage1", "stage2", "stage3", "stage4")
CELLS = dict(zip(LEVELS, (12, 6, 4, 3, 2), strict=True))  # a side, after pooling
# (side of the map, cells): kernel, stride and padding of OpenSelfSup's AvgPool2d layers.
WINDOWS = {
    (112, 12): (10, 10, 4), (56, 6): (16, 8, 0), (28, 4): (13, 5, 0), (14, 3): (8, 3, 0), (7, 2): (6, 1, 0)
}  # fmt: skip


def pool_levels(stages: dict[str, Array]) -> dict[str, Float[Array, "b _n"]]:
    """`pool` of every level of LEVELS in `stages` (maps [b, h, w, d]), into CELLS[level] cells a side.

    Other entries, such as the mean over the last map, are left out.
    """
    return {level: pool(stages[level], CELLS[level]) for level in LEVELS if level in stages}


def pool(features: Float[Array, "b h w d"], cells: int) -> Float[Array, "b n"]:
    """Means over cells x cells windows, float32, flattened as torch does: (channel, row, column).

    A side of 112, 56, 28, 14 or 7 that goes into 12, 6, 4, 3 or 2 cells (ResNet-50 at 224 px) has
    OpenSelfSup's fixed windows (padding counts as zeros); any other is pooled adaptively, as torch's
    AdaptiveAvgPool2d, into min(cells, side) cells. Raises ValueError for fewer than 1 cell.
    """
    if cells < 1:
        raise ValueError(f"pooling: cells={cells} must be 1 or more")
    rows, columns = (jnp.asarray(_means(side, cells)) for side in features.shape[1:3])
    pooled = jnp.einsum(
        "bhwd,ih,jw->bdij", features.astype(jnp.float32), rows, columns, precision=jax.lax.Precision.HIGHEST
    )
    return pooled.reshape(len(features), -1)


@cache
def _means(side: int, cells: int) -> np.ndarray:
    """Matrix [cells, side] that takes the mean over each window of an axis."""
    if (side, cells) in WINDOWS:
        kernel, stride, padding = WINDOWS[side, cells]
        low = np.arange(cells) * stride - padding
        high, count = low + kernel, kernel
    else:
        cells = min(cells, side)
        low = np.arange(cells) * side // cells
        high = -(-(np.arange(cells) + 1) * side // cells)  # rounded up
        count = (high - low)[:, None]
    at = np.arange(side)[None]
    return ((at >= low[:, None]) & (at < high[:, None])).astype(np.float32) / np.float32(count)
