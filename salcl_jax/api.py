"""A trained network from Python: features by stage, saliency maps and regions of numpy images.

    import salcl_jax

    model = salcl_jax.load("runs/coco")     # a workdir, or one STEP of its checkpoints
    stages = model.features(images)         # uint8 [n, h, w, 3] -> stages [n, h', w', d], 'pooled' [n, d]
    maps, regions = model.saliency(images)  # maps [n, h, w]; boxes [n, r, 4], valid [n, r], score [n, r]

Arrays are numpy's, both ways.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from salcl_jax import checkpoint as checkpoint_lib
from salcl_jax import config as config_lib
from salcl_jax import config_record, frozen, sharding
from salcl_jax.data.decode import WHOLE, from_array, to_canvas
from salcl_jax.guidance import branch
from salcl_jax.models.network import Network, build
from salcl_jax.ops.augment import normalize
from salcl_jax.train_step import make_init
from salcl_jax.types import Rois, TrainState


@dataclasses.dataclass(frozen=True)
class Model:
    """A network with its weights and the configuration it learnt with; every method takes numpy images."""

    config: Any  # base() with the fields recorded in the checkpoint
    step: int  # of the checkpoint
    network: Network
    state: TrainState
    batch_size: int
    _features: Callable
    _maps: Callable

    def features(self, images: np.ndarray, branch: str = "") -> dict[str, np.ndarray]:
        """Features of whole images, by stage and 'pooled'; running BatchNorm statistics, no resizing.

        images: uint8 [n, h, w, 3], n >= 1, all of one size. branch: 'online' | 'target' ('' is that of
        config.eval). Returns stages [n, h', w', d] and 'pooled' [n, d], float32. Raises ValueError for
        other images.
        """
        if getattr(images, "dtype", None) != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
            raise ValueError("images must be uint8 [n, h, w, 3]")
        run = self._features(branch or self.config.eval.branch)
        return self._in_batches(run, images)

    def saliency(self, images: Sequence[np.ndarray]) -> tuple[np.ndarray, Rois]:
        """The map that guides training, and its regions.

        images: n of uint8 [h, w, 3], of any sizes. Returns maps [n, h, w] in [0, 1] and Rois with boxes
        [n, r, 4] = (y0, x0, y1, x1) in [0, 1] of the image, valid [n, r], score [n, r]. The sources
        'contrast' and 'gradcam' compare an image with the others of its batch of `batch_size`.
        """
        canvases = [to_canvas(from_array(image), WHOLE, self.config.data.canvas)[0] for image in images]
        return self._in_batches(self._maps, np.stack(canvases))

    def untrained(self) -> "Model":
        """The same network with the first weights of its seed: what a trained one is compared with."""
        init = make_init(self.network, config_lib.finish(self.config, devices=1, images=1))
        state = jax.jit(lambda: init()._replace(opt_state=()))()
        return dataclasses.replace(self, step=0, state=state)

    def _in_batches(self, run: Callable, images: np.ndarray) -> Any:
        """Run over batches of one size, the last filled up with its own images; only real rows return."""
        found = []
        for first in range(0, len(images), self.batch_size):
            part = images[first : first + self.batch_size]
            rows = np.arange(self.batch_size) % len(part)
            out = run(self.state, part[rows])
            found.append([np.asarray(x)[: len(part)] for x in jax.tree.leaves(out)])
        joined = [np.concatenate(parts) for parts in zip(*found, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(out), joined)


def load(checkpoint: str, *, batch_size: int = 32) -> Model:
    """The newest readable checkpoint of a workdir, or one STEP folder of it.

    batch_size: images at a time over all devices (rounded up to a multiple of them). Raises
    FileNotFoundError where there is no checkpoint and ValueError for one that cannot be read.
    """
    mesh = sharding.make_mesh()
    config = config_lib.base()
    fields = checkpoint_lib.load_extra(checkpoint).get("fields", {})
    config_record.recall(config, fields, tuple(config.keys()))
    network = build(**config.model)
    whole = sharding.replicated(mesh)
    init = make_init(network, config_lib.finish(config, devices=1, images=1))
    shapes = jax.eval_shape(lambda: init()._replace(opt_state=()))
    trees, step = checkpoint_lib.load_networks(checkpoint, checkpoint_lib.abstract_like(shapes, whole))
    state = TrainState(**({name: () for name in TrainState._fields} | trees | {"step": np.int32(step)}))

    def features(name: str) -> Callable:
        def run(state: TrainState, images: jax.Array) -> dict[str, jax.Array]:
            x = normalize(images.astype("float32")[:, None] / 255)
            stages, _ = network.encode(*branch(state, name), x, train=False)
            return {stage: value[:, 0].astype("float32") for stage, value in stages.items()}

        return frozen.on_devices(run, mesh)

    by_branch = {name: features(name) for name in ("online", "target")}
    maps = frozen.make_maps_fn(network, config, mesh)
    size = frozen.divisible(batch_size, mesh)
    return Model(config, step, network, state, size, by_branch.__getitem__, maps)
