"""Memory that the process has freed goes back to the system, where the C library is glibc."""

import ctypes
import functools
import gc
from collections.abc import Callable

_ARENA_MAX = -8  # mallopt's name for it
_ARENAS = 2


def share_arenas() -> None:
    """Let all threads allocate from two heaps; call it before they start.

    By default there are up to eight a core, and each keeps pages that threads long gone have left half empty.
    """
    _call("mallopt", _ARENA_MAX, _ARENAS)


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
