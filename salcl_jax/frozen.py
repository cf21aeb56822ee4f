"""A network that is only looked at: photos in, features or maps out, on all devices, as numpy.

Every process reads the whole of each set and all devices share the work, so all processes get the same
figures. The online evaluation, the pictures and `evaluate` all look through these functions.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from salcl_jax.data.pipeline import eval_batches
from salcl_jax.data.sources import Source
from salcl_jax.evaluators.pooling import pool_levels
from salcl_jax.guidance import branch, make_saliency, make_windows, map_regions, to_float, whole_canvas
from salcl_jax.models.network import Network
from salcl_jax.ops import augment
from salcl_jax.ops.crop import crop_and_resize, random_resized_crop_boxes
from salcl_jax.rng import key_for
from salcl_jax.sharding import data_sharded, replicated, share_of_process, to_device
from salcl_jax.types import HostBatch, PyTree, Rois, TrainState

Features = dict[str, Array]  # by level: pooled, conv1, stage1 .. stage4
DRAWS = 4  # pairs of crops drawn of an image to see what they show
PATCH = 8  # raw-pixel baseline of dense features: pixels of a patch


def batches(
    source: Source, config: Any, *, batch_size: int, limit: int = 0, max_boxes: int = 0, masks: bool = False
) -> Iterator[HostBatch]:
    """Evaluation batches of a source with the data fields of the configuration."""
    c = config.data
    return eval_batches(
        source, batch_size=batch_size, canvas=c.canvas, max_boxes=max_boxes or c.max_boxes, limit=limit,
        min_side=c.min_side, max_pixels=c.max_pixels, workers=c.workers, with_masks=masks,
    )  # fmt: skip


def divisible(size: int, mesh: Mesh) -> int:
    """The batch size rounded up to a multiple of the devices."""
    return -(-size // mesh.size) * mesh.size


def on_devices(function: Callable, mesh: Mesh) -> Callable:
    """Compile function(trees, *arrays with a batch axis); call it with numpy arrays, get numpy arrays.

    The arrays are the same on all processes, and so is what comes back.
    """
    whole, split = replicated(mesh), data_sharded(mesh)
    compiled: dict[int, Callable] = {}

    def call(trees: PyTree, *arrays: np.ndarray) -> Any:
        jitted = compiled.get(len(arrays)) or jax.jit(
            function, in_shardings=(whole, *[split] * len(arrays)), out_shardings=whole
        )
        compiled[len(arrays)] = jitted
        leaves = to_device(share_of_process({str(i): x for i, x in enumerate(arrays)}), mesh)
        return jax.device_get(jitted(trees, *leaves.values()))

    return call


def levels_of(
    network: Network,
    params: PyTree,
    stats: PyTree,
    crops: Float[Array, "b p p 3"],
    levels: Sequence[str],
) -> dict[str, Float[Array, "b n"]]:
    """Features of crops in [0, 1] with running statistics; stages go through ORL's fixed average pools."""
    stages, _ = network.encode(params, stats, augment.normalize(crops[:, None]), train=False)
    wanted = {level: stages[level][:, 0] for level in levels}
    pooled = {level: wanted.pop(level) for level in levels if level == "pooled"}
    return pooled | pool_levels(wanted)


def make_features(
    network: Network, config: Any, levels: Sequence[str] = ("pooled",)
) -> Callable[..., Features]:
    """Function (state, images uint8 [b, s, s, 3], boxes [b, m, 4]) -> features [b, m, n] of those crops."""

    def features(
        state: TrainState, images: UInt8[Array, "b s s 3"], boxes: Float[Array, "b m 4"]
    ) -> Features:
        params, stats = branch(state, config.eval.branch)

        def of_box(box: Float[Array, "b 4"]) -> Features:
            crops = crop_and_resize(to_float(images), box[:, None], config.eval.size)[:, 0]
            return levels_of(network, params, stats, crops, levels)

        return _box_after_box(of_box, boxes)

    return features


def make_augmented(
    network: Network, config: Any, levels: Sequence[str], *, colours: bool
) -> Callable[..., Features]:
    """Function ((state, step), images uint8 [b, s, s, 3], aspect [b]) -> features [b, n] of random crops.

    Crops of 0.08 to 1 of the photo and flips, drawn from (seed, step); `colours` adds ORL's jitter and PCA
    lighting. Training of linear probes sees them.
    """
    jitter = {"jitter_prob": 1.0, "brightness": 0.4, "contrast": 0.4, "saturation": 0.4}
    spec = augment.AugmentSpec(flip=0.5, **(jitter if colours else {}))

    def features(
        trees: tuple, images: UInt8[Array, "b s s 3"], aspect: Float[Array, "b"]
    ) -> Features:
        state, step = trees
        boxes_key, look_key, light_key = jax.random.split(key_for(config.seed, step, "probe"), 3)
        boxes = random_resized_crop_boxes(boxes_key, aspect, 1, (0.08, 1.0), (3 / 4, 4 / 3))
        crops = augment.augment(look_key, crop_and_resize(to_float(images), boxes, config.eval.size), (spec,))
        crops = augment.lighting(light_key, crops, 0.1) if colours else crops
        return levels_of(network, *branch(state, config.eval.branch), crops[:, 0], levels)

    return features


def make_pixels(side: int) -> Callable[..., Features]:
    """As `make_features`, of a network that is not there: crops of side x side pixels, flattened."""

    def features(_: Any, images: UInt8[Array, "b s s 3"], boxes: Float[Array, "b m 4"]) -> Features:
        def of_box(box: Float[Array, "b 4"]) -> Features:
            crops = crop_and_resize(to_float(images), box[:, None], side)
            return {"pooled": crops.reshape(crops.shape[0], -1)}

        return _box_after_box(of_box, boxes)

    return features


def make_dense(
    network: Network, config: Any, *, size: int, stages: Sequence[str]
) -> Callable[..., Float[Array, "b h w d"]]:
    """Function (state, images uint8 [b, s, s, 3]) -> features of each location, stages side by side.

    The whole canvas is seen at `size`; coarser stages are enlarged bilinearly to the grid of the finest.
    """

    def features(state: TrainState, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b h w d"]:
        params, stats = branch(state, config.eval.branch)
        found, _ = network.encode(params, stats, whole_canvas(to_float(images), size), train=False)
        maps = [found[stage][:, 0].astype(jnp.float32) for stage in stages]
        grid = max(m.shape[1] for m in maps)
        shapes = [(m.shape[0], grid, grid, m.shape[3]) for m in maps]
        return jnp.concatenate(
            [jax.image.resize(m, shape, "linear") for m, shape in zip(maps, shapes, strict=True)], axis=-1
        )

    return features


def make_dense_pixels(size: int) -> Callable[..., Float[Array, "b h w d"]]:
    """As `make_dense`, of a network that is not there: the pixels of patches of 8 x 8."""

    def features(_: Any, images: UInt8[Array, "b s s 3"]) -> Float[Array, "b h w d"]:
        cells = size // PATCH
        box = jnp.broadcast_to(jnp.array([0.0, 0.0, 1.0, 1.0])[None, None], (images.shape[0], 1, 4))
        x = crop_and_resize(to_float(images), box, cells * PATCH)[:, 0]
        x = x.reshape(-1, cells, PATCH, cells, PATCH, 3)
        return jnp.moveaxis(x, 2, 3).reshape(-1, cells, cells, PATCH * PATCH * 3)

    return features


def map_source(config: Any) -> str:
    """The source of the map that a network is judged by."""
    return "activation" if config.saliency.source == "none" else config.saliency.source


def make_maps_fn(network: Network, config: Any, mesh: Mesh) -> Callable:
    """Function (state, images uint8 [n, s, s, 3]) -> (maps [n, h, w], Rois), both numpy.

    A run without guidance is judged by the map that it would give with `saliency.source = activation`.
    """
    config = config.copy_and_resolve_references()
    config.saliency.source = map_source(config)
    saliency = make_saliency(network, config)

    def run(state: TrainState, images: UInt8[Array, "b s s 3"]) -> tuple[Array, Rois]:
        maps = saliency(*branch(state, config.saliency.branch), to_float(images))
        return maps, map_regions(maps, config)

    return on_devices(run, mesh)


def make_windows_fn(network: Network, config: Any, mesh: Mesh) -> Callable:
    """Function ((state, number), images uint8 [n, s, s, 3], boxes [n, k, 4], aspect [n]) -> windows by kind.

    Of the pairs that training draws at full strength from whole photos (''), of plain random crops
    ('random'), and with the annotated boxes as regions ('boxes'): [n, t, 2, 4] for `DRAWS` draws t, numpy.
    Draws follow from the seed and the number of the batch.
    """
    saliency = make_saliency(network, config) if config.saliency.source != "none" else None
    draws = {}
    for kind, where in {"": config.roi.source, "random": "none", "boxes": "ground_truth"}.items():
        own = config.copy_and_resolve_references()
        own.roi.source = where
        draws[kind] = make_windows(own)

    def run(
        trees: tuple,
        images: UInt8[Array, "b s s 3"],
        boxes: Float[Array, "b k 4"],
        aspect: Float[Array, "b"],
    ) -> dict[str, Float[Array, "b t 2 4"]]:
        state, number = trees
        maps = saliency(*branch(state, config.saliency.branch), to_float(images)) if saliency else None
        batch = {"image": images, "boxes": boxes, "aspect": aspect}
        keys = jax.random.split(key_for(config.seed, number, "what crops show"), (DRAWS, 4))
        return {
            kind: jnp.stack([draw(tuple(own), maps, batch, 1.0).boxes[:, :2] for own in keys], axis=1)
            for kind, draw in draws.items()
        }

    return on_devices(run, mesh)


def _box_after_box(of_box: Callable, boxes: Float[Array, "b m 4"]) -> Features:
    """[b, m, ...] from a function of one box per image: the memory of one crop, however many boxes."""
    found = jax.lax.map(of_box, jnp.moveaxis(boxes, 1, 0))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 1), found)
