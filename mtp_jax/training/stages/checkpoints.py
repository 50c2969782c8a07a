"""Checkpoints every checkpoint.every steps, after the last step, and before a requested stop."""

from mtp_jax.training.stages.stage import Session, Stage


class SaveCheckpoints(Stage):
    """Saves the state; the metrics up to it are checked before, so that a state that is not finite is never saved."""

    def after_step(self, session: Session) -> None:
        if session.step % session.config.checkpoint.every == 0 or session.is_last or session.is_stopped:
            session.fetch()
            with session.paused("checkpoint"):
                session.saved.save(session.step, session.state)

    def finish(self, session: Session) -> None:
        with session.paused("checkpoint"):
            session.saved.wait()
