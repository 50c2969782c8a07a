"""TensorBoard's event files, in the workdir.

On an object store the events are written to a temporary file, and the whole object is put at each `flush`.
"""

import contextlib
import os
import pathlib
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping

from mtp_jax import storage
from mtp_jax.errors import warn_once
from mtp_jax.training.trackers.tracker import Opening, Tracker

# Modules that tensorboardX imports if they are installed, which takes seconds and hundreds of MiB. Writing events needs
# none of them: torch serves an annotation, the others tensorboardX's own writers to object stores.
UNUSED = ("torch", "boto3", "google.cloud.storage")


@contextlib.contextmanager
def _without(*names: str) -> Iterator[None]:
    """Context in which an import of one of these modules raises ImportError, unless it was imported before."""
    absent = [name for name in names if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for name in absent:
            sys.modules.pop(name, None)


class TensorBoard(Tracker):
    """Writes a scalar per metric, NaN and infinite ones too. A failure of the disk is reported once and never raised.

    tensorboardX writes to object stores with clients of its own, and in a thread whose failure stops the next caller;
    so its records are written here, to a local file.
    """

    def __init__(self, opening: Opening):
        with _without(*UNUSED):
            from tensorboardX.event_file_writer import EventsWriter
            from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder = opening.workdir
        self._target = None if storage.is_local(folder) else storage.path(folder)
        self._temporary = tempfile.mkdtemp(prefix="mtp_jax_events_") if self._target is not None else None
        self._writer: EventsWriter | None = None
        self._event, self._is_new, self._lock = Event, True, threading.Lock()
        with self._reporting():
            self._writer = EventsWriter(os.path.join(self._temporary or os.fspath(folder), "events"))
            if opening.resume_step is not None:  # hides what an earlier attempt logged from there on
                session = SessionLog(status=SessionLog.START)
                self._writer.write_event(
                    Event(step=opening.resume_step + 1, wall_time=time.time(), session_log=session)
                )

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        known = {name: value for name, value in metrics.items() if value is not None}
        summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in known.items()])
        with self._lock, self._reporting():
            if self._writer is not None:
                self._writer.write_event(self._event(step=step, wall_time=time.time(), summary=summary))
                self._is_new = True

    def flush(self) -> None:
        with self._lock, self._reporting(is_final=self._target is None):
            if self._writer is None or not self._is_new:
                return
            self._writer.flush()
            if self._target is not None and self._temporary is not None:
                for path in pathlib.Path(self._temporary).iterdir():
                    storage.write_bytes(self._target / path.name, path.read_bytes())
            self._is_new = False

    def close(self) -> None:
        with self._reporting():
            if self._writer is not None:
                self._writer.close()
        if self._temporary is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _reporting(self, is_final: bool = True) -> Iterator[None]:
        """Reports an OSError. After one that is final no more events are written: the file may end in half a record."""
        try:
            yield
        except OSError as error:
            more = "; no more are written" if is_final else ""
            warn_once(f"TensorBoard's events cannot be written ({storage.reason(error)}){more}")
            if is_final:
                self._writer = None
