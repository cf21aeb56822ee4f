"""Sources -> batches of canvases. Stateless: what step t holds follows from (seed, t) alone."""

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from salcl_jax.data import cache as caching
from salcl_jax.data import workers as parallel
from salcl_jax.data.decode import WHOLE
from salcl_jax.data.examples import Unusable, blank, load
from salcl_jax.data.sources import Source

HostBatch = dict[str, np.ndarray]
_ORDER, _WINDOW = 1, 2  # independent random streams


def _generator(seed: int, number: int, stream: int) -> np.random.Generator:
    key = np.array([seed % 2**64, number % 2**64], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))


@functools.lru_cache(maxsize=4)
def _permutation(n: int, seed: int, epoch: int) -> np.ndarray:
    return _generator(seed, epoch, _ORDER).permutation(n)


def order(position: int, n: int, seed: int) -> int:
    """Index in [0, n) of the example at a position of the endless shuffled stream.

    Positions e * n .. (e + 1) * n - 1 are epoch e: a permutation drawn from (seed, e).

    >>> sorted(order(position, n=4, seed=0) for position in range(4))
    [0, 1, 2, 3]
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


def uses_tf(source: Source) -> bool:
    """Whether batches of the source come by tf.data where the caller does not choose."""
    return source.kind != "arrays" and parallel.has_tensorflow()


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
    cache: str = "none",
    cache_gb: float = 0.0,
) -> Iterator[HostBatch]:
    """Endless batches; step t holds positions t * B .. (t + 1) * B - 1 of the shuffled stream.

    batch_size is global; a process yields its contiguous slice, so P processes together hold what
    one would. Starts at start_step at once. Fields: image uint8 [n, s, s, 3], aspect float32 [n],
    id, skipped int32 [n], label if the source has labels, and with_boxes boxes float32 [n, k, 4],
    classes int32 [n, k]. use_tf None = tf.data where tensorflow is installed and the source is not
    in memory; both ways give the same batches, as does every cache ('none', 'encoded', 'canvas'; the
    last needs whole photos) of at most cache_gb * 1e9 bytes. Raises ValueError.
    """
    local = _local(batch_size, process_index, process_count)
    if with_boxes and not source.has_boxes:
        raise ValueError(f"{source.name}: has no boxes; use another source or turn boxes off")
    low, high = window_area
    if not 0.0 < low <= high <= 1.0:
        raise ValueError(f"window_area {window_area}: needs 0 < low <= high <= 1")
    if cache == "canvas" and low < 1.0:
        raise ValueError(f"cache canvas: windows differ with window_area {window_area}; use encoded")
    keys = _keys(source, with_boxes)
    limit, n = cache_gb * 1e9, len(source)
    source = caching.encoded(source, limit) if cache == "encoded" else source

    def load_photo(index: int, window: tuple[float, ...] = WHOLE) -> dict[str, Any]:
        example = load(
            source,
            index,
            canvas=canvas,
            window=window,
            max_boxes=max_boxes if with_boxes else 0,
            min_side=min_side,
            max_pixels=max_pixels,
        )
        return {key: example[key] for key in keys}

    kept = caching.Cache(load_photo, limit) if cache == "canvas" else None

    def load_row(step: int, row: int) -> dict[str, Any]:
        position = step * batch_size + process_index * local + row
        index = order(position, n, seed)
        if kept is not None:
            return kept(index)
        return load_photo(index, draw_window(position, seed, window_area))

    return parallel.parallel_map(
        load_row,
        start_step,
        None,
        local,
        workers=workers,
        prefetch=prefetch,
        use_tf=uses_tf(source) if use_tf is None else use_tf,
    )


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
    with_masks: bool = False,
) -> Iterator[HostBatch]:
    """Every example once, in order, whole photo; limit 0 = all, else that many, evenly spread.

    Global batch t holds examples t * B .. (t + 1) * B - 1, sliced over the processes as in
    train_batches, so all yield the same number of batches. Fields as there, with label and boxes
    where the source has them (boxes need max_boxes > 0; difficult bool [n, k] comes with them), and
    mask bool [n]: False for padding and for an image that cannot be used (that one has skipped 1).
    with_masks adds masks uint8 [n, s, s], label maps by nearest neighbours; 255 all over where there
    is no image, no map, or a damaged one. Raises ValueError where the source has no masks at all.
    """
    local = _local(batch_size, process_index, process_count)
    if with_masks and not source.has_masks:
        raise ValueError(f"{source.name}: has no masks; use another source, or set data.masks of a folder")
    count = min(limit, len(source)) if limit else len(source)
    with_boxes = source.has_boxes and max_boxes > 0
    keys = (*_keys(source, with_boxes), "mask")
    keys += (("difficult",) if with_boxes else ()) + (("masks",) if with_masks else ())
    options = {"canvas": canvas, "max_boxes": max_boxes, "with_mask": with_masks}

    def load_number(number: int) -> dict[str, Any]:
        if number >= count:
            return blank(-1, 0, **options)
        number = number * len(source) // count
        try:
            example = load(source, number, min_side=min_side, max_pixels=max_pixels, tries=1, **options)
        except Unusable:
            return blank(number, 1, **options)
        return example | {"mask": np.bool_(True)}

    def load_row(step: int, row: int) -> dict[str, Any]:
        example = load_number(step * batch_size + process_index * local + row)
        return {key: example[key] for key in keys}

    return parallel.parallel_map(
        load_row,
        0,
        -(-count // batch_size),
        local,
        workers=workers,
        prefetch=prefetch,
        use_tf=uses_tf(source) if use_tf is None else use_tf,
    )
