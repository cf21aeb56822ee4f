"""What a run leaves behind for people: metrics, JSON files, panels, TensorBoard, trackers.

Folders may be local or on a bucket (gs://...).
"""

import contextlib
import io
import json
import math
import platform
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from etils import epath

from salcl_jax.board import Board
from salcl_jax.trackers import Tracker
from salcl_jax.workdir import step_of

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_REMOTE_INTERVAL = 30.0  # seconds; a bucket object can only be replaced whole, about once a second


class Writer:
    """Files of one workdir. Only the main process writes; on others every method does nothing.

    On construction metrics after `resume_step` are dropped, with `again` those of that step as well: an
    interrupted run wrote them after its last checkpoint and the resumed run writes them again. 0 starts
    an empty file. A half-written last line is dropped too. trackers: names of `trackers.PACKAGES`; what
    goes wrong there is only told.
    """

    def __init__(
        self,
        workdir: str,
        *,
        tensorboard: bool,
        is_main: bool,
        resume_step: int,
        trackers: Sequence[str] = (),
        again: bool = False,
    ):
        self._dir = epath.Path(workdir)
        self._main = is_main
        self._board, self._trackers = None, []
        if not is_main:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        before = resume_step + (not again) if resume_step else 0
        self._lines = _LineFile(self._dir / "metrics.jsonl", before)
        if tensorboard:
            self._board = Board(str(self._dir / "tensorboard"), resume_step - again, _REMOTE_INTERVAL)
        self._trackers = [Tracker(name, workdir, resume_step) for name in trackers]

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with contextlib.suppress(*[OSError] * (kind is not None)):  # what went wrong first is told
            self.close(failed=kind is not None)

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line {"step": step, name: float, ...}; a value that is not finite is null."""
        if not self._main:
            return
        floats = {name: float(value) for name, value in values.items()}
        self._lines.append(_dumps({"step": int(step), **floats}))
        if self._board is not None:
            self._board.scalars(int(step), floats)
        for tracker in self._trackers:
            tracker.scalars(int(step), floats)

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """Write panels/NAME_STEP.png from an image [h, w, 3], uint8 or float in [0, 1]."""
        if not self._main:
            return
        array = np.asarray(array)
        if array.dtype != np.uint8:
            array = np.round(255 * np.clip(np.nan_to_num(array), 0, 1)).astype(np.uint8)
        path = self._dir / "panels" / f"{name.replace('/', '_')}_{int(step):08d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        _save_image(path, array)
        if self._board is not None:
            self._board.image(int(step), name, array)
        for tracker in self._trackers:
            tracker.image(int(step), name, array)

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json, replacing it whole."""
        self._json("summary.json", values)
        for tracker in self._trackers:
            tracker.summary(_plain(values))

    def config(self, values: Mapping[str, Any]) -> None:
        """Write config.json: {"config": values, "versions": {...}, "git": commit or null}."""
        self._json("config.json", {"config": values, "versions": versions(), "git": _git_commit()})
        for tracker in self._trackers:
            tracker.config(_plain(values))

    def close(self, failed: bool = False) -> None:
        """Flush everything; `failed`: the run did not reach its end."""
        with contextlib.ExitStack() as stack:  # all of them, whichever fails
            for tracker in self._trackers:
                stack.callback(tracker.close, failed)
            if self._board is not None:
                stack.callback(self._board.close)
            if self._main:
                self._lines.flush()

    def _json(self, name: str, values: Mapping[str, Any]) -> None:
        if self._main:
            write_json(self._dir / name, values)


class _LineFile:
    """A text file that grows by whole lines.

    Local files are appended and flushed line by line. Buckets cannot append: there the lines are
    kept and the object replaced at most every _REMOTE_INTERVAL seconds and at the end.
    """

    def __init__(self, path: epath.Path, before: int):
        self._path, self._remote = path, _is_remote(path)
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        kept = [line for line in text.splitlines() if _belongs(line, before)]
        repaired = "".join(f"{line}\n" for line in kept)
        if repaired != text or not path.exists():
            replace_text(path, repaired)
        self._pending = kept if self._remote else []
        self._written = time.monotonic()

    def append(self, line: str) -> None:
        if not self._remote:
            # Not made anew: orbax may have made the folder of a workdir that vanished again.
            with open(self._path, "r+", encoding="utf-8") as file:
                file.seek(0, io.SEEK_END)
                file.write(line + "\n")
            return
        self._pending.append(line)
        if time.monotonic() - self._written >= _REMOTE_INTERVAL:
            self.flush()

    def flush(self) -> None:
        if self._remote:
            replace_text(self._path, "".join(f"{line}\n" for line in self._pending))
            self._written = time.monotonic()


def write_json(path: str | epath.Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file, replacing it whole; numbers that are not finite become null."""
    replace_text(epath.Path(path), _dumps(values, indent=2) + "\n")


def _is_remote(path: epath.Path) -> bool:
    return "://" in str(path)


def _belongs(line: str, before: int) -> bool:
    """Whether a line is complete and from before this step."""
    step = step_of(line)
    return step is not None and step < before


def replace_text(path: epath.Path, text: str) -> None:
    """Write a file so that a reader sees the old or the new text, never a part."""
    if _is_remote(path):  # object stores replace whole objects
        path.write_text(text)
        return
    temporary = path.parent / f".{path.name}.tmp"
    try:
        temporary.write_text(text)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _save_image(path: epath.Path, array: np.ndarray) -> None:
    from salcl_jax.visualize import save_png

    if not _is_remote(path):
        save_png(str(path), array)
        return
    with tempfile.TemporaryDirectory() as folder:
        save_png(f"{folder}/image.png", array)
        path.write_bytes(Path(folder, "image.png").read_bytes())


def _dumps(values: Any, indent: int | None = None) -> str:
    return json.dumps(_plain(values), allow_nan=False, indent=indent)


def _plain(value: Any) -> Any:
    """The value in JSON's types: arrays to lists, numbers that are not finite to None."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "__array__"):
        return _plain(np.asarray(value).tolist())
    return str(value)


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide results; None where one is missing."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def _git_commit() -> str | None:
    """Commit of the source tree, with '+' when it has uncommitted changes; None outside git."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        run = dict(capture_output=True, text=True, timeout=10, check=True)
        commit = subprocess.run([*git, "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return commit + ("+" if changed else "")
