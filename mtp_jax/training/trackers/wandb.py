"""Weights & Biases (`pip install mtp_jax[wandb]`), online or offline as its environment variables choose.

WANDB_MODE=offline writes WORKDIR/wandb for a later `wandb sync`; WANDB_PROJECT and the others are wandb's own.
"""

import hashlib
from collections.abc import Mapping

from mtp_jax import storage
from mtp_jax.config import to_dict
from mtp_jax.training.trackers.tracker import Opening, Tracker


class WeightsAndBiases(Tracker):
    """Logs to one run of Weights & Biases per workdir, which a resumed run continues."""

    def __init__(self, opening: Opening):
        import wandb

        workdir = storage.path(opening.workdir)
        self._run = wandb.init(
            dir=str(workdir) if storage.is_local(workdir) else None,  # its own files are local
            name=workdir.name,
            id=hashlib.sha256(str(workdir).encode()).hexdigest()[:16],
            resume="allow",
            config=to_dict(opening.config),
        )

    def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
        self._run.log({name: value for name, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        self._run.finish()
