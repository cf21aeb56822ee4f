"""Memory that the process has freed goes back to the system."""

import ctypes
import functools
from collections.abc import Callable


def give_back() -> None:
    """Return freed pages; saves and evaluations leave gaps, by which a process of days would grow.

    Does nothing where the C library is not glibc.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Callable[[int], int] | None:
    try:
        return ctypes.CDLL("libc.so.6").malloc_trim
    except (OSError, AttributeError):
        return None
