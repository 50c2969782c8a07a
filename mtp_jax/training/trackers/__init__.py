"""Trackers of metrics: metrics.jsonl, and those that training.trackers names.

A tracker is one file and a line in TRACKERS. metrics.jsonl is part of the run: it is always written, and no checkpoint
is saved whose lines are not. A failure of another tracker is reported once, and the run goes on without that tracker.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtp_jax.config import Config, UserError
from mtp_jax.errors import first_line
from mtp_jax.lease import Lease
from mtp_jax.storage import AnyPath
from mtp_jax.training.metrics import MetricsWriter, plain
from mtp_jax.training.notices import notice
from mtp_jax.training.trackers.tensorboard import TensorBoard
from mtp_jax.training.trackers.tracker import Opening, Tracker
from mtp_jax.training.trackers.wandb import WeightsAndBiases

# Name in training.trackers -> (tracker, the package that it needs)
TRACKERS: dict[str, tuple[type[Tracker], str]] = {
    "tensorboard": (TensorBoard, "tensorboardX"),
    "wandb": (WeightsAndBiases, "wandb"),
}


def check(names: Sequence[str]) -> None:
    """Rejects trackers that do not exist or are not installed, before the run starts.

    Raises:
      UserError: names the tracker and the remedy.
    """
    for name in names:
        if name not in TRACKERS:
            raise UserError(f"training.trackers={name!r}: no such tracker; use some of {', '.join(TRACKERS)}")
        package = TRACKERS[name][1]
        if importlib.util.find_spec(package) is None:
            raise UserError(f"training.trackers={name!r}: {package} is not installed; pip install {package}")


class Trackers:
    """Several trackers as one; a tracker that fails is reported once and dropped."""

    def __init__(self, trackers: Sequence[tuple[str, Tracker]], writer: MetricsWriter | None = None):
        """Groups trackers that are open.

        Args:
          trackers: (name, tracker); these may fail.
          writer: of metrics.jsonl, whose errors are raised; None: not written.
        """
        self._trackers, self.writer = dict(trackers), writer

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the values of a step; values are numbers, numpy or jax scalars, or None."""
        if self.writer is not None:
            self.writer.write(step, metrics)
        values = {name: plain(value) for name, value in metrics.items()}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(step, values)
            except Exception as error:
                self._drop(name, error, step)

    def flush(self, is_last: bool = False) -> bool:
        """Stores the lines of metrics.jsonl (`MetricsWriter.flush`), and what the trackers buffer. Collective."""
        return self.writer is None or self.writer.flush(is_last)

    def flush_others(self) -> None:
        """Writes what the trackers buffer; metrics.jsonl is not one of them."""
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.flush()
            except Exception as error:
                self._drop(name, error, None)

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, error, None)

    def _drop(self, name: str, error: Exception, step: int | None) -> None:
        notice(f"training.trackers: {name} has failed and is no longer written ({first_line(error)})", step)
        self._trackers.pop(name, None)


def open_trackers(workdir: AnyPath, config: Config, resume_step: int | None, lease: Lease | None = None) -> Trackers:
    """Returns the trackers of a run; on processes other than the main one they write nothing."""
    is_main = jax.process_index() == 0
    opening = Opening(workdir, config, resume_step)
    opened = []
    for name in config.training.trackers if is_main else ():
        try:
            opened.append((name, TRACKERS[name][0](opening)))
        except Exception as error:  # of a service, such as no network or no account
            notice(f"training.trackers: {name} cannot be opened ({first_line(error)}); the run goes on without it")
    trackers = Trackers(opened)
    trackers.writer = MetricsWriter(workdir, resume_step, is_main, lease, trackers.flush_others)
    return trackers
