"""Pooled features of whole canvases or of ground-truth objects, for the other evaluators."""

from collections.abc import Callable, Iterable

import numpy as np

from salcl_jax.types import HostBatch

WHOLE_CANVAS = (0.0, 0.0, 1.0, 1.0)


def extract(
    feature_fn: Callable, batches: Iterable[HostBatch], *, on: str, margin: float = 0.2
) -> tuple[np.ndarray, np.ndarray]:
    """Features and labels of every labelled example, each exactly once, in the batches' order.

    feature_fn(images uint8 [n, s, s, 3], boxes float32 [n, m, 4]) crops the boxes and returns
    pooled features [n, m, d]. on='image': one box, the whole canvas, labelled by batch['label'].
    on='object': the ground-truth boxes batch['boxes'] [n, k, 4], grown by `margin` of their side
    at each end and clipped to the canvas, labelled by batch['classes'] [n, k].
    Left out: padding examples (mask False), labels or classes of -1, boxes without area.
    Returns features float32 [n, d] and labels int32 [n]. Raises ValueError where `on` is unknown, a
    batch lacks what it needs, or nothing labelled was found.
    """
    choose = {"image": _whole_images, "object": _objects}.get(on)
    if choose is None:
        raise ValueError(f"features: on={on!r} is unknown; use 'image' or 'object'")
    features, labels = [], []
    for batch in batches:
        boxes, label = choose(batch, margin)
        # A batch without any label still runs: with several processes all must make the same calls.
        pooled = np.asarray(feature_fn(batch["image"], boxes), np.float32)
        if pooled.shape[:2] != boxes.shape[:2]:
            raise ValueError(f"features: feature_fn gave {pooled.shape} for boxes {boxes.shape}")
        keep = (label >= 0) & _real_examples(batch)[:, None]
        features.append(pooled[keep])
        labels.append(label[keep].astype(np.int32))
    if not sum(map(len, labels)):
        raise ValueError(f"features: no labelled example with on={on!r}; check the data's labels")
    return np.concatenate(features), np.concatenate(labels)


def grow_boxes(boxes: np.ndarray, margin: float) -> np.ndarray:
    """Boxes [..., 4] with `margin` of their side added at each end, clipped to the canvas."""
    low, high = boxes[..., :2], boxes[..., 2:]
    extra = margin * (high - low)
    return np.clip(np.concatenate([low - extra, high + extra], -1), 0.0, 1.0).astype(np.float32)


def _whole_images(batch: HostBatch, margin: float) -> tuple[np.ndarray, np.ndarray]:
    label = _need(batch, "label", "image")
    boxes = np.tile(np.asarray(WHOLE_CANVAS, np.float32), (len(label), 1, 1))
    return boxes, label[:, None]


def _objects(batch: HostBatch, margin: float) -> tuple[np.ndarray, np.ndarray]:
    boxes, classes = _need(batch, "boxes", "object"), _need(batch, "classes", "object")
    real = np.all(boxes[..., 2:] > boxes[..., :2], axis=-1)
    # Padding is cropped too, so that shapes stay fixed; a box without area could give NaN.
    safe = np.where(real[..., None], grow_boxes(boxes, margin), np.float32(WHOLE_CANVAS))
    return safe.astype(np.float32), np.where(real, classes, -1)


def _real_examples(batch: HostBatch) -> np.ndarray:
    return np.asarray(batch.get("mask", np.ones(len(batch["image"]), bool)), bool)


def _need(batch: HostBatch, name: str, on: str) -> np.ndarray:
    if name not in batch:
        raise ValueError(f"features: on={on!r} needs {name!r} in the batch; this source has none")
    return np.asarray(batch[name])
