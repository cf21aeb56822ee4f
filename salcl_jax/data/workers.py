"""Ordered parallel map over chunk numbers, by tf.data or by a thread pool: same results."""

import atexit
import functools
import importlib.util
import itertools
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

Chunk = dict[str, np.ndarray]
_FOREVER = 2**62
_STREAMS: weakref.WeakSet = weakref.WeakSet()  # tf.data streams that are still open
_EXIT_S = 5.0  # longest wait for another thread's stream when the program ends
_exiting: list[bool] = []


def has_tensorflow() -> bool:
    return importlib.util.find_spec("tensorflow") is not None


def parallel_map(
    load: Callable[[int], Chunk],
    start: int,
    stop: int | None,
    group: int,
    *,
    workers: int,
    prefetch: int,
    use_tf: bool,
) -> Iterator[Chunk]:
    """load(start), load(start + 1), ... in order, `group` of them concatenated an item.

    stop None = endless. (stop - start) must be a multiple of group. An error of load is raised
    where its item would have come.
    """
    run = _by_tf_data if use_tf else _by_threads
    return run(load, start, stop, group, max(1, workers), max(1, prefetch))


def _by_threads(load, start, stop, group, workers, prefetch) -> Iterator[Chunk]:
    numbers = itertools.count(start) if stop is None else iter(range(start, stop))
    with ThreadPoolExecutor(workers, thread_name_prefix="salcl-data") as pool:
        pending: deque = deque()
        try:
            while True:
                ahead = itertools.islice(numbers, max(0, group * (prefetch + 1) - len(pending)))
                pending.extend(pool.submit(load, number) for number in ahead)
                if not pending:
                    return
                parts = [pending.popleft().result() for _ in range(group)]
                yield {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _by_tf_data(*settings) -> Iterator[Chunk]:
    stream = _tf_stream(_tensorflow(), *settings)
    _STREAMS.add(stream)
    return stream


def _tf_stream(tf, load, start, stop, group, workers, prefetch) -> Iterator[Chunk]:
    failures: list[Exception] = []
    probe = load(start)  # the names, dtypes and shapes of what load returns
    keys = sorted(probe)
    shapes = [(group * probe[key].shape[0], *probe[key].shape[1:]) for key in keys]

    def call(number):
        try:
            _refuse_at_exit()
            chunk = load(int(number))
        except Exception as error:  # tf.data would bury it in a stack trace
            failures.append(error)
            raise
        return [chunk[key] for key in keys]

    def op(number):
        return tuple(tf.numpy_function(call, [number], [probe[key].dtype for key in keys]))

    def shaped(*parts):
        return {
            key: tf.reshape(part, shape)
            for key, part, shape in zip(keys, parts, shapes, strict=True)
        }

    dataset = tf.data.Dataset.range(start, _FOREVER if stop is None else stop)
    dataset = dataset.map(op, num_parallel_calls=workers, deterministic=True)
    dataset = dataset.batch(group, drop_remainder=True).map(shaped).prefetch(prefetch)
    iterator = dataset.with_options(_options(tf, workers)).as_numpy_iterator()
    while True:
        try:
            yield next(iterator)
        except StopIteration:
            return
        except tf.errors.OpError as error:
            if _exiting:
                return
            if failures:
                raise failures[0] from None
            raise ValueError(str(error).splitlines()[0]) from None


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
