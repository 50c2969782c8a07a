"""Standard streams that never fail a run: output that cannot be written is dropped, like that of `> /dev/null`."""

import contextlib
import io
import os
import select
import sys


class _LossyFile(io.FileIO):
    """A file descriptor for output that becomes the null device at its first error: closed pipe, full disk."""

    def write(self, data) -> int:
        size = memoryview(data).nbytes
        try:
            written = super().write(data)
            while written is None:  # non-blocking, and full
                select.select([], [self.fileno()], [])
                written = super().write(data)
            return written
        except OSError:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.fileno())
            os.close(null)
            return size


def protect() -> None:
    """Makes sys.stdout and sys.stderr accept every text, whatever becomes of it.

    Characters outside the encoding of a stream are replaced. Closed descriptors 0 to 2 become the null device, so that
    no file opened later has their number. Streams that something else has replaced (a notebook, a test) are unchanged.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        with contextlib.suppress(OSError):
            if stream is not None:
                stream.flush()
        text = io.TextIOWrapper(
            io.BufferedWriter(_LossyFile(number, "w", closefd=False)),
            encoding=stream.encoding if stream is not None else "utf-8",
            errors="replace" if number == 1 else "backslashreplace",
            line_buffering=number == 2 or (stream is not None and (stream.line_buffering or stream.write_through)),
        )
        setattr(sys, name, text)
        setattr(sys, f"__{name}__", text)
