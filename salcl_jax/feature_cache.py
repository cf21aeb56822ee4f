"""Features on disk, under a name made of everything they depend on."""

import hashlib
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

Columns = dict[str, np.ndarray]
_log = logging.getLogger(__name__)


def cached(folder: str | None, key: Mapping[str, Any], compute: Callable[[], Columns]) -> Columns:
    """What `compute` gives, from `folder` where an equal `key` (JSON) was computed before.

    folder None keeps nothing. With several processes the stored columns are used only where all of them
    have them, as `compute` is a common effort. Columns that cannot be read are computed again; a disk
    that is full costs the cache, not the result.
    """
    if folder is None:
        return compute()
    text = json.dumps(key, sort_keys=True)
    place = os.path.join(folder, hashlib.sha256(text.encode()).hexdigest()[:32])
    found = _read(place)
    if jax.process_count() > 1 and not multihost_utils.process_allgather(np.asarray(found is not None)).all():
        found = None
    if found is None:
        found = compute()
        try:
            _write(place, text, found)
        except OSError as error:
            _log.warning("features are not kept: %s; set config.tasks.cache to another folder", error)
    return found


def user_folder(name: str) -> str:
    """Folder for what can be computed again: ~/.cache/salcl_jax/NAME, or below XDG_CACHE_HOME."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return os.path.join(home, "salcl_jax", name)


def digest(tree: Any) -> str:
    """Hash of the bits, names and shapes of a tree of arrays."""
    state = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.ascontiguousarray(leaf)
        state.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape} ".encode())
        state.update(array.tobytes())
    return state.hexdigest()


def _read(place: str) -> Columns | None:
    """Memory-mapped columns; None where they are missing or damaged."""
    try:
        with open(os.path.join(place, "columns.json"), encoding="utf-8") as file:
            listed = json.load(file)["columns"]
        columns = {
            name: np.load(os.path.join(place, f"{name}.npy"), mmap_mode="r", allow_pickle=False)
            for name in listed
        }
        return columns if all(list(columns[n].shape) == listed[n] for n in listed) else None
    except Exception:  # there is no end to what a damaged file makes the readers of JSON and arrays raise
        return None


def _write(place: str, text: str, columns: Columns) -> None:
    """All or nothing: another process, or an interruption, never leaves half of them in place."""
    os.makedirs(os.path.dirname(place), exist_ok=True)
    half = tempfile.mkdtemp(dir=os.path.dirname(place), prefix=".half-")
    try:
        for name, column in columns.items():
            np.save(os.path.join(half, f"{name}.npy"), column)
        listed = {name: list(column.shape) for name, column in columns.items()}
        with open(os.path.join(half, "columns.json"), "w", encoding="utf-8") as file:
            json.dump({"key": json.loads(text), "columns": listed}, file)
        shutil.rmtree(place, ignore_errors=True)  # only ever a damaged one
        os.rename(half, place)
    except OSError:
        if not os.path.isdir(place):
            raise
    finally:
        shutil.rmtree(half, ignore_errors=True)
