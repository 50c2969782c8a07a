"""Checkpoints every checkpoint.every steps, after the last step, and before a requested stop."""

from mtp_jax.training.checkpoint import NonFiniteState
from mtp_jax.training.stages.nonfinite import NonFiniteLoss, advice
from mtp_jax.training.stages.stage import Session, Stage


class SaveCheckpoints(Stage):
    """Saves the state; the metrics up to it are checked before, so that a state that is not finite is never saved.

    A save that fails is tried again some steps later (`Checkpoints.is_due`); that of the last step must succeed.
    """

    def after_step(self, session: Session) -> None:
        ends = session.is_last or session.is_stopped
        if not (session.saved.is_due(session.step) or ends):
            return
        session.fetch()
        with session.paused("checkpoint"):
            if not session.trackers.flush(is_last=ends):  # no step is saved whose lines are not
                return
            try:
                session.saved.save(session.step, session.state, must_succeed=ends)
            except NonFiniteState as error:
                raise NonFiniteLoss(f"{error}; {advice(session)}") from error

    def finish(self, session: Session) -> None:
        with session.paused("checkpoint"):
            session.saved.wait()
