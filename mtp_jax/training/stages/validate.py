"""Held-out validation every training.eval_every steps."""

from mtp_jax.training.stages.stage import Session, Stage
from mtp_jax.training.validation import as_metrics, validate


class Validate(Stage):
    """Evaluates the current weights on training.eval_batches held-out batches; the results are part of the step's line.

    Nothing of the training depends on it: the state is only read, and the batches of the training have their own
    position.
    """

    def after_step(self, session: Session) -> None:
        every = session.config.training.eval_every
        if not every or session.step % every:
            return
        session.fetch()  # steps still running must not count as validation
        with session.paused("validation"):
            results = validate(session.run, session.state, session.config.training.eval_batches)
            for name, depths in results.items():
                session.values |= as_metrics(depths, name)
