"""Freed memory goes back to the system, where the C library can say so."""

import ctypes
from pathlib import Path

import pytest

from salcl_jax import memory


def resident() -> int:
    """Bytes of this process."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


@pytest.mark.skipif(memory._trim() is None, reason="no glibc")
def test_gaps_between_blocks_in_use_are_given_back():
    libc = ctypes.CDLL("libc.so.6")
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, (ctypes.c_void_p,)
    blocks = [libc.malloc(1 << 16) for _ in range(3000)]  # small enough for the heap
    for block in blocks:
        ctypes.memset(block, 1, 1 << 16)
    for block in blocks[:-1]:  # the last one is in use: the heap cannot shrink from its end
        libc.free(block)
    before = resident()
    memory.give_back()
    assert resident() < before - 100e6
    libc.free(blocks[-1])


def test_another_c_library_is_left_alone(monkeypatch):
    def none(name):
        raise OSError(name)

    monkeypatch.setattr(memory.ctypes, "CDLL", none)
    memory._trim.cache_clear()
    memory.give_back()
    memory._trim.cache_clear()
