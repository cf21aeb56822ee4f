"""Commands and runs in a notebook: their output, curves and newest pictures while they go on.

A run is a process of its own: a TPU belongs to one process, so the notebook's must not use jax before.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TAIL = 14  # lines of the output that are shown at the end: the table of figures, or what went wrong


def train(arguments: Sequence[str], workdir: str, *, every: float = 5.0) -> int:
    """`python -m salcl_jax.main` in the folder where the notebook is, redrawn every so many seconds.

    Interrupting the cell sends SIGTERM: the run saves and ends with 75, and the same call continues it.
    Its output goes to WORKDIR/output.txt, whose last lines are printed. Returns the exit code (0 or 75);
    RuntimeError for any other.
    """
    workdir = os.path.expanduser(workdir)
    folder = Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "salcl_jax.main", *arguments, f"--workdir={workdir}"]
    with open(folder / "output.txt", "a", encoding="utf-8") as output:
        # A session of its own: an interrupt of the kernel must not reach the run as a second signal.
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        print("starting; the first figures come when the step is compiled", flush=True)
        try:
            _follow(process, folder, every)
        except KeyboardInterrupt:
            print("stopping; the run saves first", flush=True)
        finally:
            if process.poll() is None:
                process.terminate()
            code = process.wait()
    draw_run(folder)
    tail = "\n".join((folder / "output.txt").read_text(encoding="utf-8").splitlines()[-TAIL:])
    if code not in (0, 75):
        raise RuntimeError(f"the run ended with exit code {code}:\n{tail}")
    print(tail if code == 0 else "saved; run this cell again to continue", flush=True)
    return code


def command(arguments: Sequence[str], *, seconds: float = 0) -> None:
    """Run a command and print its output as it comes; interrupting the cell ends it and what it started.

    seconds: after which it is ended likewise, and that is no error; 0: never. Raises
    `subprocess.CalledProcessError` where it fails.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    process = subprocess.Popen(arguments, text=True, errors="replace", start_new_session=True, **pipes)
    late = []
    timer = threading.Timer(seconds, lambda: (late.append(1), _end(process)))
    if seconds:
        timer.start()
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
        code = process.wait()
    except BaseException:
        _end(process)
        raise
    finally:
        timer.cancel()
        process.wait()
    if code and not late:
        raise subprocess.CalledProcessError(code, list(arguments))


def _end(process: subprocess.Popen) -> None:
    """SIGTERM to a process and its children, which may outlive it: ssh would go on holding the output."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)


def show(*pictures: np.ndarray | Any) -> None:
    """Pictures uint8 [h, w, 3] and matplotlib figures below the cell, without any plotting backend."""
    from IPython.display import display

    from salcl_jax.report_figures import pixels

    for picture in pictures:
        display(Image.fromarray(picture if isinstance(picture, np.ndarray) else pixels(picture)))


def draw_run(workdir: str | Path) -> None:
    """Curves and the newest panel of a run, in place of what the cell shows; nothing where there are none."""
    from IPython.display import clear_output

    from salcl_jax.report_figures import run_curves

    folder = Path(workdir)
    lines, panels = metrics(folder), sorted(folder.glob("panels/*.png"))
    if lines or panels:
        clear_output(wait=True)
    if lines:
        show(run_curves(lines, _total(folder)))
    if panels:
        with Image.open(panels[-1]) as panel:
            show(np.asarray(panel.convert("RGB")))


def metrics(workdir: str | Path) -> list[dict]:
    """Complete lines of the run's metrics.jsonl so far, none where there is no such file."""
    path = Path(workdir) / "metrics.jsonl"
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]


def _follow(process: subprocess.Popen, folder: Path, every: float) -> None:
    """Until the process ends; redrawn only when there is something new, so that nothing flickers."""
    shown = 0, 0
    while process.poll() is None:
        now, until = _marks(folder), time.monotonic() + every
        if now != shown:
            draw_run(folder)
        shown = now
        while process.poll() is None and time.monotonic() < until:
            time.sleep(min(0.2, every))


def _marks(folder: Path) -> tuple:
    """What changes when a run writes figures or a picture."""
    path = folder / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0, len(list(folder.glob("panels/*.png")))


def _total(folder: Path) -> int:
    """Steps that the run will take, 0 while that is not known."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return config.get("config", {}).get("resolved", {}).get("total_steps", 0)
