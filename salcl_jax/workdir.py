"""A workdir: one run in it at a time, and none that begins where another has been."""

import contextlib
import errno
import json
import os
import socket
from collections.abc import Iterator

from etils import epath

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"
_TAKEN = (errno.EAGAIN, errno.EACCES, errno.EWOULDBLOCK)


@contextlib.contextmanager
def alone(workdir: str) -> Iterator[None]:
    """Inside, no other process on any machine that shares the folder is here; ValueError if one is already.

    The system lets go of the lock when the process ends, however it ends, so none is ever left behind.
    Buckets have no locks, nor have some network file systems: there nothing is checked. Makes the folder.
    """
    if "://" in workdir or fcntl is None:
        yield
        return
    os.makedirs(workdir, exist_ok=True)
    with open(os.path.join(workdir, LOCK), "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                file.seek(0)
                raise ValueError(
                    f"another run is at work in {workdir} ({file.read(200).strip() or 'just started'}): wait "
                    "for it to end, stop it, or use another --workdir"
                ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        yield


def step_of(line: str | bytes) -> int | None:
    """Step of a line of metrics.jsonl; None where the line is broken, whatever it holds."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


def last_step(workdir: str) -> int:
    """Newest step that metrics.jsonl of a run tells of, 0 where it tells of none."""
    path = epath.Path(workdir) / "metrics.jsonl"
    steps = map(step_of, path.read_bytes().splitlines() if path.exists() else ())
    return max((step for step in steps if step is not None), default=0)


def check_nothing_lost(workdir: str, every: int) -> bool:
    """Whether a run that begins here begins again; ValueError where it would write over one that was saved.

    every: steps between checkpoints. A run saves after its first step too, and each save waits for the one
    before: figures from after the second mean that a checkpoint was there.
    """
    logged = last_step(workdir)
    if logged > max(2, every):
        raise ValueError(
            f"{workdir} holds figures up to step {logged} but no checkpoint: put its checkpoints back, or "
            "use another --workdir; to start over in this one, move its metrics.jsonl away"
        )
    return logged > 0
