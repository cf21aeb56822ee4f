"""Algebra of boxes (y0, x0, y1, x1) on a canvas taken as the unit square.

A box with y1 < y0 or x1 < x0 is empty: its area is 0. Nothing here raises or returns NaN for it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# A narrower box is widened about its centre before its length divides anything: 1e-4 of the canvas
# is far below a pixel, yet far above float32 rounding of a coordinate.
_MIN_LENGTH = 1e-4


def area(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Area of each box, as a share of the canvas; 0 for an empty box."""
    sides = jnp.maximum(boxes[..., 2:] - boxes[..., :2], 0.0)
    return sides[..., 0] * sides[..., 1]


def center_size(boxes: Float[Array, "*n 4"]) -> tuple[Float[Array, "*n 2"], Float[Array, "*n 2"]]:
    """Centre (y, x) and size (h, w) of each box; the size of a flipped box is negative."""
    low, high = boxes[..., :2], boxes[..., 2:]
    return 0.5 * (low + high), high - low


def from_center_size(
    center: Float[Array, "*n 2"], size: Float[Array, "*n 2"]
) -> Float[Array, "*n 4"]:
    """Boxes from centre (y, x) and size (h, w)."""
    return jnp.concatenate([center - 0.5 * size, center + 0.5 * size], axis=-1)


def intersection(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "..."]:
    """Overlap of a and b, box by box, as boxes [..., 4]; without any, a box of area 0."""
    low = jnp.maximum(a[..., :2], b[..., :2])
    high = jnp.minimum(a[..., 2:], b[..., 2:])
    return jnp.concatenate([low, jnp.maximum(high, low)], axis=-1)


def intersection_area(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "..."]:
    """Area of the overlap of a and b, box by box; equal ranks, axes of length 1 broadcast."""
    return area(intersection(a, b))


def iou(a: Float[Array, "*#n 4"], b: Float[Array, "*#n 4"]) -> Float[Array, "..."]:
    """Intersection over union in [0, 1], box by box, broadcast as above; 0 where both are empty.

    >>> left, whole = jnp.array([0.0, 0.0, 1.0, 0.5]), jnp.array([0.0, 0.0, 1.0, 1.0])
    >>> float(iou(left, whole))
    0.5
    """
    inter = intersection_area(a, b)
    union = area(a) + area(b) - inter
    return jnp.where(union > 0.0, inter / jnp.where(union > 0.0, union, 1.0), 0.0)


def pairwise_iou(a: Float[Array, "n 4"], b: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of every box of a with every box of b."""
    return iou(a[:, None, :], b[None, :, :])


def clip_inside(boxes: Float[Array, "*n 4"], min_size: float) -> Float[Array, "*n 4"]:
    """Boxes shifted into [0, 1] with sides in [min_size, 1]; differentiable.

    A box is never cut: one that sticks out keeps its size and moves, unless it is larger than the
    canvas. Sides below min_size (a flipped box's too) grow about the centre.

    >>> clip_inside(jnp.array([[0.75, 0.0, 1.25, 0.5]]), 0.25).tolist()
    [[0.5, 0.0, 1.0, 0.5]]
    """
    center, size = center_size(boxes)
    size = jnp.clip(size, min_size, 1.0)
    low = jnp.clip(center - 0.5 * size, 0.0, 1.0 - size)
    high = low + size
    # Rounding may put `high` one step beyond 1. A minimum would halve the gradient at a tie.
    return jnp.concatenate([low, jnp.where(high > 1.0, 1.0, high)], axis=-1)


def _shares(low: Float[Array, "*n"], high: Float[Array, "*n"], cells: int) -> Float[Array, "*n c"]:
    """Share of each interval [low, high] that lies in each of `cells` equal cells of [0, 1]."""
    middle = 0.5 * (low + high)
    length = jnp.maximum(high - low, _MIN_LENGTH)
    low, high = (middle - 0.5 * length)[..., None], (middle + 0.5 * length)[..., None]
    edges = (jnp.arange(cells + 1, dtype=low.dtype) / cells).reshape((1,) * middle.ndim + (-1,))
    inside = jnp.minimum(high, edges[..., 1:]) - jnp.maximum(low, edges[..., :-1])
    return jnp.maximum(inside, 0.0) / length[..., None]


def grid_overlap(
    boxes: Float[Array, "*n 4"], h: int, w: int
) -> tuple[Float[Array, "*n {h}"], Float[Array, "*n {w}"]]:
    """Share of a box's height in each row, and of its width in each column, of an h x w grid.

    The shares of an axis sum to 1 for a box inside the canvas and to less for one that sticks out.
    Piecewise linear in the coordinates for a box of fixed size.
    """
    rows = _shares(boxes[..., 0], boxes[..., 2], h)
    cols = _shares(boxes[..., 1], boxes[..., 3], w)
    return rows, cols


def mean_inside(maps: Float[Array, "b h w"], boxes: Float[Array, "b n 4"]) -> Float[Array, "b n"]:
    """Exact mean of a map, constant within each of its cells, over the part of a box on the canvas.

    Differentiable in both. A degenerate box reads the map at its centre; off the canvas it is 0.

    >>> bright_right_half = jnp.array([[[0.0, 1.0]]])
    >>> mean_inside(bright_right_half, jnp.array([[[0.0, 0.5, 1.0, 1.0], [0.0, 0.25, 1.0, 0.75]]])).tolist()
    [[1.0, 0.5]]
    """
    rows, cols = grid_overlap(boxes, maps.shape[1], maps.shape[2])
    total = jnp.einsum("bhw,bnh,bnw->bn", maps, rows, cols, precision=jax.lax.Precision.HIGHEST)
    covered = rows.sum(axis=-1) * cols.sum(axis=-1)
    on_canvas = covered > 1e-6
    return jnp.where(on_canvas, total / jnp.where(on_canvas, covered, 1.0), 0.0)
