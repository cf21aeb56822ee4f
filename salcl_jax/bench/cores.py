"""Choosing CPU cores and holding all threads of this process on a few of them (Linux)."""

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

_TASKS = Path("/proc/self/task")
_IDLE = 0.1  # cores in use below which the process counts as idle
_SLICE_S, _MOST_S = 0.02, 10.0


def available() -> list[int]:
    """CPUs this process may use, one of each physical core first. Raises ValueError but on Linux."""
    if not hasattr(os, "sched_getaffinity"):
        raise ValueError("bench input: cannot choose cores on this system; run it on Linux")
    found = sorted(os.sched_getaffinity(0))
    first = {_siblings(cpu): cpu for cpu in reversed(found)}
    return sorted(first.values()) + [cpu for cpu in found if cpu not in first.values()]


def _siblings(cpu: int) -> str:
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:  # unknown: counts as a core of its own
        return str(cpu)


@contextlib.contextmanager
def only(cpus: Sequence[int]) -> Iterator[None]:
    """All threads of the process, and those that they start, run on these CPUs; as before on leaving.

    Threads started inside get what the calling thread had.
    """
    before = os.sched_getaffinity(0)
    masks = {task: mask for task in _tasks() if (mask := _mask(task))}
    try:
        for task in masks:
            _set(task, set(cpus))
        yield
    finally:
        for task in _tasks():
            _set(task, masks.get(task, before))


def _tasks() -> list[int]:
    return [int(path.name) for path in _TASKS.iterdir()]


def _mask(task: int) -> set[int]:
    try:
        return os.sched_getaffinity(task)
    except OSError:  # the thread has ended
        return set()


def _set(task: int, cpus: set[int]) -> None:
    with contextlib.suppress(OSError):
        os.sched_setaffinity(task, cpus)


def wait_until_idle() -> None:
    """Lets what other threads have begun come to its end, 10 s at most."""
    deadline = time.monotonic() + _MOST_S
    while time.monotonic() < deadline:
        used, start = time.process_time(), time.monotonic()
        time.sleep(_SLICE_S)
        if time.process_time() - used < _IDLE * (time.monotonic() - start):
            return
