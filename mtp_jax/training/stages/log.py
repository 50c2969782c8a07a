"""The lines of metrics.jsonl, of other trackers and of the terminal."""

import time
from typing import Any

import jax
import numpy as np

from mtp_jax.training import trackers
from mtp_jax.training.flops import peak_flops, train_flops_per_token
from mtp_jax.training.metrics import Progress, peak_memory_gib
from mtp_jax.training.stages.stage import Session, Stage


class LogMetrics(Stage):
    """Writes the metrics every training.log_every steps, at steps with values of other stages, and at the last step.

    Before a requested stop the terminal has the line of the step, and metrics.jsonl only if it is one of these steps:
    the lines of a run must not depend on where it was stopped.
    """

    def __init__(self) -> None:
        self._trackers = trackers.Trackers([])

    def start(self, session: Session) -> None:
        resume_step = session.first_step or None
        self._trackers = trackers.open_trackers(session.workdir, session.config, resume_step, session.lease)
        session.trackers = self._trackers
        self._progress = Progress(session.config.training.num_steps)
        self._newest: dict[str, Any] = {}
        self._started = time.perf_counter()
        self._timed_step, self._timed_seconds = session.step, 0.0
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = peak * jax.device_count() if peak else None
        self._tokens_per_step = session.config.data.batch_size * session.config.data.sequence_length
        self._flops_per_token = train_flops_per_token(session.config)

    def on_metrics(self, session: Session, step: int, metrics: dict[str, Any]) -> None:
        self._newest = {name: value for name, value in metrics.items() if np.ndim(value) == 0}

    def after_step(self, session: Session) -> None:
        is_first = session.step == session.first_step + 1
        if is_first:  # most of its time is compilation
            self._timed_step, self._timed_seconds = session.step, session.clock.training_seconds()
        if not (session.is_grid_step or session.is_stopped):
            return
        session.fetch()
        record = self._record(session, is_first)
        if session.is_grid_step:
            self._trackers.write(session.step, record)
        if session.is_main:
            print(self._progress.line(session.step, record), flush=True)

    def close(self) -> None:
        self._trackers.close()

    def _record(self, session: Session, is_first: bool) -> dict[str, Any]:
        """Returns the values of the current step's line."""
        now = session.clock.training_seconds()
        steps, seconds = session.step - self._timed_step, now - self._timed_seconds
        if is_first:
            steps, seconds = 1, time.perf_counter() - self._started
        self._timed_step, self._timed_seconds = session.step, now
        rate = steps * self._tokens_per_step / seconds
        record = {"tokens": session.step * self._tokens_per_step} | self._newest | session.values
        record["tokens_per_second"] = rate
        record["mfu"] = rate * self._flops_per_token / self._peak if self._peak else None
        if session.config.data.mixture:
            for name, (share, epochs) in session.run.corpus.drawn(session.step).items():
                record[f"data_share_{name}"], record[f"data_epochs_{name}"] = share, epochs
        record["peak_memory_gib"] = peak_memory_gib(jax.local_devices())
        return record
