"""The evaluations that run beside training: held-out loss, localisation, k-NN and a linear probe.

Names of figures start with the evaluator's: 'pretext/loss', 'knn/top1', 'localization/corloc'.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import Mesh

from salcl_jax import frozen, tasks
from salcl_jax.data.sources import Source
from salcl_jax.evaluators import features, knn, linear, localization
from salcl_jax.judge import Judge, Subject
from salcl_jax.models.network import Network
from salcl_jax.train_step import make_eval_step
from salcl_jax.types import TrainState

Evaluation = Callable[[TrainState], dict[str, float]]
PRETEXT_BATCHES = 4  # enough for a loss that is steady to a percent


def make_evaluations(
    network: Network, config: Any, mesh: Mesh, sources: Mapping[str, Source]
) -> list[Evaluation]:
    """Functions state -> figures, one for every evaluation whose data is in `sources`.

    sources: 'pretext', 'localization', 'probe_train' and 'probe_test', each optional. The tasks of
    `eval.tasks` open their own. Without a usable photo they raise ValueError.
    """
    parts: list[Evaluation] = []
    if "pretext" in sources:
        parts.append(_pretext(network, config, mesh, sources["pretext"]))
    if "localization" in sources:
        parts.append(_localization(network, config, mesh, sources["localization"]))
    if "probe_train" in sources:
        parts.append(_probes(network, config, mesh, sources["probe_train"], sources["probe_test"]))
    if config.eval.tasks:
        parts += _tasks(network, config, mesh)
    return parts


def _pretext(network: Network, config: Any, mesh: Mesh, source: Source) -> Evaluation:
    size = config.batch_size // config.accumulate
    most = config.eval.limit or len(source)
    size = min(size, len(source), most) // mesh.size * mesh.size
    if size < 2:
        raise ValueError(
            f"config.eval.pretext: {source.name} has {len(source)} images, too few for {mesh.size} devices"
        )
    with_boxes = config.roi.source == "ground_truth"
    names = ("image", "aspect") + (("boxes",) if with_boxes else ())
    eval_step = make_eval_step(network, config)
    step = frozen.on_devices(lambda state, *x: eval_step(state, dict(zip(names, x, strict=True))), mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        found = []
        for batch in frozen.batches(source, config, batch_size=size, limit=PRETEXT_BATCHES * size):
            good = np.flatnonzero(batch["mask"])
            if not len(good) or found and len(good) < size / 2:
                continue  # unusable, or the padded end of the set
            rows = localization.filled(batch["mask"])  # BatchNorm must not see black rows
            found.append(step(state, *(batch[name][rows] for name in names)))
        if not found:
            raise ValueError(f"config.eval.pretext: {source.name}: no photo can be used; check the files")
        return {f"pretext/{n}": float(np.mean([f[n] for f in found])) for n in ("loss", "spread")}

    return evaluate


def _tasks(network: Network, config: Any, mesh: Mesh) -> list[Evaluation]:
    """Tasks of `salcl_jax.evaluate`, on at most `eval.limit` photos of each set."""
    config = config.copy_and_resolve_references()
    config.tasks.limit = config.tasks.limit or config.eval.limit
    judge = Judge(network, config, mesh)
    for name in config.eval.tasks:
        tasks.about(name, judge)  # opens the photos: what lacks, lacks before the first step

    def evaluate(name: str, state: TrainState) -> dict[str, float]:
        return tasks.run(name, judge, Subject("online", state, digest=""))

    return [partial(evaluate, name) for name in config.eval.tasks]


def _localization(network: Network, config: Any, mesh: Mesh, source: Source) -> Evaluation:
    maps_fn = frozen.make_maps_fn(network, config, mesh)
    size = frozen.divisible(config.eval.batch_size, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        data = frozen.batches(source, config, batch_size=size, limit=config.eval.limit)
        return localization.evaluate(lambda images: maps_fn(state, images), data)

    return evaluate


def _probes(network: Network, config: Any, mesh: Mesh, train: Source, test: Source) -> Evaluation:
    c = config.eval
    feature_fn = frozen.on_devices(frozen.make_features(network, config), mesh)
    size = frozen.divisible(c.batch_size, mesh)

    def evaluate(state: TrainState) -> dict[str, float]:
        first, second = (
            features.labelled(
                features.columns(
                    partial(feature_fn, state),
                    frozen.batches(s, config, batch_size=size, limit=c.limit), on=c.probe_on,
                )  # fmt: skip
            )
            for s in (train, test)
        )
        figures = knn.evaluate(first, second, ks=c.knn)
        return figures | (linear.evaluate(first, second) if c.linear else {})

    return evaluate
