"""What a run leaves behind for people: metrics, JSON files, panels, TensorBoard, terminal lines.

Folders may be local or on a bucket (gs://...).
"""

import contextlib
import io
import json
import math
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
from etils import epath

from salcl_jax.board import Board

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
_REMOTE_INTERVAL = 30.0  # seconds; a bucket object can only be replaced whole, about once a second


class Writer:
    """Files of one workdir. Only the main process writes; on others every method does nothing.

    On construction metrics after `resume_step` are dropped: an interrupted run wrote them after its
    last checkpoint and the resumed run writes them again. 0 starts an empty file. A half-written
    last line is dropped too.
    """

    def __init__(self, workdir: str, *, tensorboard: bool, is_main: bool, resume_step: int):
        self._dir = epath.Path(workdir)
        self._main = is_main
        self._board = None
        if not is_main:
            return
        self._dir.mkdir(parents=True, exist_ok=True)
        self._lines = _LineFile(self._dir / "metrics.jsonl", resume_step)
        if tensorboard:
            self._board = Board(str(self._dir / "tensorboard"), resume_step)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with contextlib.suppress(*[OSError] * (kind is not None)):  # what went wrong first is told
            self.close()

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Append one line {"step": step, name: float, ...}; a value that is not finite is null."""
        if not self._main:
            return
        floats = {name: float(value) for name, value in values.items()}
        self._lines.append(_dumps({"step": int(step), **floats}))
        if self._board is not None:
            self._board.scalars(int(step), floats)

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

    def summary(self, values: Mapping[str, Any]) -> None:
        """Write summary.json, replacing it whole."""
        self._json("summary.json", values)

    def config(self, values: Mapping[str, Any]) -> None:
        """Write config.json: {"config": values, "versions": {...}, "git": commit or null}."""
        self._json("config.json", {"config": values, "versions": versions(), "git": _git_commit()})

    def close(self) -> None:
        """Flush everything."""
        if self._main:
            self._lines.flush()
        if self._board is not None:
            self._board.close()

    def _json(self, name: str, values: Mapping[str, Any]) -> None:
        if self._main:
            write_json(self._dir / name, values)


class _LineFile:
    """A text file that grows by whole lines.

    Local files are appended and flushed line by line. Buckets cannot append: there the lines are
    kept and the object replaced at most every _REMOTE_INTERVAL seconds and at the end.
    """

    def __init__(self, path: epath.Path, resume_step: int):
        self._path, self._remote = path, _is_remote(path)
        text = path.read_bytes().decode(errors="replace") if path.exists() else ""
        kept = [line for line in text.splitlines() if resume_step and _belongs(line, resume_step)]
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


def _belongs(line: str, last_step: int) -> bool:
    """Whether a line is complete and not from after `last_step`."""
    try:
        return int(json.loads(line)["step"]) <= last_step
    except (ValueError, KeyError, TypeError):
        return False


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


def watch(batches: Iterable, total: int, label: str) -> Iterator:
    """The same batches, with a bar on the terminal; where stderr is none, a line when they are done."""
    began = time.monotonic()
    if sys.stderr.isatty() and (tqdm := _tqdm()):
        yield from tqdm(batches, total=total, desc=label, unit="batch", leave=False, dynamic_ncols=True)
    else:
        yield from batches
        print(f"{label}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


def _tqdm() -> Any:
    """tqdm's bar; None if not installed."""
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


class Progress:
    """Progress of a loop on the terminal: a bar, or plain lines where stderr is not a terminal.

    Args:
      total: last step. start: step resumed from. images_per_step: global batch.
      log_every: steps between plain lines.
    """

    def __init__(
        self,
        total: int,
        *,
        start: int = 0,
        images_per_step: int = 1,
        log_every: int = 10,
        is_main: bool = True,
        stream: io.TextIOBase | None = None,
    ):
        self._total, self._images, self._every = total, images_per_step, max(log_every, 1)
        self._main, self._stream = is_main, stream or sys.stderr
        self._mark: tuple[int, float] | None = None  # step and time the current rate counts from
        self._rate, self._loss, self._start = 0.0, None, start
        self._bar = self._make_bar() if is_main and self._stream.isatty() else None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @property
    def images_per_second(self) -> float:
        """Rate between the last two reports, 0 before; without the first step, which compiles."""
        return self._rate

    def update(self, step: int, loss: SupportsFloat | None = None) -> None:
        """Tell that `step` is done; `loss` when it is known. Prints at every log_every-th step."""
        self._loss = self._loss if loss is None else float(loss)
        now = time.monotonic()
        if self._mark is None:
            self._mark = (step, now)
        due = step % self._every == 0 or step == self._total
        if due and step > self._mark[0]:
            seconds = max(now - self._mark[1], 1e-9)
            self._rate = (step - self._mark[0]) * self._images / seconds
            self._mark = (step, now)
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures(), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._main and (due or step == self._start + 1):
            left = self._left(step)
            parts = [f"step {step}/{self._total}", self._figures(), f"left {left}" if left else ""]
            self._print("  ".join(p for p in parts if p))

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time spent inside (evaluation, panels) out of images/s."""
        began = time.monotonic()
        yield
        if self._mark is not None:
            self._mark = (self._mark[0], self._mark[1] + time.monotonic() - began)

    def message(self, text: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(text, file=self._stream)
        elif self._main:
            self._print(text)

    def close(self) -> None:
        """End the bar; it stays on the terminal."""
        if self._bar is not None:
            self._bar.close()

    def _make_bar(self) -> Any:
        tqdm = _tqdm()
        return tqdm and tqdm(
            total=self._total, initial=self._start, file=self._stream, dynamic_ncols=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} left {remaining} {postfix}",
        )  # fmt: skip

    def _figures(self) -> str:
        loss = "" if self._loss is None else f"loss {self._loss:.4g}"
        rate = f"{self._rate:.0f} images/s" if self._rate else ""
        return "  ".join(p for p in (loss, rate) if p)

    def _left(self, step: int) -> str:
        if not self._rate or step >= self._total:
            return ""
        seconds = round((self._total - step) * self._images / self._rate)
        hours, minutes, seconds = seconds // 3600, seconds // 60 % 60, seconds % 60
        return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s"

    def _print(self, text: str) -> None:
        print(text, file=self._stream, flush=True)
