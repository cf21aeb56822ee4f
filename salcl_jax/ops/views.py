"""From regions of interest to the crop windows of a positive pair.

Each *way* takes the two random windows that plain BYOL would use and returns the two windows that guidance
would use instead, with a bit saying whether this image has them. `pair_boxes` draws a way per image and
blends: while guidance is warming up, or where an image has no valid region, the random windows stay.
"""

from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from salcl_jax.ops import boxes as box_ops
from salcl_jax.ops.crop import random_resized_crop_boxes
from salcl_jax.types import Rois


class Scene(NamedTuple):
    """What a way may look at: regions, and the map that they came from."""

    rois: Rois
    maps: Float[Array, "b h w"]


class Shape(NamedTuple):
    """How windows are drawn; the fields are those of `config.crops` and `config.pairs`."""

    area: tuple[float, float]  # of a random window, share of the photo
    ratio: tuple[float, float]  # width / height of a random window in pixels
    jitter_shift: float  # centre shift of a jittered region, in its own sides
    jitter_area: tuple[float, float]  # area factor of a jittered region
    jitter_ratio: tuple[float, float]  # aspect factor of a jittered region
    zoom: float  # side of the part of the photo around a region, over the region's
    min_size: float  # smallest side of any window, in canvas sides
    cover_share: float  # share of the region's mass that a covering window must hold
    cover_tries: int  # random places tried for that
    beta: float  # of ContrastiveCrop's U-shaped centre distribution
    threshold: float  # of ContrastiveCrop's bounding box, share of the map's peak above its mean


Pair = Float[Array, "b 2 4"]


def choose(key: PRNGKeyArray, rois: Rois) -> tuple[Float[Array, "b 4"], Bool[Array, "b"]]:
    """One valid region per image, drawn in proportion to its score, and whether there is one."""
    weight = jnp.where(rois.valid, jnp.maximum(rois.score, 1e-3), 0.0)
    weight = jax.lax.stop_gradient(weight)
    draws = jax.random.gumbel(key, weight.shape) + jnp.log(jnp.maximum(weight, 1e-30))
    index = jnp.argmax(draws, axis=1)
    box = jnp.take_along_axis(rois.boxes, index[:, None, None], axis=1)[:, 0]
    return box, jnp.any(rois.valid, axis=1)


def jitter(
    key: PRNGKeyArray, boxes: Float[Array, "b n 4"], shape: Shape
) -> Float[Array, "b n 4"]:
    """Move and scale boxes at random; differentiable in the boxes."""
    k_shift, k_area, k_ratio = jax.random.split(key, 3)
    center, size = box_ops.center_size(boxes)
    shift = jax.random.uniform(k_shift, center.shape, minval=-1.0, maxval=1.0)
    center = center + shape.jitter_shift * shift * size
    area = jnp.exp(_log_uniform(k_area, boxes.shape[:2], shape.jitter_area))
    ratio = jnp.exp(_log_uniform(k_ratio, boxes.shape[:2], shape.jitter_ratio))
    factor = jnp.stack([jnp.sqrt(area / ratio), jnp.sqrt(area * ratio)], axis=-1)
    return box_ops.clip_inside(box_ops.from_center_size(center, size * factor), shape.min_size)


def roi_jitter(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """Both windows are jittered copies of one region (as ORL's intra-region pairs)."""
    k_choose, k_jitter = jax.random.split(key)
    box, ok = choose(k_choose, scene.rois)
    return jitter(k_jitter, jnp.stack([box, box], axis=1), shape), ok


def roi_global(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """The first window is a jittered region, the second an ordinary random one."""
    pair, ok = roi_jitter(key, random, scene, shape)
    return jnp.stack([pair[:, 0], random[:, 1]], axis=1), ok


def roi_center(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """Random windows of the usual sizes, both centred at random points of one region."""
    k_choose, k_point = jax.random.split(key)
    box, ok = choose(k_choose, scene.rois)
    center, size = box_ops.center_size(box)
    offset = jax.random.uniform(k_point, (box.shape[0], 2, 2), minval=-0.5, maxval=0.5)
    return _recenter(random, center[:, None, :] + offset * size[:, None, :], shape), ok


def zoom(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """Random windows of a part of the photo around one region, as though that part were the photo.

    The part has the photo's aspect and `shape.zoom` times the larger side of the region, at most the photo's.
    """
    box, ok = choose(key, scene.rois)
    center, size = box_ops.center_size(box)
    side = jnp.minimum(shape.zoom * jnp.max(size, axis=1, keepdims=True), 1.0)
    corner = jnp.clip(center - 0.5 * side, 0.0, 1.0 - side)
    inside = jnp.concatenate([corner, corner], axis=1)[:, None] + side[:, None] * random
    return box_ops.clip_inside(inside, shape.min_size), ok


def map_center(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """Random windows of the usual sizes, each centred at its own draw from the saliency map."""
    b, h, w = scene.maps.shape
    k_cell, k_inside = jax.random.split(key)
    mass = jax.lax.stop_gradient(_above_mean(scene.maps))
    logits = jnp.log(mass.reshape(b, 1, h * w) + 1e-9)
    cell = jnp.argmax(logits + jax.random.gumbel(k_cell, (b, 2, h * w)), axis=-1)
    inside = jax.random.uniform(k_inside, (b, 2, 2))
    y = (cell // w + inside[..., 0]) / h
    x = (cell % w + inside[..., 1]) / w
    ok = jnp.any(scene.rois.valid, axis=1)
    return _recenter(random, jnp.stack([y, x], axis=-1), shape), ok


def cover(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """Windows of the usual sizes: of several positions the first that holds a share of one region's mass.

    Where none does, the one that holds most. Were sizes drawn again with the positions, large windows would
    be accepted most often, and guided pairs would be easier ones.
    """
    k_choose, k_tries = jax.random.split(key)
    box, ok = choose(k_choose, scene.rois)
    _, size = box_ops.center_size(random)
    u = jax.random.uniform(k_tries, (box.shape[0], 2, shape.cover_tries, 2))
    corner = u * (1.0 - size[:, :, None])
    windows = jnp.concatenate([corner, corner + size[:, :, None]], axis=-1)
    flat = windows.reshape(box.shape[0], -1, 4)
    region = jnp.broadcast_to(box[:, None, :], flat.shape)
    common = box_ops.intersection(flat, region)
    share = _mass_inside(scene.maps, common) / jnp.maximum(_mass_inside(scene.maps, region), 1e-6)
    share = jax.lax.stop_gradient(share).reshape(windows.shape[:-1])
    enough = share >= shape.cover_share
    index = jnp.where(jnp.any(enough, -1), jnp.argmax(enough, -1), jnp.argmax(share, -1))
    return jnp.take_along_axis(windows, index[:, :, None, None], axis=2)[:, :, 0], ok


def contrastive_crop(key: PRNGKeyArray, random: Pair, scene: Scene, shape: Shape) -> tuple:
    """ContrastiveCrop: centres from a Beta distribution over the box that holds the map above a threshold.

    The threshold is of the map above its mean: a map that is high all over would give the whole canvas.
    """
    box = thresholded_box(_above_mean(scene.maps), shape.threshold)
    draw = jax.random.beta(key, shape.beta, shape.beta, (box.shape[0], 2, 2))
    center = box[:, None, :2] + draw * (box[:, None, 2:] - box[:, None, :2])
    return _recenter(random, center, shape), jnp.any(scene.rois.valid, axis=1)


WAYS = {
    "roi_jitter": roi_jitter,
    "roi_global": roi_global,
    "roi_center": roi_center,
    "zoom": zoom,
    "map_center": map_center,
    "cover": cover,
    "contrastive_crop": contrastive_crop,
}


def pair_boxes(
    key: PRNGKeyArray,
    random: Pair,
    scene: Scene,
    shape: Shape,
    mix: Mapping[str, float],
    strength: Float[Array, ""] | float,
) -> tuple[Pair, Bool[Array, "b"]]:
    """Windows of the pair, and which images are guided.

    mix: probability of each way (the rest stays random); strength: the warm-up's factor in [0, 1] on them.
    """
    k_way, k_ways = jax.random.split(key)
    names = [name for name, share in mix.items() if share > 0]
    draw = jax.random.uniform(k_way, (random.shape[0],))
    boxes, guided, low = random, jnp.zeros(random.shape[0], bool), 0.0
    for name, k in zip(names, jax.random.split(k_ways, max(1, len(names))), strict=False):
        windows, ok = WAYS[name](k, random, scene, shape)
        high = low + mix[name] * strength
        chosen = (draw >= low) & (draw < high) & ok
        boxes = jnp.where(chosen[:, None, None], windows, boxes)
        guided, low = guided | chosen, high
    return boxes, guided


def local_boxes(
    key: PRNGKeyArray,
    scene: Scene | None,
    aspect: Float[Array, "b"],
    shape: Shape,
    *,
    count: int,
    area: tuple[float, float],
    invalid: str,
    strength: Float[Array, ""] | float,
) -> tuple[Float[Array, "b n 4"], Bool[Array, "b n"]]:
    """Windows of the extra small crops and whether they count: centred in regions, or at random.

    Sizes are those of random windows of area share `area`, so that only the place differs. The valid
    regions of an image take turns; centres are jittered by `jitter_shift`. Places are random where no scene
    is given and while guidance warms up, also in an image without valid regions; its crops count if
    `invalid` is 'random', not if it is 'drop'.
    """
    k_random, k_shift, k_use = jax.random.split(key, 3)
    random = random_resized_crop_boxes(k_random, aspect, count, area, shape.ratio)
    if scene is None:
        return random, jnp.ones(random.shape[:2], bool)
    center, size = box_ops.center_size(_in_turn(scene.rois, count))
    shift = jax.random.uniform(k_shift, center.shape, minval=-1.0, maxval=1.0)
    valid = jnp.broadcast_to(jnp.any(scene.rois.valid, axis=1, keepdims=True), random.shape[:2])
    wanted = jax.random.uniform(k_use, valid.shape) < strength
    placed = _recenter(random, center + shape.jitter_shift * shift * size, shape)
    boxes = jnp.where((valid & wanted)[:, :, None], placed, random)
    return boxes, valid | ~wanted if invalid == "drop" else jnp.ones_like(valid)


def _in_turn(rois: Rois, count: int) -> Float[Array, "b {count} 4"]:
    """The valid regions of each image one after the other, from the first again when they are used up."""
    order = jnp.argsort(~rois.valid, axis=1, stable=True)
    valid = jnp.maximum(jnp.sum(rois.valid, axis=1, keepdims=True), 1)
    index = jnp.take_along_axis(order, jnp.arange(count)[None, :] % valid, axis=1)
    return jnp.take_along_axis(rois.boxes, index[:, :, None], axis=1)


def thresholded_box(maps: Float[Array, "b h w"], threshold: float) -> Float[Array, "b 4"]:
    """Tight box around the cells above `threshold` times the maximum of each map."""
    _, h, w = maps.shape
    above = maps >= threshold * jnp.max(maps, axis=(1, 2), keepdims=True)
    y0, y1 = _extent(jnp.any(above, axis=2), h)
    x0, x1 = _extent(jnp.any(above, axis=1), w)
    return jnp.stack([y0, x0, y1, x1], axis=-1)


def _extent(line: Bool[Array, "b n"], n: int) -> tuple[Array, Array]:
    return jnp.argmax(line, axis=1) / n, 1.0 - jnp.argmax(line[:, ::-1], axis=1) / n


def _recenter(
    random: Float[Array, "b n 4"], center: Float[Array, "b n 2"], shape: Shape
) -> Float[Array, "b n 4"]:
    _, size = box_ops.center_size(random)
    return box_ops.clip_inside(box_ops.from_center_size(center, size), shape.min_size)


def _above_mean(maps: Float[Array, "b h w"]) -> Float[Array, "b h w"]:
    return jax.nn.relu(maps - jnp.mean(maps, axis=(1, 2), keepdims=True))


def _mass_inside(maps: Float[Array, "b h w"], boxes: Float[Array, "b n 4"]) -> Float[Array, "b n"]:
    return box_ops.mean_inside(maps, boxes) * box_ops.area(boxes)


def _log_uniform(key: PRNGKeyArray, shape: tuple, bounds: tuple[float, float]) -> Array:
    return jax.random.uniform(key, shape, minval=jnp.log(bounds[0]), maxval=jnp.log(bounds[1]))
