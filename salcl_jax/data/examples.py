"""One photo of a source -> one example of a batch: canvas, its boxes and, on demand, its label map."""

import functools
import math
from typing import Any

import numpy as np

from salcl_jax.data import masks
from salcl_jax.data.decode import WHOLE, SkipImage, decode, from_array, to_canvas
from salcl_jax.data.sources import Source

Example = dict[str, Any]
TRIES = 64  # files looked at before a slot of the batch gives up
KEPT_SHARE = 0.3  # a box needs this share of its area inside the window
_NO_BOXES = np.zeros((0, 4), np.float32), np.zeros(0, np.int32), np.zeros(0, bool)


class Unusable(ValueError):
    """No image among those tried can be used."""


def window_boxes(
    boxes: np.ndarray,
    classes: np.ndarray,
    difficult: np.ndarray,
    window: tuple[float, ...],
    max_boxes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes of the photo -> boxes of the window, padded.

    boxes [k, 4], classes [k], difficult [k] -> float32 [max_boxes, 4] (zero rows = padding), int32
    [max_boxes] (-1 = padding), bool [max_boxes]. Boxes with less than KEPT_SHARE of their area inside
    go; if too many are left, the largest stay.
    """
    origin = np.array([window[0], window[1]] * 2, np.float64)
    scale = np.array([window[2] - window[0], window[3] - window[1]] * 2, np.float64)
    moved = (boxes.astype(np.float64) - origin) / scale
    inside = np.clip(moved, 0.0, 1.0)
    full, area = _area(moved), _area(inside)
    keep = np.flatnonzero((full > 0) & (area > 0) & (area >= KEPT_SHARE * full))
    if len(keep) > max_boxes:
        keep = np.sort(keep[np.argsort(-area[keep], kind="stable")[:max_boxes]])
    out = np.zeros((max_boxes, 4), np.float32)
    kinds = np.full(max_boxes, -1, np.int32)
    hard = np.zeros(max_boxes, bool)
    out[: len(keep)], kinds[: len(keep)] = inside[keep], classes[keep]
    hard[: len(keep)] = difficult[keep]
    return out, kinds, hard


def _area(boxes: np.ndarray) -> np.ndarray:
    return np.maximum(boxes[:, 2] - boxes[:, 0], 0) * np.maximum(boxes[:, 3] - boxes[:, 1], 0)


def load(
    source: Source,
    index: int,
    *,
    canvas: int,
    window: tuple[float, float, float, float] = WHOLE,
    max_boxes: int = 0,
    min_side: int = 0,
    max_pixels: int = 0,
    tries: int = TRIES,
    with_mask: bool = False,
) -> Example:
    """One example of a batch, without the batch axis; fields as in its batches, `masks` with_mask.

    An image that cannot be used is passed over for another, `tries` images at most, and noted.
    Raises Unusable (a ValueError) when none of them is readable.
    """
    # the window, not the photo, must come out at least as fine as the canvas
    fine = math.ceil(canvas / min(window[2] - window[0], window[3] - window[1]))
    reason = ""
    for skipped in range(min(tries, len(source))):
        number = (index + skipped * _stride(len(source))) % len(source)
        try:
            record = source.read(number)
            if "encoded" in record:
                photo = decode(record["encoded"], fine, min_side=min_side, max_pixels=max_pixels)
            else:
                photo = from_array(record["image"])
        except (SkipImage, OSError) as error:  # OSError: the file went, or may not be read
            reason = getattr(error, "reason", "unreadable")
            source.note(source.place(number), reason)
            continue
        example = _example(record, photo, number, skipped, canvas, window, max_boxes)
        if with_mask:
            mask = masks.by_class(masks.decode(record.get("mask"), max_pixels), record.get("mask_classes"))
            example["masks"] = masks.to_canvas(mask, window, canvas)
        return example
    raise Unusable(
        f"{source.name}: {min(tries, len(source))} images tried for number {index} cannot be "
        f"used (last: {reason}); check the files, data.min_side and data.max_pixels"
    )


@functools.cache
def _stride(n: int) -> int:
    """Steps of it visit all n photos, each far from the last: broken photos often lie side by side.

    Neighbours would be passed over anew by each photo before them, and 64 of them would end the run.
    """
    return next(k for k in range(max(1, round(0.618 * n)), 2 * n + 1) if math.gcd(k, n) == 1)


def _example(record, photo, number, skipped, canvas, window, max_boxes) -> Example:
    image, aspect = to_canvas(photo, window, canvas)
    boxes, classes, difficult = _NO_BOXES
    if max_boxes:
        boxes, classes = record.get("boxes", boxes), record.get("classes", classes)
        difficult = record.get("difficult", np.zeros(len(boxes), bool))
        boxes, classes, difficult = window_boxes(boxes, classes, difficult, window, max_boxes)
    return {
        "image": image,
        "aspect": np.float32(aspect),
        "id": np.int32(number),
        "skipped": np.int32(skipped),
        "label": np.int32(record.get("label", -1)),
        "boxes": boxes,
        "classes": classes,
        "difficult": difficult,
    }


def blank(number: int, skipped: int, *, canvas: int, max_boxes: int, with_mask: bool) -> Example:
    """What stands where there is no image: fields as those of `load`, and mask False."""
    example = {
        "image": np.zeros((canvas, canvas, 3), np.uint8),
        "aspect": np.float32(1),
        "id": np.int32(number),
        "skipped": np.int32(skipped),
        "label": np.int32(-1),
        "boxes": np.zeros((max_boxes, 4), np.float32),
        "classes": np.full(max_boxes, -1, np.int32),
        "difficult": np.zeros(max_boxes, bool),
        "mask": np.bool_(False),
    }
    return example | ({"masks": masks.to_canvas(None, WHOLE, canvas)} if with_mask else {})
