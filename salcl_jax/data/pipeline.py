"""Sources -> batches of canvases. Stateless: what step t holds follows from (seed, t) alone."""

import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from salcl_jax.data import workers as parallel
from salcl_jax.data.decode import WHOLE, SkipImage, decode, from_array, to_canvas
from salcl_jax.data.sources import Source

HostBatch = dict[str, np.ndarray]
TRIES = 64  # files looked at before a slot of the batch gives up
KEPT_SHARE = 0.3  # a box needs this share of its area inside the window
_GROUP = 8  # at most so many images a call: spreads the cost of entering tf.data
_ORDER, _WINDOW = 1, 2  # independent random streams
_NO_BOXES = np.zeros((0, 4), np.float32), np.zeros(0, np.int32)


class Unusable(ValueError):
    """No image among those tried can be used."""


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    key = np.array([seed % 2**64, number % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return _generator(seed, epoch, _ORDER).permutation(n)


def order(position: int, n: int, seed: int) -> int:
    """Index in [0, n) of the example at a position of the endless shuffled stream.

    Positions e * n .. (e + 1) * n - 1 are epoch e: a permutation drawn from (seed, e).
    """
    return int(_permutation(n, seed, position // n)[position % n])


def draw_window(
    position: int, seed: int, window_area: tuple[float, float]
) -> tuple[float, float, float, float]:
    """(y0, x0, y1, x1) of the position's window: area share uniform in window_area, the photo's
    own aspect, placed uniformly. (1, 1) is the whole photo."""
    low, high = window_area
    if low >= 1.0:
        return WHOLE
    area, y, x = _generator(seed, position, _WINDOW).random(3)
    side = math.sqrt(low + (high - low) * area)
    y, x = y * (1.0 - side), x * (1.0 - side)
    return y, x, min(1.0, y + side), min(1.0, x + side)


def window_boxes(
    boxes: np.ndarray, classes: np.ndarray, window: tuple[float, ...], max_boxes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of the photo -> boxes of the window, padded.

    boxes [k, 4] and classes [k] -> float32 [max_boxes, 4] (zero rows = padding), int32 [max_boxes]
    (-1 = padding). Boxes with less than KEPT_SHARE of their area inside go; if too many are left,
    the largest stay.
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
    out[: len(keep)], kinds[: len(keep)] = inside[keep], classes[keep]
    return out, kinds


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
) -> dict[str, Any]:
    """One example of a batch, without the batch axis; fields as in HostBatch.

    An image that cannot be used is passed over for the next index, `tries` images at most.
    Raises Unusable (a ValueError) when none of them is readable.
    """
    # the window, not the photo, must come out at least as fine as the canvas
    fine = math.ceil(canvas / min(window[2] - window[0], window[3] - window[1]))
    reason = ""
    for skipped in range(min(tries, len(source))):
        number = (index + skipped) % len(source)
        try:
            record = source.read(number)
            if "encoded" in record:
                photo = decode(record["encoded"], fine, min_side=min_side, max_pixels=max_pixels)
            else:
                photo = from_array(record["image"])
        except (SkipImage, OSError) as error:  # OSError: the file went, or may not be read
            reason = getattr(error, "reason", "unreadable")
            continue
        return _example(record, photo, number, skipped, canvas, window, max_boxes)
    raise Unusable(
        f"{source.name}: {min(tries, len(source))} images in a row from number {index} cannot be "
        f"used (last: {reason}); check the files, data.min_side and data.max_pixels"
    )


def _example(record, photo, number, skipped, canvas, window, max_boxes) -> dict[str, Any]:
    image, aspect = to_canvas(photo, window, canvas)
    boxes, classes = _NO_BOXES
    if max_boxes:
        found = record.get("boxes", boxes), record.get("classes", classes)
        boxes, classes = window_boxes(*found, window, max_boxes)
    return {
        "image": image,
        "aspect": np.float32(aspect),
        "id": np.int32(number),
        "skipped": np.int32(skipped),
        "label": np.int32(record.get("label", -1)),
        "boxes": boxes,
        "classes": classes,
    }


def _stack(examples: Sequence[dict[str, Any]], keys: Sequence[str]) -> HostBatch:
    return {key: np.stack([example[key] for example in examples]) for key in keys}


def _keys(source: Source, with_boxes: bool) -> tuple[str, ...]:
    keys = ("image", "aspect", "id", "skipped")
    keys += ("label",) if source.has_labels else ()
    return keys + (("boxes", "classes") if with_boxes else ())


def _local(batch_size: int, process_index: int, process_count: int) -> int:
    if batch_size % process_count:
        raise ValueError(
            f"batch size {batch_size} does not divide over {process_count} processes; change it"
        )
    if not 0 <= process_index < process_count:
        raise ValueError(f"process {process_index} of {process_count}: no such process")
    return batch_size // process_count


def _backend(source: Source, use_tf: bool | None) -> bool:
    if use_tf is None:
        return source.kind != "arrays" and parallel.has_tensorflow()
    return use_tf


def train_batches(
    source: Source,
    *,
    batch_size: int,
    canvas: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    start_step: int = 0,
    window_area: tuple[float, float] = (1.0, 1.0),
    max_boxes: int = 0,
    with_boxes: bool = False,
    min_side: int = 0,
    max_pixels: int = 0,
    workers: int = 8,
    prefetch: int = 2,
    use_tf: bool | None = None,
) -> Iterator[HostBatch]:
    """Endless batches; step t holds positions t * B .. (t + 1) * B - 1 of the shuffled stream.

    batch_size is global; a process yields its contiguous slice, so P processes together hold what
    one would. Starts at start_step at once. Fields: image uint8 [n, s, s, 3], aspect float32 [n],
    id, skipped int32 [n], label if the source has labels, and with_boxes boxes float32 [n, k, 4],
    classes int32 [n, k]. use_tf None = tf.data where tensorflow is installed and the source is not
    in memory; both ways give the same batches. Raises ValueError.
    """
    local = _local(batch_size, process_index, process_count)
    if with_boxes and not source.has_boxes:
        raise ValueError(f"{source.name}: has no boxes; use another source or turn boxes off")
    low, high = window_area
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"window_area {window_area}: needs 0 < low <= high <= 1")
    keys = _keys(source, with_boxes)
    group = _divisor(local)
    chunks = local // group

    def load_position(position: int) -> dict[str, Any]:
        return load(
            source,
            order(position, len(source), seed),
            canvas=canvas,
            window=draw_window(position, seed, window_area),
            max_boxes=max_boxes,
            min_side=min_side,
            max_pixels=max_pixels,
        )

    def load_chunk(number: int) -> HostBatch:
        step, part = divmod(number, chunks)
        first = step * batch_size + process_index * local + part * group
        return _stack([load_position(first + i) for i in range(group)], keys)

    return parallel.parallel_map(
        load_chunk,
        start_step * chunks,
        None,
        chunks,
        workers=workers,
        prefetch=prefetch,
        use_tf=_backend(source, use_tf),
    )


def _divisor(n: int) -> int:
    return next(size for size in range(min(n, _GROUP), 0, -1) if n % size == 0)


def eval_batches(
    source: Source,
    *,
    batch_size: int,
    canvas: int,
    max_boxes: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    limit: int = 0,
    min_side: int = 0,
    max_pixels: int = 0,
    workers: int = 8,
    prefetch: int = 2,
    use_tf: bool | None = None,
) -> Iterator[HostBatch]:
    """Every example once, in order, whole photo; limit 0 = all, else that many, evenly spread.

    Global batch t holds examples t * B .. (t + 1) * B - 1, sliced over the processes as in
    train_batches, so all yield the same number of batches. Fields as there, with label and boxes
    where the source has them (boxes need max_boxes > 0), and mask bool [n]: False for padding and
    for an image that cannot be used (that one has skipped 1).
    """
    local = _local(batch_size, process_index, process_count)
    count = min(limit, len(source)) if limit else len(source)
    group = _divisor(local)
    chunks = local // group
    keys = (*_keys(source, source.has_boxes and max_boxes > 0), "mask")

    def load_number(number: int) -> dict[str, Any]:
        if number >= count:
            return _blank(canvas, max_boxes, -1, 0)
        sizes = {"min_side": min_side, "max_pixels": max_pixels}
        number = number * len(source) // count
        try:
            example = load(source, number, canvas=canvas, max_boxes=max_boxes, tries=1, **sizes)
        except Unusable:
            return _blank(canvas, max_boxes, number, 1)
        return example | {"mask": np.bool_(True)}

    def load_chunk(number: int) -> HostBatch:
        step, part = divmod(number, chunks)
        first = step * batch_size + process_index * local + part * group
        return _stack([load_number(first + i) for i in range(group)], keys)

    return parallel.parallel_map(
        load_chunk,
        0,
        -(-count // batch_size) * chunks,
        chunks,
        workers=workers,
        prefetch=prefetch,
        use_tf=_backend(source, use_tf),
    )


def _blank(canvas: int, max_boxes: int, number: int, skipped: int) -> dict[str, Any]:
    return {
        "image": np.zeros((canvas, canvas, 3), np.uint8),
        "aspect": np.float32(1),
        "id": np.int32(number),
        "skipped": np.int32(skipped),
        "label": np.int32(-1),
        "boxes": np.zeros((max_boxes, 4), np.float32),
        "classes": np.full(max_boxes, -1, np.int32),
        "mask": np.bool_(False),
    }
