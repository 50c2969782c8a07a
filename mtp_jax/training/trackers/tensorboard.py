"""TensorBoard's event files, in the workdir."""

from collections.abc import Mapping

from mtp_jax.training.trackers.tracker import Opening, Tracker


class TensorBoard(Tracker):
    """Writes a scalar per metric, NaN and infinite ones too."""

    def __init__(self, opening: Opening):
        from tensorboardX import SummaryWriter

        # purge_step hides what an earlier attempt logged from there on
        purge_step = None if opening.resume_step is None else opening.resume_step + 1
        self._events = SummaryWriter(str(opening.workdir), purge_step=purge_step)

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        for name, value in metrics.items():
            if value is not None:
                self._events.add_scalar(name, value, step)

    def close(self) -> None:
        self._events.close()
