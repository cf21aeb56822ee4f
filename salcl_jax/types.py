"""The values that travel between the parts of the program, and the letters their shapes use.

Shape letters: b batch, v views, r regions of interest (ROIs), k ground-truth boxes, h w map rows and
columns, d width (channels), s canvas side, p crop side. The view axis follows the batch axis, so that
flattening [b, v] stays on one device when the batch is sharded.

A box is (y0, x0, y1, x1) on the canvas taken as the unit square.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Array, Bool, Float, Int

HostBatch = dict[str, np.ndarray]
Batch = dict[str, Array]
Metrics = dict[str, Array]
PyTree = Any


class Rois(NamedTuple):
    """Regions of interest of a batch; invalid ones keep a harmless box so that shapes stay fixed."""

    boxes: Float[Array, "b r 4"]
    valid: Bool[Array, "b r"]
    score: Float[Array, "b r"]


class TrainState(NamedTuple):
    """Everything that training changes. It holds no random key: keys come from (seed, step)."""

    step: Int[Array, ""]  # optimizer steps done
    failed: Int[Array, ""]  # 0, or the step that met a non-finite loss: the state then stays as it was
    params: PyTree  # {'encoder', 'projector', 'predictor'}
    target_params: PyTree  # {'encoder', 'projector'}: moving average of params
    batch_stats: PyTree
    target_batch_stats: PyTree  # from the target's own forward passes, never averaged from online
    opt_state: PyTree
