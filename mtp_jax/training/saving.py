"""The steps at which checkpoints are saved: a regular interval, and sooner after a save that failed."""

from dataclasses import dataclass, field

LAST_SAVE_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between the attempts of a save that must succeed


@dataclass
class SaveSchedule:
    """Decides when to save; the same on every process, because it counts steps.

    After the n-th failure in a row the next attempt is `every / 16 * 2^(n-1)` steps later, between 1 and `every`.

    Attributes:
      every: number of steps between two saves.
      num_failures: number of saves that failed since the last one that succeeded.
    """

    every: int
    num_failures: int = field(default=0, init=False)
    _retry: int | None = field(default=None, init=False)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or (self._retry is not None and step >= self._retry)

    def started(self) -> None:
        self._retry = None

    def failed(self, step: int) -> None:
        """Counts a failure that was noticed at `step`."""
        wait = min(self.every, max(1, self.every // 16) << min(self.num_failures, 31))
        self.num_failures += 1
        self._retry = step + wait

    def succeeded(self) -> None:
        self.num_failures = 0
