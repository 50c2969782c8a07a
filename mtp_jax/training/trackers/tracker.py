"""The interface of a tracker: where the metrics of a run go beside metrics.jsonl."""

from collections.abc import Mapping
from dataclasses import dataclass

from mtp_jax.config import Config
from mtp_jax.storage import AnyPath


@dataclass(frozen=True)
class Opening:
    """Arguments of a tracker.

    workdir: the run's folder. config: the resolved config. resume_step: step of the restored checkpoint, beyond which
    an earlier attempt may have logged; None: a fresh start.
    """

    workdir: AnyPath
    config: Config
    resume_step: int | None


class Tracker:
    """A tracker; made from an `Opening` by process 0 only. It may raise: the run goes on without it."""

    def __init__(self, opening: Opening):
        del opening

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        """Records the values of a step; None for a value that is unknown."""
        raise NotImplementedError

    def flush(self) -> None:
        """Writes what is buffered. Called every few seconds from a thread of its own, and before checkpoints."""

    def close(self) -> None:
        """Writes what is buffered and releases the tracker."""
