"""Spikes of the loss: reported once each, and counted in the metrics."""

import collections
import statistics
from typing import Any

import numpy as np

from mtp_jax.training.metrics import METRICS_FILE, read_metrics
from mtp_jax.training.notices import notice
from mtp_jax.training.stages.stage import Session, Stage
from mtp_jax.training.step import GROUP_NORMS

WINDOW, FEWEST = 128, 16  # steps that the median is taken over


class ReportSpikes(Stage):
    """Reports a main loss above its running median by training.spike_threshold median absolute deviations.

    The main loss (depth 0) does not jump where a schedule changes the weights of other depths. Steps above the
    threshold in a row are one spike. The metric loss_spikes counts those of the whole run. A resumed run takes the
    losses that metrics.jsonl has, so with training.log_every=1 it finds the same spikes as a run without interruption.
    """

    def __init__(self) -> None:
        self._losses: collections.deque[float] = collections.deque(maxlen=WINDOW)
        self._count, self._is_above = 0, False

    def start(self, session: Session) -> None:
        try:
            rows = read_metrics(session.workdir / METRICS_FILE)
        except (OSError, ValueError):  # of a run without metrics; LogMetrics reports a corrupt file
            return
        rows = [row for row in rows if row["step"] <= session.first_step]
        self._losses.extend(row["loss_main"] for row in rows if row.get("loss_main") is not None)
        self._count = (rows[-1].get("loss_spikes") or 0) if rows else 0

    def on_metrics(self, session: Session, step: int, metrics: dict[str, Any]) -> None:
        allowed, loss = session.config.training.spike_threshold, metrics["loss_main"]
        if not allowed:
            return
        if np.isfinite(loss):
            height = deviations(loss, self._losses)
            if height > allowed and not self._is_above:
                self._count += 1
                if session.is_main:
                    notice(self._line(session, loss, height, metrics[GROUP_NORMS]), step)
            self._is_above = height > allowed
            self._losses.append(loss)
        metrics["loss_spikes"] = self._count

    def _line(self, session: Session, loss: float, height: float, norms: np.ndarray) -> str:
        name, index = session.run.trainer.groups[int(np.argmax(norms))]
        where = name if index is None else f"{name}[{index}]"
        return (
            f"loss spike: loss_main={loss:.3f}, {height:.0f} median absolute deviations above the median of "
            f"{statistics.median(self._losses):.3f}; the largest gradient norm is that of {where}, {norms.max():.3g}"
        )


def deviations(loss: float, losses: collections.deque[float]) -> float:
    """Returns the distance of a loss from the median of `losses`, in median absolute deviations; 0 for few losses.

    A deviation counts as at least 1 % of the median, so that a flat loss has no spikes in its rounding.
    """
    if len(losses) < FEWEST:
        return 0.0
    median = statistics.median(losses)
    deviation = statistics.median(abs(x - median) for x in losses)
    return (loss - median) / max(deviation, 0.01 * abs(median), 1e-6)
