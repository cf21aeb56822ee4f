"""When another process of the run is gone: the others end in bounded time, with one line and exit code 75.

A collective with a dead process fails or never returns. jax's heartbeats notice a silent process, and a
process 0 that died at once; jax then aborts the process, after a C++ log with a stack trace.
"""

import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator

AGAIN = 75  # exit code: what is saved is good, the same command continues
GONE = (
    "another process of this run is gone (see above): start the same command again on all machines; "
    "training continues from the last checkpoint"
)
# Words of collectives and of jax's service that lost a process; not of errors that all processes meet.
_WORDS = ("gloo", "nccl", "connection", "coordination", "barrier", "unavailable", "deadline_exceeded")
_kept: list = []  # the handler, for as long as it may be called
_patience: list[float] = []
_leaving: list[int] = []  # the exit code of a process that is on its way out for a reason of its own


def watch(patience: float) -> None:
    """Call it once several processes are connected; an abort by jax then ends with a line and code 75.

    patience: seconds, see `together`. Python cannot catch SIGABRT, which ends the process as soon as its
    handler returns, so the handler is a C function that does not return.
    """

    def on_abort(_: int) -> None:
        if not _leaving:
            os.write(2, f"stopped: {GONE}\n".encode())
        os._exit(_leaving[0] if _leaving else AGAIN)

    _kept.append(ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort))
    ctypes.CDLL(None).signal(int(signal.SIGABRT), _kept[-1])
    _patience.append(patience)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Inside is the work of a process. One that fails waits `patience` seconds for the others, not longer.

    Mostly all fail for the same reason. If one failed alone, the others notice that it is gone.
    """
    try:
        yield
    except BaseException as error:
        end_if_gone(error)
        if _patience:
            _leaving.append(error.code if isinstance(error, SystemExit) else 1)
            timer = threading.Timer(_patience[0], os._exit, _leaving[:1])
            timer.daemon = True
            timer.start()
        raise


def end_if_gone(error: BaseException) -> None:
    """End this process with one line and code 75 if the error says that another process is gone."""
    text = str(error).lower()
    if _patience and isinstance(error, RuntimeError) and any(word in text for word in _WORDS):
        print(f"{' '.join(str(error).split())[:300]}\nstopped: {GONE}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(AGAIN)  # jax would wait for the others
