"""Memory that the process has freed goes back to the system, where the C library is glibc."""

import ctypes
import functools
import gc
import os
from collections.abc import Callable

_ARENA_MAX = -8  # mallopt's name for it


def share_arenas() -> None:
    """Let threads allocate from two heaps, or one for every eight cores; call it before they start.

    By default there are up to eight a core, and each keeps pages that threads long gone have left half empty.
    """
    _call("mallopt", _ARENA_MAX, max(2, (os.cpu_count() or 1) // 8))


def give_back() -> None:
    """Collect cycles, which Python does rarely and which hold whole evaluations, and return freed pages."""
    gc.collect()
    _call("malloc_trim", 0)


def _call(name: str, *numbers: int) -> None:
    function = _function(name)
    if function is not None:
        function(*numbers)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    try:
        return getattr(ctypes.CDLL("libc.so.6"), name)
    except (OSError, AttributeError):
        return None
