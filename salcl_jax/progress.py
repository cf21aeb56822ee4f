"""What loops say on the terminal: a bar, or plain lines where there is none, and a table at a run's end."""

import contextlib
import io
import os
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any, SupportsFloat

from salcl_jax.evaluators import HEADLINES


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


def print_table(summary: dict, workdir: str) -> None:
    """The run's main figures beside those of the untrained network, and where the pictures are."""
    final, untrained = summary["final"], summary["untrained"]
    names = [name for name in HEADLINES if name in final]
    width = max((len(name) for name in names), default=0)
    print(f"\n{'':{width}}  {'final':>9}  {'untrained':>9}")
    for name in names:
        print(f"{name:{width}}  {final[name]:9.3f}  {untrained.get(name, float('nan')):9.3f}")
    print(
        f"\n{summary['steps']} steps, {summary['images']} images, {summary['images_per_second']:.0f} "
        f"images/s on {summary['devices']}, {summary['seconds']:.0f} s"
    )
    print(f"pictures: {os.path.join(workdir, 'panels')}", flush=True)
    print(f"all figures: {os.path.join(workdir, 'summary.json')}", flush=True)
