"""The evaluations that run beside training: held-out loss, localisation, k-NN and a linear probe.

Every process reads the whole of each set and all devices share the work, so all processes get the same
figures. Names of figures start with the evaluator's: 'pretext/loss', 'knn/top1', 'localization/corloc'.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from salcl_jax.data.pipeline import eval_batches
from salcl_jax.data.sources import Source
from salcl_jax.evaluators import features, knn, linear, localization
from salcl_jax.guidance import branch, make_saliency, map_regions, to_float
from salcl_jax.models.network import Network
from salcl_jax.sharding import data_sharded, replicated, to_device
from salcl_jax.train_step import make_eval_step, make_feature_fn
from salcl_jax.types import HostBatch, Rois, TrainState

Evaluation = Callable[[TrainState], dict[str, float]]
PRETEXT_BATCHES = 4  # enough for a loss that is steady to a percent


def make_evaluation(
    network: Network, config: Any, mesh: Mesh, sources: Mapping[str, Source]
) -> Evaluation:
    """Function state -> figures, of every evaluation whose data is in `sources`.

    sources: 'pretext', 'localization', 'probe_train' and 'probe_test', each optional.
    """
    parts: list[Evaluation] = []
    if "pretext" in sources:
        parts.append(_pretext(network, config, mesh, sources["pretext"]))
    if "localization" in sources:
        parts.append(_localization(network, config, mesh, sources["localization"]))
    if "probe_train" in sources:
        parts.append(_probes(network, config, mesh, sources["probe_train"], sources["probe_test"]))

    def evaluate(state: TrainState) -> dict[str, float]:
        return {name: value for part in parts for name, value in part(state).items()}

    return evaluate


def batches(
    source: Source, config: Any, *, batch_size: int, limit: int = 0
) -> Iterator[HostBatch]:
    """Evaluation batches of a source with the data fields of the configuration."""
    c = config.data
    return eval_batches(
        source, batch_size=batch_size, canvas=c.canvas, max_boxes=c.max_boxes, limit=limit,
        min_side=c.min_side, max_pixels=c.max_pixels, workers=c.workers,
    )  # fmt: skip


def share_of_process(batch: HostBatch) -> HostBatch:
    """The rows of a batch, known to all processes, that this process hands to its devices."""
    count, index = jax.process_count(), jax.process_index()
    return {k: v[index * len(v) // count : (index + 1) * len(v) // count] for k, v in batch.items()}


def divisible(size: int, mesh: Mesh) -> int:
    """The batch size rounded up to a multiple of the devices."""
    return -(-size // mesh.size) * mesh.size


def make_maps_fn(network: Network, config: Any, mesh: Mesh) -> Callable:
    """Function (state, images uint8 [n, s, s, 3]) -> (maps [n, h, w], Rois), both numpy.

    A run without guidance is judged by the map that it would give with `saliency.source = activation`.
    """
    config = config.copy_and_resolve_references()
    if config.saliency.source == "none":
        config.saliency.source = "activation"
    saliency = make_saliency(network, config)

    def run(state: TrainState, images):
        maps = saliency(*branch(state, config.saliency.branch), to_float(images))
        return maps, map_regions(maps, config)

    jitted = _jit(run, mesh)

    def maps_fn(state: TrainState, images: np.ndarray) -> tuple[np.ndarray, Rois]:
        batch = to_device(share_of_process({"image": images}), mesh)
        return jax.device_get(jitted(state, batch["image"]))

    return maps_fn


def _jit(function: Callable, mesh: Mesh, leaves: int = 1) -> Callable:
    """Compile (state, leaves of a batch...) -> replicated, so that every process can read the result."""
    whole, split = replicated(mesh), data_sharded(mesh)
    return jax.jit(function, in_shardings=(whole, *[split] * leaves), out_shardings=whole)


def _pretext(network: Network, config: Any, mesh: Mesh, source: Source) -> Evaluation:
    size = config.batch_size // config.accumulate
    most = config.eval.limit or len(source)
    size = min(size, len(source), most) // mesh.size * mesh.size
    if size < 2:
        raise ValueError(
            f"config.eval.pretext: {source.name} has {len(source)} images, too few for {mesh.size} devices"
        )
    step = _jit(make_eval_step(network, config), mesh)
    with_boxes = config.roi.source == "ground_truth"
    keep = ("image", "aspect") + (("boxes",) if with_boxes else ())

    def evaluate(state: TrainState) -> dict[str, float]:
        found = []
        for batch in batches(source, config, batch_size=size, limit=PRETEXT_BATCHES * size):
            good = np.flatnonzero(batch["mask"])
            if found and len(good) < size / 2:
                continue  # the padded end of the set
            # BatchNorm must not see black rows: others of the batch stand in for them.
            rows = np.where(batch["mask"], np.arange(size), good[np.arange(size) % len(good)])
            leaves = to_device(share_of_process({k: batch[k][rows] for k in keep}), mesh)
            found.append(jax.device_get(step(state, leaves)))
        names = ("loss", "spread")
        return {f"pretext/{n}": float(np.mean([f[n] for f in found])) for n in names}

    return evaluate


def _localization(network: Network, config: Any, mesh: Mesh, source: Source) -> Evaluation:
    maps_fn = make_maps_fn(network, config, mesh)
    size = divisible(config.eval.batch_size, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        data = batches(source, config, batch_size=size, limit=config.eval.limit)
        return localization.evaluate(lambda images: maps_fn(state, images), data)

    return evaluate


def _probes(network: Network, config: Any, mesh: Mesh, train: Source, test: Source) -> Evaluation:
    c = config.eval
    jitted = _jit(make_feature_fn(network, config), mesh, leaves=2)
    size = divisible(c.batch_size, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        def feature_fn(images: np.ndarray, boxes: np.ndarray) -> np.ndarray:
            batch = to_device(share_of_process({"image": images, "boxes": boxes}), mesh)
            return jax.device_get(jitted(state, batch["image"], batch["boxes"]))

        first, second = (
            features.extract(
                feature_fn, batches(s, config, batch_size=size, limit=c.limit), on=c.probe_on
            )
            for s in (train, test)
        )
        figures = knn.evaluate(first, second, ks=c.knn)
        return figures | (linear.evaluate(first, second) if c.linear else {})

    return evaluate
