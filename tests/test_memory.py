"""Freed memory goes back to the system, where the C library can say so."""

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest

from salcl_jax import memory


def resident() -> int:
    """Bytes of this process."""
    return 4096 * int(Path("/proc/self/statm").read_text().split()[1])


glibc = pytest.mark.skipif(memory._function("malloc_trim") is None, reason="no glibc")

# Twelve threads allocate at once; the C library then writes down its heaps.
HEAPS = """
import ctypes, os, sys, threading
from salcl_jax import memory
os.cpu_count = lambda: 24

if "shared" in sys.argv:
    memory.share_arenas()
libc, barrier = ctypes.CDLL("libc.so.6"), threading.Barrier(12)
libc.malloc.restype = libc.fopen.restype = ctypes.c_void_p
libc.fclose.argtypes, libc.malloc_info.argtypes = (ctypes.c_void_p,), (ctypes.c_int, ctypes.c_void_p)

def allocate():
    barrier.wait()
    libc.malloc(1000)
    barrier.wait()

threads = [threading.Thread(target=allocate) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
file = libc.fopen(sys.argv[1].encode(), b"w")
libc.malloc_info(0, file)
libc.fclose(file)
"""


def heaps(path: Path, *how: str) -> int:
    """Heaps of twelve threads and the main one, on a machine that says it has 24 cores."""
    subprocess.run([sys.executable, "-c", HEAPS, str(path), *how], check=True)
    return path.read_text().count("<heap nr=")


@glibc
def test_threads_share_a_heap_for_every_eight_cores(tmp_path):
    assert heaps(tmp_path / "own.xml") > 3
    assert heaps(tmp_path / "shared.xml", "shared") == 3


@glibc
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
    memory._function.cache_clear()
    memory.give_back()
    memory.share_arenas()
    memory._function.cache_clear()
