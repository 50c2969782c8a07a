"""The stages of the training loop, one file each; docs/extending.md describes how to add one."""

from mtp_jax.training.stages.checkpoints import SaveCheckpoints
from mtp_jax.training.stages.goodput import ReportGoodput
from mtp_jax.training.stages.log import LogMetrics
from mtp_jax.training.stages.nonfinite import NonFiniteLoss, StopAtNonFinite
from mtp_jax.training.stages.profile import Profile
from mtp_jax.training.stages.spikes import ReportSpikes
from mtp_jax.training.stages.stage import Session, Stage
from mtp_jax.training.stages.stop import Preempted, StopAtSignal
from mtp_jax.training.stages.validate import Validate
from mtp_jax.training.stages.watch import EndStalledRun

# In the order of their hooks: a stage may use what an earlier one has added to `Session.values` or to the metrics.
STAGES: tuple[type[Stage], ...] = (
    StopAtSignal,  # the first, so the last to finish: it raises
    ReportGoodput,
    EndStalledRun,
    Profile,
    StopAtNonFinite,
    ReportSpikes,
    Validate,
    LogMetrics,
    SaveCheckpoints,
)
