"""The file metrics.jsonl of a workdir.

On a local disk it is appended to. An object cannot be appended to: its lines are kept in memory, and the whole object
is put at each `flush`.
"""

import errno
import json
import os
import threading

from mtp_jax import storage
from mtp_jax.errors import warn_once
from mtp_jax.typing import JsonObject


def parse_lines(content: bytes, name: str) -> list[tuple[JsonObject, bytes]]:
    """Returns (object, line with its end) of the lines of a metrics.jsonl.

    A last line without an end was left by a kill and is dropped; any other that is not a JSON object with an integer
    step is dropped and reported on stderr.
    """
    *lines, _ = content.split(b"\n")
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):  # ValueError: not UTF-8, or not JSON
            row = None
        if isinstance(row, dict) and type(row.get("step")) is int:
            found.append((row, line + b"\n"))
        else:
            warn_once(f"{name}: line {number} is not a JSON object with a step and is dropped: {line[:60]!r}")
    return found


def _kept(content: bytes, step: int, name: str) -> bytes:
    """Returns the lines up to `step`, without those that repeat a step or come out of order."""
    kept, newest = [], -1
    for row, line in parse_lines(content, name):
        if newest < row["step"] <= step:
            newest = row["step"]
            kept.append(line)
    return b"".join(kept)


class LinesFile:
    """Lines in a file or an object. Appended lines are never lost by a failing store: they are written later.

    Attributes:
      is_appended: whether `append` writes; otherwise only `flush` does.
    """

    def __init__(self, path: storage.AnyPath, last_step: int):
        """Opens a file and drops the lines after `last_step`.

        Raises:
          OSError: the file cannot be read or written.
        """
        self._path, self._lock = path, threading.Lock()
        self.is_appended = storage.is_local(path)
        old = storage.read_bytes(path) if storage.is_file(path) else b""
        kept = _kept(old, last_step, str(path))
        self._descriptor: int | None = None
        if self.is_appended:
            if not old.startswith(kept):
                storage.write_bytes(path, kept)
            self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
            os.ftruncate(self._descriptor, len(kept))  # needs no space on a full disk
            self._content, self._start = bytearray(), len(kept)  # not yet written, and its place
        else:
            self._content, self._start = bytearray(kept), len(kept)  # all, and the length of what is stored
            if old != kept:
                self._start = -1

    def append(self, line: bytes) -> None:
        """Adds a line; on a local disk it is written at once. Raises OSError; the line is kept then."""
        with self._lock:
            self._content += line
            if self.is_appended:
                self._write()

    def flush(self) -> None:
        """Stores all lines. Raises OSError."""
        with self._lock:
            if self.is_appended:
                self._write()
                if self._descriptor is not None:
                    os.fsync(self._descriptor)
            elif self._start != len(self._content):
                content = bytes(self._content)
                storage.write_bytes(self._path, content)
                self._start = len(content)

    def _write(self) -> None:
        """Writes waiting lines at their place; after a failure nothing of them counts."""
        if self._descriptor is None or not self._content:
            return
        written = os.pwrite(self._descriptor, self._content, self._start)
        if written < len(self._content):
            os.ftruncate(self._descriptor, self._start)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._start += written
        self._content.clear()

    def close(self) -> None:
        """Closes the file; what `flush` has not stored is lost."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
