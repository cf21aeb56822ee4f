"""TensorBoard files beside metrics.jsonl: the only importer of tensorboardX.

Events are written at once, by the caller's thread: tensorboardX's own thread dies on a full disk, and
whoever then adds an event waits for it for ever.
"""

import logging
import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from etils import epath

_log = logging.getLogger(__name__)


class Board:
    """Event files of one folder; those after `resume_step` that are already there are hidden.

    On a bucket they are copies of local files, renewed at most every `interval` seconds and at the end.
    Without tensorboardX it says so once and does nothing. Methods raise OSError, but not of a bucket.
    """

    def __init__(self, folder: str, resume_step: int, interval: float = 0.0):
        self._events, self._bucket = None, None
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import directory_check
        except ImportError:
            _log.warning("tensorboardX is not installed: no TensorBoard files (metrics.jsonl has all)")
            return
        self._make, self._format = summary, event_pb2
        if "://" in folder:
            self._bucket = _Bucket(folder, interval)
            folder = self._bucket.local
        directory_check(folder)
        # Its file names count seconds: the suffix keeps a quick restart from overwriting the last one.
        self._events = EventsWriter(os.path.join(folder, "events"), f".{time.time_ns()}")
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._add(resume_step + 1, session_log=start)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event a value."""
        if self._events is not None:
            for name, value in values.items():
                self._add(step, summary=self._make.scalar(name, value))
            self._flush()

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """An image, uint8 [h, w, 3]."""
        if self._events is not None:
            self._add(step, summary=self._make.image(name, array, dataformats="HWC"))
            self._flush()

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()
        if self._bucket is not None:
            self._bucket.close()

    def _flush(self) -> None:
        self._events.flush()
        if self._bucket is not None:
            self._bucket.copy_if_due()

    def _add(self, step: int, **content) -> None:
        self._events.write_event(self._format.Event(wall_time=time.time(), step=step, **content))


class _Bucket:
    """A temporary folder `local` whose files are copied to a bucket, where objects are only replaced whole.

    tensorboardX's own writers for buckets need packages that nothing else does, and upload all at each flush.
    What goes wrong is told once and tried again after `interval` seconds.
    """

    def __init__(self, folder: str, interval: float):
        self._remote, self._interval = epath.Path(folder), interval
        self._temporary = tempfile.TemporaryDirectory(prefix="tensorboard-")
        self.local = self._temporary.name
        self._copied, self._told = time.monotonic(), False

    def copy_if_due(self) -> None:
        if time.monotonic() - self._copied >= self._interval:
            self._copy()

    def close(self) -> None:
        with self._temporary:
            self._copy()

    def _copy(self) -> None:
        try:
            self._remote.mkdir(parents=True, exist_ok=True)
            for path in Path(self.local).iterdir():
                (self._remote / path.name).write_bytes(path.read_bytes())
        except Exception as error:  # the packages for buckets raise anything
            if not self._told:
                text = " ".join(str(error).split()) or type(error).__name__
                _log.warning("TensorBoard: %s (the run goes on; metrics.jsonl has all)", text[:300])
            self._told = True
        self._copied = time.monotonic()
