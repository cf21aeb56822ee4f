"""skipped.jsonl: the photos that a run could not use, each once, with the reason."""

import contextlib
import dataclasses
import json
import threading
from collections import Counter

from etils import epath

from salcl_jax.data.sources import Source
from salcl_jax.writer import replace_text

MOST = 10_000  # photos listed: of more, the cause is not the photo


class Skipped:
    """Photos that this process passed over, kept in skipped.jsonl of the workdir.

    A line is {"file": where the photo lies, "reason": one of `data.decode.REASONS`}. Process i > 0 keeps its
    own, skipped.I.jsonl. A continued run goes on with the list, a fresh one starts it anew. Thread-safe.
    """

    def __init__(self, workdir: str, *, process: int, resume: bool, most: int = MOST):
        self.path = epath.Path(workdir) / (f"skipped.{process}.jsonl" if process else "skipped.jsonl")
        self._most, self._lock = most, threading.Lock()
        self._found = _read(self.path) if resume else {}
        self._written = len(self._found) if resume else -1

    def __enter__(self) -> "Skipped":
        return self

    def __exit__(self, kind: type | None, *_) -> None:
        with contextlib.suppress(*[OSError] * (kind is not None)):  # what went wrong first is told
            self.write()

    def watch(self, source: Source) -> Source:
        """The same source, whose unusable photos are listed."""
        return dataclasses.replace(source, note=self.note)

    def note(self, place: str, reason: str) -> None:
        """List a photo, if it is not there yet."""
        with self._lock:
            if len(self._found) < self._most:
                self._found.setdefault(place, reason)

    def reasons(self) -> dict[str, int]:
        """Number of listed photos by reason."""
        with self._lock:
            return dict(sorted(Counter(self._found.values()).items()))

    def write(self) -> None:
        """Bring the file up to date, replacing it whole; there is none before the first photo."""
        with self._lock:
            found = dict(self._found)
        if len(found) != self._written and (found or self.path.exists()):
            lines = (json.dumps({"file": place, "reason": reason}) for place, reason in found.items())
            replace_text(self.path, "".join(f"{line}\n" for line in lines))
        self._written = len(found)


def _read(path: epath.Path) -> dict[str, str]:
    """The list of an earlier start; what is no line of it counts for nothing."""
    found = {}
    for line in path.read_bytes().splitlines() if path.exists() else ():
        try:
            row = json.loads(line)
            found[str(row["file"])] = str(row["reason"])
        except (ValueError, KeyError, TypeError):
            continue
    return found
