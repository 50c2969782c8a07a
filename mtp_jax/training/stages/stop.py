"""A requested stop: a signal, or the preemption of one of several processes."""

import contextlib
from collections.abc import Iterator

import jax

from mtp_jax.signals import STOP
from mtp_jax.training.stages.stage import Session, Stage


class Preempted(RuntimeError):
    """The run received a signal to stop and has saved its state. Exit code 75, or 130 after Ctrl-C."""

    @property
    def exit_code(self) -> int:
        return STOP.exit_code


class StopAtSignal(Stage):
    """Ends the run after the current step once a signal has arrived; a second signal ends it at once.

    The log and the checkpoint of that step follow, since `Session.is_stopped` is set before them. Until the first step
    is done nothing could be lost, and a signal ends the process (`signals.STOP`).
    """

    def __init__(self) -> None:
        self._stops = False
        self._region = contextlib.ExitStack()

    def before_step(self, session: Session) -> None:
        STOP.waiting_for = f"step {session.step + 1}"

    def after_step(self, session: Session) -> None:
        if session.step == session.first_step + 1:
            self._region.enter_context(STOP.deferred(alone=jax.process_count() == 1))
        self._stops = _is_requested(session.step)
        session.is_stopped |= self._stops

    @contextlib.contextmanager
    def paused(self, cause: str) -> Iterator[None]:
        STOP.waiting_for = f"the {cause}"
        yield

    def finish(self, session: Session) -> None:
        if self._stops and not session.is_last:
            raise Preempted(f"stopped by a signal at step {session.step}, state saved; run the same command to go on")

    def close(self) -> None:
        self._region.close()


def _is_requested(step: int) -> bool:
    """Returns whether to stop after this step; the same on every process."""
    if jax.process_count() == 1:
        return STOP.number is not None
    from jax.experimental import multihost_utils

    # jax.distributed has its own handler of SIGTERM, which agrees with the others on a step.
    return bool(multihost_utils.reached_preemption_sync_point(step))
