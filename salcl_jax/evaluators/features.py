"""Columns of features, labels and classes, of whole photos or of ground-truth objects, for the evaluators."""

from collections.abc import Callable, Iterable, Mapping

import jax.numpy as jnp
import numpy as np

from salcl_jax.ops.crop import center_boxes
from salcl_jax.types import HostBatch

WHOLE_CANVAS = (0.0, 0.0, 1.0, 1.0)
VIEWS = ("whole", "center")
Columns = dict[str, np.ndarray]
_OF_IMAGE = ("id", "label", "classes", "difficult")


def columns(
    feature_fn: Callable,
    batches: Iterable[HostBatch],
    *,
    on: str,
    margin: float = 0.2,
    view: str = "whole",
) -> Columns:
    """Every example once, in the batches' order: features float32 [n, d] by level, and what is known of it.

    feature_fn(images uint8 [n, s, s, 3], boxes float32 [n, m, 4]) crops the boxes and returns features
    {level: [n, m, d]}. on='image': one box, the whole canvas or the central square of the photo (`view`);
    beside the levels the columns id, label, classes [n, k] and difficult [n, k] where batches have them.
    on='object': a row per ground-truth box of batch['boxes'] [n, k, 4], grown by `margin` of its side at
    each end and clipped to the canvas; beside the levels the column label, its class.
    Left out: padding and unusable examples (mask False), boxes without area or class.
    Raises ValueError where `on` or `view` is unknown, a batch lacks what it needs, or nothing is left.
    """
    if on not in ("image", "object") or view not in VIEWS:
        raise ValueError(f"features: on={on!r}, view={view!r}: use 'image' or 'object', one of {VIEWS}")
    found: dict[str, list[np.ndarray]] = {}
    for batch in batches:
        boxes, keep, known = _images(batch, view) if on == "image" else _objects(batch, margin)
        # A batch without any label still runs: with several processes all must make the same calls.
        levels = feature_fn(batch["image"], boxes)
        for name, values in ({k: np.asarray(v, np.float32) for k, v in levels.items()} | known).items():
            if values.shape[: keep.ndim] != keep.shape:
                raise ValueError(f"features: feature_fn gave {values.shape} for boxes {boxes.shape}")
            found.setdefault(name, []).append(values[keep])
    if not sum(map(len, next(iter(found.values()), []))):
        raise ValueError(f"features: no example with on={on!r}; check the data")
    return {name: np.concatenate(parts) for name, parts in found.items()}


def labelled(table: Mapping[str, np.ndarray], level: str = "pooled") -> tuple[np.ndarray, np.ndarray]:
    """Features [n, d] of one level and labels [n] of the examples that have one; ValueError if none has."""
    if "label" not in table:
        raise ValueError("features: the data has no labels; name a source that has")
    keep = np.asarray(table["label"]) >= 0
    if not keep.any():
        raise ValueError("features: no example is labelled; check the data's labels")
    if keep.all():  # a memory map stays one
        return table[level], np.asarray(table["label"], np.int32)
    return table[level][keep], np.asarray(table["label"][keep], np.int32)


def grow_boxes(boxes: np.ndarray, margin: float) -> np.ndarray:
    """Boxes [..., 4] with `margin` of their side added at each end, clipped to the canvas."""
    low, high = boxes[..., :2], boxes[..., 2:]
    extra = margin * (high - low)
    return np.clip(np.concatenate([low - extra, high + extra], -1), 0.0, 1.0).astype(np.float32)


def view_boxes(batch: HostBatch, view: str) -> np.ndarray:
    """The box of each photo that a test looks at, float32 [n, 1, 4]."""
    if view == "center":
        return np.asarray(center_boxes(jnp.asarray(batch["aspect"])), np.float32)[:, None]
    return np.tile(np.asarray(WHOLE_CANVAS, np.float32), (len(batch["image"]), 1, 1))


def _images(batch: HostBatch, view: str) -> tuple[np.ndarray, np.ndarray, Columns]:
    known = {name: np.asarray(batch[name])[:, None] for name in _OF_IMAGE if name in batch}
    return view_boxes(batch, view), _real_examples(batch)[:, None], known


def _objects(batch: HostBatch, margin: float) -> tuple[np.ndarray, np.ndarray, Columns]:
    for name in ("boxes", "classes"):
        if name not in batch:
            raise ValueError(f"features: on='object' needs {name!r} in the batch; this source has none")
    boxes, classes = batch["boxes"], np.asarray(batch["classes"], np.int32)
    real = np.all(boxes[..., 2:] > boxes[..., :2], axis=-1)
    # Most of the padding is left out: a power of two of boxes an image, so that few shapes are compiled.
    most = int(np.max(np.flatnonzero(real.any(axis=0)), initial=0)) + 1
    boxes, classes, real = (x[:, : 1 << (most - 1).bit_length()] for x in (boxes, classes, real))
    # What padding remains is cropped too; a box without area could give NaN.
    safe = np.where(real[..., None], grow_boxes(boxes, margin), np.float32(WHOLE_CANVAS))
    keep = real & (classes >= 0) & _real_examples(batch)[:, None]
    return safe.astype(np.float32), keep, {"label": classes}


def _real_examples(batch: HostBatch) -> np.ndarray:
    return np.asarray(batch.get("mask", np.ones(len(batch["image"]), bool)), bool)
