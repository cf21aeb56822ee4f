"""From the canvases of a batch to its training crops: map, regions, windows, pixels, saliency scores.

Training, pictures and online localisation all look through these functions, so what a panel shows is what
the loss sees.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray, UInt8

from salcl_jax import maps as sources
from salcl_jax.models.network import Network
from salcl_jax.ops import augment, roi, saliency, views
from salcl_jax.ops.boxes import mean_inside
from salcl_jax.ops.crop import crop_and_resize, random_resized_crop_boxes
from salcl_jax.types import Batch, PyTree, Rois, TrainState

Config = Any  # the validated, read-only configuration; see config.py
WHOLE = (0.0, 0.0, 1.0, 1.0)


class Crops(NamedTuple):
    """What the loss is computed from, and what a panel shows."""

    maps: Float[Array, "b h w"] | None
    rois: Rois | None
    boxes: Float[Array, "b v 4"]  # windows: the pair, then the small crops
    score: Float[Array, "b v"]  # mean saliency inside each window; 1 without a map
    pair: Float[Array, "b 2 p p 3"]  # augmented, in [0, 1]
    local: Float[Array, "b n q q 3"] | None  # augmented, in [0, 1]
    local_valid: Bool[Array, "b n"] | None
    guided: Bool[Array, "b"]  # whether guidance chose the windows of the pair


def to_float(images: UInt8[Array, "*n s s 3"]) -> Float[Array, "*n s s 3"]:
    """Pixels to [0, 1]."""
    return images.astype(jnp.float32) / 255.0


def whole_canvas(images: Float[Array, "b s s 3"], size: int) -> Float[Array, "b 1 p p 3"]:
    """The canvas resized to `size` and normalised, as one view."""
    box = jnp.broadcast_to(jnp.array(WHOLE)[None, None, :], (images.shape[0], 1, 4))
    return augment.normalize(crop_and_resize(images, box, size))


def make_saliency(network: Network, config: Config) -> Callable[..., Float[Array, "b h w"]]:
    """Function (params, batch_stats, images in [0, 1] [b, s, s, 3]) -> maps in [0, 1] [b, h, w].

    It runs the branch whose trees it is given with running BatchNorm statistics, so the map of an image
    does not depend on the batch it comes in (but for gradcam and contrast, which compare it with the others).
    """
    c = config.saliency
    draw = sources.find(c.source)

    def maps(params: PyTree, stats: PyTree, images: Float[Array, "b s s 3"]) -> Array:
        return saliency.normalize(draw(network, c, params, stats, whole_canvas(images, c.size)))

    return maps


def map_regions(maps: Float[Array, "b h w"], config: Config) -> Rois:
    """Regions found in maps by the fields of `config.roi`."""
    names = ("count", "temperature", "level", "window", "extent", "min_size", "max_size", "min_peak")
    return roi.from_map(maps, **{name: config.roi[name] for name in names})


def _regions(
    key: PRNGKeyArray, maps: Float[Array, "b h w"] | None, batch: Batch, config: Config
) -> Rois | None:
    """Regions by `config.roi.source`: the map's own, or those of a control."""
    c = config.roi
    if c.source == "none":
        return None
    if c.source == "saliency":
        return map_regions(maps, config)
    if c.source == "ground_truth":
        return roi.ground_truth(batch["boxes"], count=c.count, min_size=c.min_size)
    if c.source == "center":
        size = 0.5 * (c.min_size + c.max_size)
        return roi.central(batch["image"].shape[0], count=c.count, size=size)
    return roi.random(key, batch["aspect"], count=c.count, min_size=c.min_size, max_size=c.max_size)


class Windows(NamedTuple):
    """What is cut out of the canvases, and why."""

    rois: Rois | None
    boxes: Float[Array, "b v 4"]  # the pair, then the small crops
    score: Float[Array, "b v"]
    guided: Bool[Array, "b"]
    local_valid: Bool[Array, "b n"] | None


def make_crops(network: Network, config: Config) -> Callable[..., Crops]:
    """Function (key, state, batch, strength) -> Crops; strength in [0, 1] is the warm-up's factor.

    With `crops.gradient` off, maps and windows are detached here, once.
    """
    draw_maps = make_saliency(network, config) if config.saliency.source != "none" else None
    draw_windows, change = make_windows(config), make_augmentation(config)

    def crops(
        key: PRNGKeyArray, state: TrainState, batch: Batch, strength: Float[Array, ""] | float
    ) -> Crops:
        *k_windows, k_augment, k_small = jax.random.split(key, 6)
        images = to_float(batch["image"])
        with jax.named_scope("saliency"):
            maps = None
            if draw_maps:
                maps = draw_maps(*branch(state, config.saliency.branch), images)
                maps = maps if config.crops.gradient else jax.lax.stop_gradient(maps)
        with jax.named_scope("regions"):
            w = draw_windows(k_windows, maps, batch, strength)
        with jax.named_scope("crops"):
            pair, small = change(k_augment, k_small, *cut(images, w.boxes, config))
        return Crops(maps, w.rois, w.boxes, w.score, pair, small, w.local_valid, w.guided)

    return crops


def make_windows(config: Config) -> Callable[..., Windows]:
    """Function (keys, maps or None, batch, strength) -> Windows; keys: regions, random, pair, small crops."""
    fields = {name: config.pairs[name] for name in views.Shape._fields if name in config.pairs}
    shape = views.Shape(area=config.crops.area, ratio=config.crops.ratio, **fields)
    mix, local = dict(config.pairs.mix), config.local
    from_map = config.roi.source == "saliency"

    def windows(
        keys: Sequence[PRNGKeyArray],
        maps: Float[Array, "b h w"] | None,
        batch: Batch,
        strength: Float[Array, ""] | float,
    ) -> Windows:
        k_regions, k_random, k_pair, k_local = keys
        aspect = batch["aspect"]
        rois = _regions(k_regions, maps, batch, config)
        # Regions of a control are whole: the map has no say in which part of them counts.
        even = jnp.ones((aspect.shape[0], 1, 1))
        scene = views.Scene(rois, maps if from_map else even) if rois else None
        boxes = random_resized_crop_boxes(k_random, aspect, 2, shape.area, shape.ratio)
        guided, valid = jnp.zeros(aspect.shape, bool), None
        if scene and sum(mix.values()) > 0:
            boxes, guided = views.pair_boxes(k_pair, boxes, scene, shape, mix, strength)
        if local.count:
            small, valid = views.local_boxes(
                k_local, scene if local.source == "roi" else None, aspect, shape,
                count=local.count, area=local.area, invalid=local.invalid, strength=strength,
            )  # fmt: skip
            boxes = jnp.concatenate([boxes, small], axis=1)
        score = jnp.ones(boxes.shape[:2]) if maps is None else mean_inside(maps, boxes)
        return Windows(rois, boxes, score, guided, valid)

    return windows


def cut(
    images: Float[Array, "b s s 3"], boxes: Float[Array, "b v 4"], config: Config
) -> tuple[Float[Array, "b 2 p p 3"], Float[Array, "b n q q 3"] | None]:
    """Pixels of the pair and, where the configuration has them, of the small crops."""
    pair = crop_and_resize(images, boxes[:, :2], config.crops.size)
    return pair, crop_and_resize(images, boxes[:, 2:], config.local.size) if config.local.count else None


def make_augmentation(config: Config) -> Callable[..., tuple[Array, Array | None]]:
    """Function (key, key of the small crops, pair, small crops or None) -> both augmented, in [0, 1]."""
    specs = tuple(_augmentation(config, view, config.crops.size) for view in ("view1", "view2"))
    small_specs = (_augmentation(config, "view1", config.local.size),) * config.local.count

    def change(
        key: PRNGKeyArray, key_small: PRNGKeyArray, pair: Array, small: Array | None
    ) -> tuple[Array, Array | None]:
        pair = augment.augment(key, pair, specs)
        return pair, None if small is None else augment.augment(key_small, small, small_specs)

    return change


def _augmentation(config: Config, view: str, size: int) -> augment.AugmentSpec:
    """Strengths of a view at a crop size: blur is configured in pixels at 224 px."""
    spec = augment.AugmentSpec(**config.augment[view])
    low, high = spec.blur_sigma
    return spec._replace(blur_sigma=(low * size / 224, high * size / 224))


def branch(state: TrainState, name: str) -> tuple[PyTree, PyTree]:
    """Parameters and batch statistics of the 'online' or 'target' network."""
    if name == "online":
        return state.params, state.batch_stats
    return state.target_params, state.target_batch_stats
