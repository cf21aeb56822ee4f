"""TensorBoard files beside metrics.jsonl: the only importer of tensorboardX.

Events are written at once, by the caller's thread: tensorboardX's own thread dies on a full disk, and
whoever then adds an event waits for it for ever.
"""

import logging
import os
import time
from collections.abc import Mapping

import numpy as np

_log = logging.getLogger(__name__)


class Board:
    """Event files of one folder; those after `resume_step` that are already there are hidden.

    Without tensorboardX it says so once and does nothing. Methods raise OSError.
    """

    def __init__(self, folder: str, resume_step: int):
        self._events = None
        try:
            from tensorboardX import summary
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto import event_pb2
            from tensorboardX.record_writer import directory_check
        except ImportError:
            _log.warning("tensorboardX is not installed: no TensorBoard files (metrics.jsonl has all)")
            return
        self._make, self._format = summary, event_pb2
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
            self._events.flush()

    def image(self, step: int, name: str, array: np.ndarray) -> None:
        """An image, uint8 [h, w, 3]."""
        if self._events is not None:
            self._add(step, summary=self._make.image(name, array, dataformats="HWC"))
            self._events.flush()

    def close(self) -> None:
        """Close the file."""
        if self._events is not None:
            self._events.close()

    def _add(self, step: int, **content) -> None:
        self._events.write_event(self._format.Event(wall_time=time.time(), step=step, **content))
