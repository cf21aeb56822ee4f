"""From a saliency map to a fixed number of regions of interest, by differentiable steps.

Each region is found in turn: the tempered soft-argmax of what is left of the map gives a centre, local
moments move it onto the mass around it and give its extent, and the region is then suppressed before the
next one is looked for. All of it has a gradient with respect to the map.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from salcl_jax.ops import boxes as box_ops
from salcl_jax.ops import saliency
from salcl_jax.ops.crop import random_resized_crop_boxes
from salcl_jax.types import Rois

# Mass of a map (mean over cells) below which it has no region at all.
EMPTY = 1e-6
# Standard deviation to half side of a uniformly filled interval.
UNIFORM = 3.0**0.5


def from_map(
    maps: Float[Array, "b h w"],
    *,
    count: int,
    temperature: float,
    level: float,
    window: float,
    extent: float,
    min_size: float,
    max_size: float,
    min_peak: float,
) -> Rois:
    """Find `count` regions in maps in [0, 1], most salient first.

    temperature: of the soft-argmax (smaller is closer to the arg max); level: where between the map's mean
    (0) and its maximum (1) mass begins to count; window: standard deviation, in canvas sides, of the
    neighbourhood whose moments are taken; extent: region side over the measured spread (1 fits a
    uniformly filled rectangle); min_size, max_size: bounds of a side in canvas sides; min_peak: a region
    is valid while the strongest cell left is at least this share of the strongest of all. A flat map has
    only invalid regions.

    >>> maps = jnp.zeros((1, 8, 8)).at[0, 1:3, 5:7].set(1.0)  # one bright square
    >>> rois = from_map(maps, count=2, temperature=0.05, level=0.25, window=0.15, extent=1.0,
    ...                 min_size=0.1, max_size=0.9, min_peak=0.4)
    >>> [round(float(side), 1) for side in rois.boxes[0, 0]], rois.valid[0].tolist()
    ([0.1, 0.6, 0.4, 0.9], [True, False])
    """
    mass = _mass(maps, level)
    strongest = jnp.max(mass, axis=(1, 2))
    has_mass = jnp.mean(mass, axis=(1, 2)) > EMPTY
    left, found, valid = mass, [], []
    for _ in range(count):
        center, size = _region(left, temperature, window)
        size = jnp.clip(size * extent, min_size, max_size)
        box = box_ops.clip_inside(box_ops.from_center_size(center, size), min_size)
        valid.append(has_mass & (jnp.max(left, axis=(1, 2)) >= min_peak * strongest))
        found.append(box)
        left = _suppress(left, center, size)
    boxes = jnp.stack(found, axis=1)
    return Rois(boxes, jnp.stack(valid, axis=1), box_ops.mean_inside(maps, boxes))


def random(
    key: PRNGKeyArray,
    aspect: Float[Array, "b"],
    *,
    count: int,
    min_size: float,
    max_size: float,
) -> Rois:
    """Control: regions with sides in [min_size, max_size], as `from_map` may give, anywhere on the canvas."""
    boxes = random_resized_crop_boxes(key, aspect, count, (min_size**2, max_size**2), (3 / 4, 4 / 3))
    center, size = box_ops.center_size(boxes)
    size = jnp.clip(size, min_size, max_size)  # the drawn ratio may carry a side beyond them
    return _all_valid(box_ops.clip_inside(box_ops.from_center_size(center, size), min_size))


def central(batch: int, *, count: int, size: float) -> Rois:
    """Control: the centre prior, one box of side `size` in the middle of every canvas."""
    box = jnp.array([0.5 - size / 2, 0.5 - size / 2, 0.5 + size / 2, 0.5 + size / 2])
    return _all_valid(jnp.broadcast_to(box[None, None, :], (batch, count, 4)))


def ground_truth(boxes: Float[Array, "b k 4"], *, count: int, min_size: float) -> Rois:
    """Oracle: the `count` largest annotated boxes of each image; images without any have none valid."""
    area = box_ops.area(boxes)
    if boxes.shape[1] < count:
        boxes = jnp.pad(boxes, ((0, 0), (0, count - boxes.shape[1]), (0, 0)))
        area = box_ops.area(boxes)
    index = jnp.argsort(-area, axis=1)[:, :count]  # stable, and unlike top_k on each device alone
    top = jnp.take_along_axis(area, index, axis=1)
    chosen = jnp.take_along_axis(boxes, index[:, :, None], axis=1)
    valid = top > 0
    return Rois(box_ops.clip_inside(chosen, min_size), valid, valid.astype(jnp.float32))


def _all_valid(boxes: Float[Array, "b r 4"]) -> Rois:
    shape = boxes.shape[:2]
    return Rois(boxes, jnp.ones(shape, bool), jnp.ones(shape, jnp.float32))


def _mass(maps: Float[Array, "b h w"], level: float) -> Float[Array, "b h w"]:
    mean = jnp.mean(maps, axis=(1, 2), keepdims=True)
    top = saliency.peak(maps)
    return jax.nn.relu(maps - (mean + level * (top - mean)))


def _grid(n: int) -> Float[Array, "n"]:
    return (jnp.arange(n, dtype=jnp.float32) + 0.5) / n


def _region(
    left: Float[Array, "b h w"], temperature: float, window: float
) -> tuple[Float[Array, "b 2"], Float[Array, "b 2"]]:
    """Centre and side of the region around the strongest cell left, from moments of what is near it."""
    b, h, w = left.shape
    spread = jnp.full((b, 2), window)
    peak = saliency.peak(left)
    relative = left / jnp.maximum(peak, EMPTY)
    attention = jax.nn.softmax(relative.reshape(b, h * w) / temperature).reshape(b, h, w)
    # Equal peaks far apart would meet in the middle: look around one of them. Where it is does not vary
    # smoothly with the map, so it has no gradient to lose.
    peak_cell = jnp.argmax(left.reshape(b, h * w), axis=1)
    seed = jnp.stack([_grid(h)[peak_cell // w], _grid(w)[peak_cell % w]], axis=-1)
    near = attention * _gaussian(seed, spread, h, w)
    center = jnp.stack(_moments(near)[0], axis=-1)
    for _ in range(2):  # one step onto the mass, one to settle
        near = left * _gaussian(center, spread, h, w)
        mean, var = _moments(near)
        center = jnp.stack(mean, axis=-1)
    cell = jnp.array([1 / h, 1 / w])[None, :]
    variance = jnp.stack(var, axis=-1) + jnp.square(cell) / 12  # a cell is not a point
    # The window narrows what it measures: for Gaussian mass, 1/measured = 1/true + 1/window^2.
    measured = jnp.minimum(variance, 0.9 * window**2)
    variance = measured / (1 - measured / window**2)
    return center, 2 * UNIFORM * jnp.sqrt(variance)


def _moments(mass: Float[Array, "b h w"]) -> tuple[tuple, tuple]:
    """Mean (y, x) and variance (y, x) of mass; without mass the middle and the spread of a full canvas."""
    b, h, w = mass.shape
    mass = mass + EMPTY / (h * w)
    total = jnp.sum(mass, axis=(1, 2))
    rows, cols = jnp.sum(mass, axis=2) / total[:, None], jnp.sum(mass, axis=1) / total[:, None]
    # Sums, not matrix products: those round their inputs on accelerators.
    mean_y = jnp.sum(rows * _grid(h)[None, :], axis=1)
    mean_x = jnp.sum(cols * _grid(w)[None, :], axis=1)
    var_y = jnp.sum(rows * jnp.square(_grid(h)[None, :] - mean_y[:, None]), axis=1)
    var_x = jnp.sum(cols * jnp.square(_grid(w)[None, :] - mean_x[:, None]), axis=1)
    return (mean_y, mean_x), (var_y, var_x)


def _gaussian(
    center: Float[Array, "b 2"], spread: Float[Array, "b 2"], h: int, w: int
) -> Float[Array, "b h w"]:
    dy = (_grid(h)[None, :] - center[:, :1]) / spread[:, :1]
    dx = (_grid(w)[None, :] - center[:, 1:]) / spread[:, 1:]
    return jnp.exp(-0.5 * (jnp.square(dy)[:, :, None] + jnp.square(dx)[:, None, :]))


def _suppress(
    left: Float[Array, "b h w"], center: Float[Array, "b 2"], size: Float[Array, "b 2"]
) -> Float[Array, "b h w"]:
    """Take a region out: a smooth hole, about 0 inside the box and 1 one half side beyond it."""
    _, h, w = left.shape
    dy = (_grid(h)[None, :] - center[:, :1]) / (0.5 * size[:, :1])
    dx = (_grid(w)[None, :] - center[:, 1:]) / (0.5 * size[:, 1:])
    hole = jnp.exp(-0.25 * (jnp.square(jnp.square(dy))[:, :, None] + jnp.square(jnp.square(dx))[:, None, :]))
    return left * (1 - hole)
