"""A requested stop: SIGTERM, SIGINT, or the preemption of one of several processes."""

import signal
from typing import Any

import jax

from mtp_jax.training.stages.stage import Session, Stage


class Preempted(RuntimeError):
    """The run received a signal to stop and has saved its state. Exit code 1: it is not finished."""


class StopAtSignal(Stage):
    """Ends the run after the current step once a signal has arrived; a second signal ends it at once.

    The log and the checkpoint of that step follow, since `Session.is_stopped` is set before them.
    """

    def __init__(self) -> None:
        self._is_set = self._stops = False
        self._previous: dict[int, Any] = {}

    def start(self, session: Session) -> None:
        # With several processes jax.distributed has its own handler, which agrees with the others on a step.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        try:
            for number in numbers:
                self._previous[number] = signal.signal(number, self._set)
        except ValueError:  # not the main thread (a notebook's): signals stay as they are
            pass

    def after_step(self, session: Session) -> None:
        self._stops = self._reached(session.step)
        session.is_stopped |= self._stops

    def finish(self, session: Session) -> None:
        if self._stops and not session.is_last:
            session.saved.wait()
            raise Preempted(f"stopped by a signal at step {session.step}, state saved; run the same command to go on")

    def close(self) -> None:
        for number in self._previous:
            self._give_back(number)

    def _set(self, number: int, frame: Any) -> None:
        del frame
        self._is_set = True
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        before = self._previous[number]
        signal.signal(number, signal.SIG_DFL if before is None else before)  # None: a handler not made in Python

    def _reached(self, step: int) -> bool:
        """Returns whether to stop after this step; the same on every process."""
        if jax.process_count() == 1:
            return self._is_set
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))
