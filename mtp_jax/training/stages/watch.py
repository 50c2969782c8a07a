"""The end of a run whose steps no longer finish."""

import contextlib

import jax

from mtp_jax.training.stages.stage import Session, Stage
from mtp_jax.training.watchdog import Watchdog


class EndStalledRun(Stage):
    """Reports dispatched steps to a `Watchdog`, which ends the process after training.stall_seconds without one."""

    def __init__(self) -> None:
        self._watchdog: Watchdog | None = None

    def start(self, session: Session) -> None:
        self._watchdog = Watchdog(session.config.training.stall_seconds, jax.process_index())

    def after_step(self, session: Session) -> None:
        assert self._watchdog is not None, "started"
        self._watchdog.dispatched(session.step, session.metrics["loss"])

    def paused(self, cause: str) -> contextlib.AbstractContextManager[None]:
        return self._watchdog.paused(f"the {cause}") if self._watchdog else contextlib.nullcontext()

    def close(self) -> None:
        if self._watchdog:
            self._watchdog.close()
