"""Trackers of metrics: metrics.jsonl, and those that training.trackers names.

A tracker is one file and a line in TRACKERS. metrics.jsonl is part of the run, so it is always written and a failure to
write it ends the run; a failure of another tracker is reported once, and the run goes on without that tracker.
"""

import importlib.util
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mtp_jax.config import Config, UserError
from mtp_jax.errors import first_line
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
        self._trackers, self._writer = dict(trackers), writer

    def write(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Records the values of a step; values are numbers, numpy or jax scalars, or None."""
        if self._writer is not None:
            self._writer.write(step, metrics)
        values = {name: plain(value) for name, value in metrics.items()}
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.write(step, values)
            except Exception as error:
                self._drop(name, error, step)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        for name, tracker in list(self._trackers.items()):
            try:
                tracker.close()
            except Exception as error:
                self._drop(name, error, None)

    def _drop(self, name: str, error: Exception, step: int | None) -> None:
        notice(f"training.trackers: {name} has failed and is no longer written ({first_line(error)})", step)
        del self._trackers[name]


def open_trackers(workdir: str | os.PathLike[str], config: Config, resume_step: int | None) -> Trackers:
    """Returns the trackers of a run; on processes other than the main one they do nothing."""
    if jax.process_index():
        return Trackers([])
    opening = Opening(workdir, config, resume_step)
    opened = []
    writer = MetricsWriter(workdir, resume_step)
    for name in config.training.trackers:
        try:
            opened.append((name, TRACKERS[name][0](opening)))
        except Exception as error:  # of a service, such as no network or no account
            notice(f"training.trackers: {name} cannot be opened ({first_line(error)}); the run goes on without it")
    return Trackers(opened, writer)
