"""Memory that the process has freed goes back to the system."""

import ctypes
import functools
import gc
from collections.abc import Callable


def give_back() -> None:
    """Collect cycles, which Python does rarely and which hold whole evaluations, and return freed pages.

    Pages are returned where the C library is glibc: saves leave gaps by which a process of days would grow.
    """
    gc.collect()
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
