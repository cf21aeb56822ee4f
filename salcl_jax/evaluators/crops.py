"""What the crops of training show of annotated objects: a look at guidance that needs no training.

Two crops teach what an object is if both show it. Beside the crops as configured stand plain random ones and
those that the annotated boxes would give in place of the map's regions.
"""

from collections.abc import Callable, Iterable

import numpy as np

from salcl_jax.evaluators.localization import counted, filled, real_boxes
from salcl_jax.types import HostBatch

HALF, TENTH = 0.5, 0.1  # of an object, inside a crop


def evaluate(windows_fn: Callable, batches: Iterable[HostBatch]) -> dict[str, float]:
    """Means of `scores` over all draws of all images with boxes, named 'crops/...'.

    windows_fn(number of the batch, images uint8 [n, s, s, 3], boxes [n, k, 4], aspect [n]) returns windows
    [n, t, 2, 4] of t draws by kind: '' as configured, 'random' and 'boxes', whose figures are
    'crops/chance/<score>_<kind>'. Batches as for `localization.evaluate`. Raises ValueError where no image
    has a box.
    """
    found: dict[str, list[np.ndarray]] = {}
    for number, batch in enumerate(batches):
        keep = np.asarray(batch.get("mask", np.ones(len(batch["boxes"]), bool)), bool)
        if not keep.any():
            continue
        rows, boxes = filled(keep), counted(batch)
        counts = keep & real_boxes(boxes).any(-1)
        windows = windows_fn(number, batch["image"][rows], boxes[rows], batch["aspect"][rows])
        for kind, drawn in windows.items():
            for name, values in scores(np.asarray(drawn)[counts], boxes[counts]).items():
                place = f"crops/chance/{name}_{kind}" if kind else f"crops/{name}"
                found.setdefault(place, []).append(values.ravel())
    if not any(len(part) for parts in found.values() for part in parts):
        raise ValueError("crops: no image has a ground-truth box; check the data")
    return {name: float(np.concatenate(parts).mean()) for name, parts in found.items()}


def scores(windows: np.ndarray, boxes: np.ndarray) -> dict[str, np.ndarray]:
    """Scores [n, t] of pairs of windows [n, t, 2, 4] against boxes [n, k, 4], in [0, 1].

    shared, touched: 1 where both windows hold half, a tenth, of the same box, else 0; share: the part of
    both windows that one box takes (of the window where it is smaller, for the best box).
    """
    w, b = (np.asarray(x, np.float64) for x in (windows[:, :, :, None], boxes[:, None, None]))
    overlap = np.minimum(w[..., 2:], b[..., 2:]) - np.maximum(w[..., :2], b[..., :2])
    both = np.prod(np.maximum(overlap, 0.0), -1)  # [n, t, 2, k]
    real = real_boxes(boxes)[:, None, None]

    def best(whole: np.ndarray) -> np.ndarray:
        area = np.prod(whole[..., 2:] - whole[..., :2], -1)
        part = np.where(real, both / np.where(area > 0, area, 1.0), 0.0)
        return part.min(-2).max(-1)

    held = best(b)
    at_least = {"shared": HALF, "touched": TENTH}
    return {**{name: (held >= part).astype(float) for name, part in at_least.items()}, "share": best(w)}
