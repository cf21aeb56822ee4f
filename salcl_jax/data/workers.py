"""Rows made in parallel -> items in order, by tf.data or by a thread pool: same results.

Workers write their rows straight into the arrays that are handed out. tf.data carries numbers only: pixels
that pass through it are copied three times, which costs a tenth of the time of a small photo.
"""

import atexit
import functools
import importlib.util
import itertools
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

Row = dict[str, Any]
Item = dict[str, np.ndarray]
_GROUP = 32  # at most so many rows a call: spreads the cost of handing out work
_FOREVER = 2**62
_STREAMS: weakref.WeakSet = weakref.WeakSet()  # tf.data streams that are still open
# What open streams call, by number: TensorFlow keeps every function it was ever given, and with one that
# is the call itself it would keep the photos of each evaluation.
_CALLS: dict[int, Callable[[Any], Any]] = {}
_NUMBERS = itertools.count()
_EXIT_S = 5.0  # longest wait for another thread's stream when the program ends
_exiting: list[bool] = []


def has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


class _Memory:
    """Arrays of items that were handed out, used again once nobody holds them or a view of them.

    Fresh memory of this size costs a page fault a page, up to a tenth of the time of a photo.
    """

    def __init__(self, most: int):
        self._lent: list[Item] = []
        self._most, self._lock = most, threading.Lock()

    def lend(self, arrays: Item) -> Item:
        with self._lock:
            self._lent = [*self._lent, arrays][-self._most :]
        return dict(arrays)

    def take(self) -> Item | None:
        with self._lock:
            free = (i for i, arrays in enumerate(self._lent) if max(_holders(arrays)) <= _ALONE)
            found = next(free, None)
            return None if found is None else self._lent.pop(found)


def _holders(arrays: Item) -> list[int]:
    return [sys.getrefcount(array) for array in arrays.values()]


_ALONE = _holders({"": np.empty(0)})[0]


class _Item:
    """Arrays of `size` rows, made when the first row comes and filled by several threads."""

    def __init__(self, size: int, memory: _Memory):
        self.size, self.arrays, self._memory, self._lock = size, {}, memory, threading.Lock()

    def put(self, number: int, row: Row) -> None:
        with self._lock:
            if not self.arrays:
                self.arrays = self._memory.take() or {
                    key: np.empty((self.size, *np.shape(value)), np.asarray(value).dtype)
                    for key, value in row.items()
                }
        for key, array in self.arrays.items():
            array[number] = row[key]


def parallel_map(
    load: Callable[[int, int], Row],
    start: int,
    stop: int | None,
    size: int,
    *,
    workers: int,
    prefetch: int,
    use_tf: bool,
) -> Iterator[Item]:
    """Items start, start + 1, ... in order: item i holds the rows load(i, 0) .. load(i, size - 1).

    stop None = endless. All rows have the same keys, shapes and dtypes. An error of load is raised
    where its item would have come.
    """
    run = _by_tf_data if use_tf else _by_threads
    return run(load, start, stop, size, max(1, workers), max(1, prefetch))


def _group(size: int, workers: int, prefetch: int) -> int:
    """Rows a call: few calls, but two at least for each worker in the items under way."""
    return max(1, min(_GROUP, size, size * (prefetch + 1) // (2 * workers)))


def _fill(load, item: _Item, number: int, rows: range) -> None:
    for row in rows:
        item.put(row, load(number, row))


def _by_threads(load, start, stop, size, workers, prefetch) -> Iterator[Item]:
    memory, group = _Memory(prefetch + 2), _group(size, workers, prefetch)
    parts = [range(size)[first : first + group] for first in range(0, size, group)]
    numbers = itertools.count(start) if stop is None else iter(range(start, stop))
    with ThreadPoolExecutor(workers, thread_name_prefix="salcl-data") as pool:

        def submit(number: int) -> tuple[_Item, list]:
            item = _Item(size, memory)
            return item, [pool.submit(_fill, load, item, number, rows) for rows in parts]

        pending: deque = deque()
        try:
            while True:
                pending.extend(map(submit, itertools.islice(numbers, prefetch + 1 - len(pending))))
                if not pending:
                    return
                item, calls = pending.popleft()
                for call in calls:
                    call.result()
                yield memory.lend(item.arrays)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _by_tf_data(*settings) -> Iterator[Item]:
    stream = _tf_stream(_tensorflow(), *settings)
    _STREAMS.add(stream)
    return stream


def _tf_stream(tf, load, start, stop, size, workers, prefetch) -> Iterator[Item]:
    failures: list[Exception] = []
    items: dict[int, _Item] = {}
    memory, group = _Memory(prefetch + 2), _group(size, workers, prefetch)
    parts, key = -(-size // group), next(_NUMBERS)

    def call(part):
        try:
            _refuse_at_exit()
            number, place = divmod(int(part), parts)
            item = items.get(number) or items.setdefault(number, _Item(size, memory))
            _fill(load, item, number, range(size)[place * group : (place + 1) * group])
        except Exception as error:  # tf.data would bury it in a stack trace
            failures.append(error)
            raise
        return part

    _CALLS[key] = call
    known = functools.partial(_call, key)

    def op(part):
        return tf.ensure_shape(tf.numpy_function(known, [part], tf.int64), ())

    dataset = tf.data.Dataset.range(start * parts, _FOREVER if stop is None else stop * parts)
    dataset = dataset.map(op, num_parallel_calls=workers, deterministic=True)
    dataset = dataset.batch(parts, drop_remainder=True).prefetch(prefetch)
    iterator = dataset.with_options(_options(tf, workers)).as_numpy_iterator()
    try:
        for done in iterator:
            yield memory.lend(items.pop(int(done[0]) // parts).arrays)
    except tf.errors.OpError as error:
        if _exiting:
            return
        if failures:
            raise failures[0] from None
        raise ValueError(str(error).splitlines()[0]) from None
    finally:
        del _CALLS[key]


def _call(key: int, part: Any) -> Any:
    return _CALLS[key](part)


@functools.cache
def _tensorflow():
    import tensorflow as tf

    try:  # the accelerator belongs to jax
        tf.config.set_visible_devices([], "GPU")
    except RuntimeError:  # its devices were already initialised by the caller
        pass
    atexit.register(_close_streams)
    return tf


def _refuse_at_exit() -> None:
    if _exiting:
        raise RuntimeError("the program is ending")


def _close_streams() -> None:
    """Ends open streams while Python still runs: a stream freed later waits for ever for its
    calls into Python, and the program would hang instead of ending."""
    _exiting.append(True)
    deadline = time.monotonic() + _EXIT_S
    waiting = list(_STREAMS)
    while waiting and time.monotonic() < deadline:
        waiting = [stream for stream in waiting if not _closed(stream)]
        time.sleep(0.01 if waiting else 0)


def _closed(stream) -> bool:
    try:
        stream.close()
    except ValueError:  # another thread is inside it; the refusal above makes it leave soon
        return False
    return True


def _options(tf, workers: int):
    options = tf.data.Options()
    options.threading.private_threadpool_size = workers
    options.deterministic = True
    options.autotune.enabled = False
    if hasattr(options.experimental_optimization, "inject_prefetch"):
        options.experimental_optimization.inject_prefetch = False
    return options
