"""Files, local or gs://: listing folders, reading, finding listed names, sizes and times."""

import errno
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp")


PHOTO_BYTES = 2**30  # no photo and no label map is larger


def read_file(path: str, most: int | None = None) -> bytes:
    """Content of a regular file of at most `most` bytes. Raises OSError, for buckets too."""
    if "://" in path:
        return _read_remote(path, most)
    with open(path, "rb", opener=_open_regular) as file:
        _refuse_large(path, os.fstat(file.fileno()).st_size, most)
        return file.read()


def _read_remote(path: str, most: int | None) -> bytes:
    import tensorflow as tf

    try:
        with tf.io.gfile.GFile(path, "rb") as file:
            size = file.size()
            _refuse_large(path, size, most)
            return file.read(size)
    except tf.errors.OpError as error:
        raise remote_error(error, path) from error


def remote_error(error: Exception, path: str) -> OSError:
    """An error of TensorFlow's file systems, which may say nothing or many lines, as one of files."""
    return OSError(errno.EIO, (str(error).splitlines() or [type(error).__name__])[0], path)


def _open_regular(path: str, flags: int) -> int:
    """A pipe would be waited for, a device may never end."""
    descriptor = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise OSError(errno.EINVAL, "not a regular file", path)


def _refuse_large(path: str, size: int, most: int | None) -> None:
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes, more than {most:,}", path)


def read_text(path: str) -> str:
    """UTF-8 text, with or without a byte order mark. Raises FileNotFoundError."""
    try:
        return read_file(path).decode("utf-8-sig")
    except Exception as error:
        raise FileNotFoundError(f"{path}: cannot be read; check the path") from error


def list_images(root: str) -> list[str]:
    """Sorted paths of all image files below root, links followed once; local or gs://.

    Raises FileNotFoundError when root is missing, ValueError when it holds no image.
    """
    files = list_files(root, EXTENSIONS, "data.roots")
    if not files:
        raise ValueError(f"{root}: no image files ({' '.join(EXTENSIONS)}); check data.roots")
    return files


def list_files(root: str, extensions: tuple[str, ...], option: str) -> list[str]:
    """Sorted paths of all files below root with such a name; `option` is where root was given.

    Raises FileNotFoundError when root is missing.
    """
    if "://" in root:
        import tensorflow as tf

        if not tf.io.gfile.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder; check {option}")
        walk = _walk_remote(root, extensions)
    else:
        if not os.path.isdir(root):
            raise FileNotFoundError(f"{root}: no such folder; check {option}")
        walk = _walk(root)
    return sorted(
        os.path.join(folder, name)
        for folder, names in walk
        for name in names
        if name.lower().endswith(extensions) and not name.startswith("._")
    )


def _walk_remote(folder: str, extensions: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """One request a folder; tf.io.gfile.walk sends one more for every file, hours for a data set."""
    import tensorflow as tf

    names = [name for name in tf.io.gfile.listdir(folder) if name.strip("/")]
    yield folder, names
    for name in names:
        path = os.path.join(folder, name)
        if not name.lower().endswith(extensions) and (name.endswith("/") or tf.io.gfile.isdir(path)):
            yield from _walk_remote(path, extensions)


def _walk(root: str) -> Iterator[tuple[str, list[str]]]:
    seen = set()  # real folders: a link back up, or a second link to one folder, adds nothing
    for folder, folders, names in os.walk(root, followlinks=True):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        yield folder, names


def locate(names: list[str], bases: tuple[str, ...], files: list[str], origin: str) -> list[str]:
    """Full path of each listed name, searched below each base. Raises ValueError naming one."""
    listed = {os.path.normpath(path): path for path in files}
    found = []
    for name in names:
        candidates = (os.path.normpath(os.path.join(base, name)) for base in bases)
        path = next((listed[c] for c in candidates if c in listed), None)
        if path is None:
            raise ValueError(f"{origin}: {name} is not below {' or '.join(bases)}; fix data.roots")
        found.append(path)
    return found


def escapes(name: str) -> bool:
    """Whether a name out of a file, taken below a folder, may lead out of that folder."""
    return os.path.isabs(name) or "://" in name or os.path.normpath(name).split(os.sep)[0] == os.pardir


def relative(path: str, roots: Sequence[str]) -> str:
    """The path below the first of the roots that holds it; as it is where none does."""
    for root in roots:
        start = os.path.join(root, "")
        if path.startswith(start):
            return path[len(start) :].lstrip("/")
    return path


def stats(paths: Sequence[str]) -> list[tuple[int, int]]:
    """(bytes, time of the last change in ns) of each file; (-1, -1) of one that is not there."""
    if not any("://" in path for path in paths):
        return [_stat(path) for path in paths]
    with ThreadPoolExecutor(64) as pool:  # latency, not CPU
        return list(pool.map(_stat, paths))


def _stat(path: str) -> tuple[int, int]:
    if "://" in path:
        import tensorflow as tf

        try:
            found = tf.io.gfile.stat(path)
        except tf.errors.NotFoundError:
            return -1, -1
        return int(found.length), int(found.mtime_nsec)
    try:
        found = os.stat(path)
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def digest(parts: Iterable[Any]) -> str:
    """SHA-256, in hex, of a sequence of numpy arrays and of plain values with a lasting repr."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            head, body = f"{part.dtype.str}{part.shape}", np.ascontiguousarray(part).tobytes()
        else:
            head, body = "", repr(part).encode()
        state.update(f"{head} {len(body)} ".encode())
        state.update(body)
    return state.hexdigest()
