"""Random access to TFRecord files: an index of offsets in memory, records read one by one."""

import os
import struct
import threading
from collections import OrderedDict, deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from salcl_jax.data.files import remote_error

_HEADER = struct.Struct("<QI")  # length, masked crc32c of the length
_OVERHEAD = 16  # header 12 bytes, crc of the data 4 bytes
_OPEN_FILES = 128
_IDLE_HANDLES = 16  # kept open per remote file


class Index(NamedTuple):
    """Where each record lies: paths of the shards, and per record its shard, offset, length."""

    paths: tuple[str, ...]
    shard: np.ndarray  # int32 [n]
    offset: np.ndarray  # int64 [n], of the data in its shard
    length: np.ndarray  # int64 [n], bytes


class _LocalFile:
    """Closed when the last reader lets go of it, so eviction cannot pull it from under a read."""

    def __init__(self, path: str):
        self.fd = os.open(path, os.O_RDONLY)
        self.size = os.fstat(self.fd).st_size

    def read(self, offset: int, length: int) -> bytes:
        return os.pread(self.fd, length, offset)

    def __del__(self):
        if hasattr(self, "fd"):
            os.close(self.fd)


class _RemoteFile:
    """A gs:// object: one range request a read, as many at a time as there are readers."""

    def __init__(self, path: str):
        import tensorflow as tf

        self._path, self._error = path, tf.errors.OpError
        try:
            self.size = tf.io.gfile.stat(path).length
        except self._error as error:
            raise remote_error(error, path) from error
        self._open = lambda: tf.io.gfile.GFile(path, "rb")
        self._idle: deque = deque(maxlen=_IDLE_HANDLES)  # a handle has a position: one reader at a time

    def read(self, offset: int, length: int) -> bytes:
        try:
            file = self._idle.pop()
        except IndexError:
            file = self._open()
        try:
            file.seek(offset)
            data = file.read(length)
        except self._error as error:
            raise remote_error(error, self._path) from error
        self._idle.append(file)  # not after an error: that handle is dropped
        return data


def _open(path: str) -> _LocalFile | _RemoteFile:
    return _RemoteFile(path) if "://" in path else _LocalFile(path)


def _crc_table() -> tuple[int, ...]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return tuple(table)


_TABLE = _crc_table()


def masked_crc(data: bytes) -> int:
    """Masked CRC-32C of the TFRecord format, in plain Python: for the 8 bytes of a length."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 0xFF]
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def scan(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Offsets and lengths (int64 [n]) of a shard's records; reads 12 bytes a record.

    Raises FileNotFoundError for a missing shard, ValueError for a truncated or damaged one.
    """
    try:
        file = _open(path)
    except Exception as error:
        raise FileNotFoundError(f"{path}: shard not found; prepare the data set again") from error
    offsets, lengths, position = [], [], 0
    while position < file.size:
        header = file.read(position, _HEADER.size)
        length, crc = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, None)
        if crc is not None and crc != masked_crc(header[:8]):
            raise ValueError(f"{path}: not a TFRecord header at byte {position}; copy it again")
        end = position + _OVERHEAD + length
        if crc is None or end > file.size:
            raise ValueError(
                f"{path}: truncated in record {len(offsets)} at byte {position}; copy it again"
            )
        offsets.append(position + _HEADER.size)
        lengths.append(length)
        position = end
    return np.array(offsets, np.int64), np.array(lengths, np.int64)


def build_index(shards: Sequence[tuple[str, int, int]], threads: int = 8) -> Index:
    """Index of (path, skip, take) shards in order; take -1 = to the end.

    Raises ValueError when a shard holds fewer records than skip + take.
    """
    paths = tuple(path for path, _, _ in shards)
    threads = 64 if any("://" in path for path in paths) else threads  # latency, not CPU
    with ThreadPoolExecutor(max(1, min(threads, len(paths)))) as pool:
        scans = list(pool.map(scan, paths))
    parts = []
    for number, ((path, skip, take), (offset, length)) in enumerate(
        zip(shards, scans, strict=True)
    ):
        stop = len(offset) if take < 0 else skip + take
        if stop > len(offset):
            raise ValueError(f"{path}: {len(offset)} records, {stop} expected; copy it again")
        part = slice(skip, stop)
        parts.append((np.full(max(0, stop - skip), number, np.int32), offset[part], length[part]))
    if not parts:
        return Index((), np.zeros(0, np.int32), np.zeros(0, np.int64), np.zeros(0, np.int64))
    shard, offset, length = (np.concatenate(column) for column in zip(*parts, strict=True))
    return Index(paths, shard, offset, length)


class Reader:
    """Thread-safe `reader(i) -> bytes` over an Index, with a bounded set of open files.

    Raises OSError where a file cannot be read, through a new handle either, and ValueError where it changed.
    """

    def __init__(self, index: Index):
        self._index, self._lock = index, threading.Lock()
        self._files: OrderedDict[int, _LocalFile | _RemoteFile] = OrderedDict()
        try:
            from google_crc32c import value as crc32c
        except ImportError:  # the checksum is optional: damaged images fail in the decoder
            crc32c = None
        self._crc32c = crc32c

    def __len__(self) -> int:
        return len(self._index.shard)

    def _file(self, shard: int) -> _LocalFile | _RemoteFile:
        with self._lock:
            if shard in self._files:
                self._files.move_to_end(shard)
                return self._files[shard]
        file = _open(self._index.paths[shard])  # without the lock: storage may not answer
        with self._lock:
            file = self._files.setdefault(shard, file)
            if len(self._files) > _OPEN_FILES:
                self._files.popitem(last=False)
            return file

    def _read(self, shard: int, offset: int, length: int) -> bytes:
        try:
            return self._file(shard).read(offset, length)
        except OSError:  # a handle may go on failing after its storage is back
            with self._lock:
                self._files.pop(shard, None)
        return self._file(shard).read(offset, length)

    def place(self, i: int) -> str:
        """File of record i and the position of its data in it."""
        return f"{self._index.paths[self._index.shard[i]]} at byte {self._index.offset[i]}"

    def __call__(self, i: int) -> bytes:
        shard, length = int(self._index.shard[i]), int(self._index.length[i])
        data = self._read(shard, int(self._index.offset[i]), length + 4)
        path = self._index.paths[shard]
        if len(data) != length + 4:
            raise ValueError(f"{path}: changed while being read; copy it again")
        if self._crc32c is not None:
            crc = self._crc32c(data[:-4])
            crc = ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF
            if crc != struct.unpack("<I", data[-4:])[0]:
                raise ValueError(f"{path}: checksum of a record is wrong; copy it again")
        return data[:-4]
