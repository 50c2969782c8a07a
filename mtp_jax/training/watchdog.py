"""Watchdog: ends a run in which no step finishes any more, with the Python stacks of all threads."""

import collections
import contextlib
import faulthandler
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType
from typing import Any

from mtp_jax import signals
from mtp_jax.errors import EXIT_LOST

STEP_FACTOR = 20  # a step may take as many times the median
PAUSE_FACTOR = 10  # a pause (checkpoint, validation) may take as many times training.stall_seconds
MAX_POLL_SECONDS = 5.0
NUM_TIMES = 101  # newest step times, of which the median is taken
DEBUGGERS = ("bdb", "pdb", "pydevd", "debugpy", "IPython.core.debugger")


class Watchdog:
    """Watches the steps of a run from a thread of its own.

    A step counts as finished when the device has computed its metrics, not when it is dispatched. The time that this
    process was suspended (a stopped process, a sleeping laptop) does not count, nor does a debugger's.
    """

    def __init__(self, stall_seconds: float, process_index: int = 0):
        """Starts the thread.

        Args:
          stall_seconds: shortest time without a finished step that counts as a stall, in seconds; 0: never.
          process_index: of this process, for the message.
        """
        self._process_index = process_index
        self._stall_seconds = stall_seconds
        self._lock = threading.Lock()
        self._running: collections.deque[tuple[int, Any]] = collections.deque()
        self._step: int | None = None  # the newest finished one; None: still compiling
        self._times: collections.deque[float] = collections.deque(maxlen=NUM_TIMES)
        self._idle = self._since_step = 0.0  # seconds
        self._pause = ""
        self._closed = threading.Event()
        if stall_seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def dispatched(self, step: int, result: Any) -> None:
        """Notes a step that was given to the device.

        Args:
          step: its number.
          result: a jax.Array, any output of it that is not donated to a later one.
        """
        if self._stall_seconds:
            with self._lock:
                self._running.append((step, result))

    @contextlib.contextmanager
    def paused(self, name: str) -> Iterator[None]:
        """A part of the run without steps, such as "a checkpoint", which has a longer limit."""
        with self._lock:
            self._pause, self._idle = name, 0.0
        try:
            yield
        finally:
            with self._lock:
                self._pause, self._idle, self._since_step = "", 0.0, 0.0

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def limit(self) -> float:
        """Returns the seconds without a finished step, or of the current pause, that count as a stall."""
        with self._lock:
            if self._pause:
                return self._stall_seconds * PAUSE_FACTOR
            median = statistics.median(self._times) if self._times else 0.0
            return max(self._stall_seconds, STEP_FACTOR * median)

    def _watch(self) -> None:
        poll = min(MAX_POLL_SECONDS, self._stall_seconds / 10)
        before = time.monotonic()
        while not self._closed.wait(poll):
            now = time.monotonic()
            self._collect(min(now - before, 2 * poll))
            before = now
            if self._step is not None and self._idle > self.limit() and not self._closed.is_set():
                if _is_debugged(sys._current_frames().get(threading.main_thread().ident or 0)):
                    self._idle = 0.0
                else:
                    self._end()

    def _collect(self, seconds: float) -> None:
        """Adds `seconds` to the time without a finished step, and takes the steps that have finished since."""
        with self._lock:
            self._idle += seconds
            self._since_step += seconds
            num_done = 0
            while self._running and self._running[0][1].is_ready():
                self._step = self._running.popleft()[0]
                num_done += 1
            if num_done:
                self._times.extend([self._since_step / num_done] * num_done)
                self._since_step = 0.0
                if not self._pause:
                    self._idle = 0.0

    def _end(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(sys.__stderr__ or 2, all_threads=True)
        waited = f"{self._pause} has taken" if self._pause else f"no step has finished after step {self._step} for"
        where = f"process {self._process_index} on {socket.gethostname()}"
        line = (
            f"error: stalled: {waited} {self._idle:.0f} s, {where}; the stacks of its threads are above; run the same "
            "command to go on from the newest checkpoint, or with a larger training.stall_seconds\n"
        )
        with contextlib.suppress(OSError):
            os.write(2, line.encode())
        signals.end_process(EXIT_LOST)


def _is_debugged(frame: FrameType | None) -> bool:
    """Returns whether a debugger's prompt is on the stack that ends with `frame`."""
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if any(name == known or name.startswith(f"{known}.") for known in DEBUGGERS):
            return True
        frame = frame.f_back
    return False
