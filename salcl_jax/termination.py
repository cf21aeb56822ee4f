"""Being told to stop: a flag instead of a sudden end, so that a run can save first."""

import contextlib
import signal
from collections.abc import Callable, Iterator

import jax


@contextlib.contextmanager
def watch_for_termination() -> Iterator[Callable[[], bool]]:
    """Inside, SIGTERM and the first Ctrl-C only set a flag; a second Ctrl-C acts as usual.

    SIGTERM may come more than once (Slurm sends it from two places) and must not cut the save short.

    With several processes jax's own service carries SIGTERM to all of them at one step, and Ctrl-C acts as
    usual: one process alone cannot save.
    """
    told = []

    def note(number, frame):
        told.append(number)
        if number == signal.SIGINT:
            signal.signal(number, before[number])

    numbers = [signal.SIGINT, signal.SIGTERM] if jax.process_count() == 1 else []
    before = {}
    with contextlib.suppress(ValueError):  # not in the main thread: nothing to catch
        before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield lambda: bool(told)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
