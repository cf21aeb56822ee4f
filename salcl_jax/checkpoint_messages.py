"""What is said about checkpoints: a line each, in place of what orbax and tensorstore print themselves."""

import contextlib
import functools
import gc
import logging
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath

_log = logging.getLogger(__name__)
_LENGTH = 160  # characters of a library's message
_STATUS = re.compile(r"[A-Z]+(_[A-Z]+)*: ")  # how tensorstore's errors begin
Failures = list[tuple[int, str]]  # steps that cannot be read, and why


def one_line(error: Exception) -> str:
    """Kind and text of an error; of a long one the middle goes, its end mostly holds the cause."""
    text = f"{type(error).__name__}: {' '.join(str(error).split())}"
    return text if len(text) <= _LENGTH else f"{text[: _LENGTH // 2]} ... {text[-_LENGTH // 2 :]}"


def warn_passed_over(directory: epath.Path, failures: Failures, step: int) -> None:
    """Say which checkpoints are damaged, and which one is used."""
    if failures and jax.process_index() == 0:
        bad = ", ".join(str(s) for s, _ in failures)
        _log.warning(
            "%s: checkpoint %s is damaged (%s); using %d instead",
            directory, bad, failures[0][1], step,
        )  # fmt: skip


def raise_if_unreadable(directory: epath.Path, failures: Failures) -> None:
    """Raise ValueError where there are checkpoints but none that can be read."""
    if failures:
        steps = ", ".join(str(s) for s, _ in failures)
        raise ValueError(
            f"{directory} holds checkpoint {steps} but none can be read ({failures[0][1]}): "
            "repair or move the folder, or use another workdir"
        )


@functools.cache
def quieten() -> None:
    """Drop orbax's messages below warnings, and tracebacks of its threads: what they raise is raised here."""
    logging.getLogger("absl").addFilter(_not_orbax_chatter)
    logging.getLogger("asyncio").addFilter(_not_abandoned)
    sys.unraisablehook = functools.partial(_unless_late, sys.unraisablehook)


def _not_orbax_chatter(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname or (record.levelno >= logging.WARNING and not record.exc_info)


def _not_abandoned(record: logging.LogRecord) -> bool:
    """A save stops at the first array that cannot be written; asyncio tells of each of the others."""
    error = record.exc_info[1] if record.exc_info else None
    return "never retrieved" not in record.getMessage() or not _STATUS.match(str(error))


def _unless_late(hook: Callable[[Any], None], unraisable: Any) -> None:
    """Writes that end after their save was given up find its event loop closed."""
    if str(unraisable.exc_value) != "Event loop is closed":
        hook(unraisable)


@contextlib.contextmanager
def quiet_failures() -> Iterator[None]:
    """Silence the tracebacks of abandoned read tasks: the caller reports in one line."""
    logger, hook = logging.getLogger("asyncio"), sys.unraisablehook
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    sys.unraisablehook = lambda _: None
    try:
        yield
    finally:
        gc.collect()  # abandoned tasks complain when they are collected
        logger.setLevel(level)
        sys.unraisablehook = hook
