"""The time of a run by cause."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

# Until the first step is done all time is startup: imports, data, restoring, compilation. Time that no part of the loop
# has counted is "other".
CAUSES = ("startup", "step", "data", "checkpoint", "validation", "profile", "other")
PAUSES = ("checkpoint", "validation", "profile")  # excluded from tokens per second


class Clock:
    """Divides the time since `started` among CAUSES.

    Attributes:
      seconds: by cause, up to the last change of the cause.
    """

    def __init__(self, started: float | None = None):
        """Starts the clock.

        Args:
          started: start of the process in the seconds of time.time(); None: now.
        """
        before = 0.0 if started is None else max(time.time() - started, 0.0)
        self.seconds = dict.fromkeys(CAUSES, 0.0) | {"startup": before}
        self._cause, self._since, self._has_started = "startup", time.perf_counter(), False

    def started(self) -> float:
        """Ends the startup and returns its seconds."""
        self._turn("other")
        self._has_started = True
        return self.seconds["startup"]

    @contextmanager
    def counting(self, cause: str) -> Iterator[None]:
        """Counts the time of a block as `cause`; blocks may be nested, and the innermost counts."""
        before = self._cause
        self._turn(cause)
        try:
            yield
        finally:
            self._turn(before)

    def move(self, seconds: float, old: str, new: str) -> None:
        """Counts seconds of the cause `old` as `new`."""
        if self._has_started:
            self.seconds[old] -= seconds
            self.seconds[new] += seconds

    def training_seconds(self) -> float:
        """Returns the seconds since the start without startup and PAUSES."""
        self._turn(self._cause)
        return self.total() - self.seconds["startup"] - sum(self.seconds[cause] for cause in PAUSES)

    def total(self) -> float:
        """Returns the seconds since the start, up to the last change of the cause."""
        return sum(self.seconds.values())

    def _turn(self, cause: str) -> None:
        now = time.perf_counter()
        self.seconds[self._cause if self._has_started else "startup"] += now - self._since
        self._cause, self._since = cause, now
