"""Photos kept in this process's memory: as encoded bytes, or as decoded canvases."""

import dataclasses
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from salcl_jax.data.sources import Source

KINDS = ("none", "encoded", "canvas")
_ENTRY = 400  # bytes of a dict and its place in the table, about


class Cache:
    """Results of make(number), kept until `limit` bytes are used; what comes later is not kept.

    Nothing is ever thrown out: an epoch visits every photo once, so whatever were thrown out in favour
    of another would be as likely to be asked for next. Errors are not kept. Thread-safe.
    """

    def __init__(self, make: Callable[[int], dict[str, Any]], limit: float):
        self._make, self._limit, self._lock = make, limit, threading.Lock()
        self._kept: dict[int, dict[str, Any]] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    def __call__(self, number: int) -> dict[str, Any]:
        found = self._kept.get(number)
        if found is None:
            found = self._make(number)
            self._keep(number, found)
        return dict(found)

    def _keep(self, number: int, found: dict[str, Any]) -> None:
        size = _ENTRY + sum(map(_size, found.values()))
        with self._lock:
            if number not in self._kept and self.bytes + size <= self._limit:
                self._kept[number] = found
                self.bytes += size


def _size(value: Any) -> int:
    return value.nbytes + 128 if isinstance(value, np.ndarray) else sys.getsizeof(value)


def encoded(source: Source, limit: float) -> Source:
    """The source with its records kept as they are read. Arrays are in memory already, or mapped."""
    if source.kind == "arrays":
        return source
    return dataclasses.replace(source, read=Cache(source.read, limit))
