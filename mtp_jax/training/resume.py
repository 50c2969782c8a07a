"""Continuation of a run in its workdir: the step, the settings that change, or a start from the beginning.

| the workdir has                                        | default               | --resume_step=N | --resume_step=0 |
|--------------------------------------------------------|-----------------------|-----------------|-----------------|
| nothing                                                | a new run             | refused         | a new run       |
| a config, no checkpoint, metrics from before the first | a new run, new config | refused         | a new run       |
| a config, no checkpoint, metrics from beyond the first | refused               | refused         | a new run       |
| checkpoints                                            | newest valid one      | that of step N  | a new run       |

A new run in a workdir with checkpoints keeps them in checkpoints.superseded.
"""

from dataclasses import dataclass

from etils import epath

from mtp_jax import storage
from mtp_jax.config import Config, UserError, walk
from mtp_jax.training import schedules
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.metrics import METRICS_FILE, read_metrics
from mtp_jax.training.notices import notice
from mtp_jax.training.workdir import CHECKPOINTS, CONFIG_FILE, read_config

# relative difference of the learning rate at the step of a resume, beyond which the schedule counts as another one
LEARNING_RATE_TOLERANCE = 0.01


@dataclass(frozen=True)
class Resume:
    """A requested continuation.

    Attributes:
      step: the checkpoint to continue from; None: the newest valid one, or a new run; 0: a new run.
      changes: keys of the config that may differ from those of the run so far, beyond those that always may.
    """

    step: int | None = None
    changes: tuple[str, ...] = ()


def check(resume: Resume, config: Config) -> None:
    """Rejects steps and keys that no run has.

    Raises:
      UserError: names the flag and the remedy.
    """
    if resume.step is not None and not 0 <= resume.step <= config.training.num_steps:
        raise UserError(
            f"--resume_step={resume.step}: must lie between 0 and training.num_steps={config.training.num_steps}"
        )
    allowed = {key for key, _, setting in walk(config) if setting.may_change in ("by_name", "resume")}
    by_name = [key for key, _, setting in walk(config) if setting.may_change == "by_name"]
    for key in resume.changes:
        if key not in allowed:
            raise UserError(f"--change={key}: cannot change in a run; by name may change {', '.join(by_name)}")


def is_new(resume: Resume, workdir: epath.Path) -> bool:
    """Returns whether the run starts from its beginning, in a workdir in which it may.

    Raises:
      UserError: the checkpoints are gone, or have no step `resume.step`.
    """
    steps = Checkpoints(workdir / CHECKPOINTS).steps()
    if resume.step == 0:
        return True
    if resume.step is not None and resume.step not in steps:
        found = f"it has {', '.join(map(str, steps))}" if steps else "it has none"
        raise UserError(f"--resume_step={resume.step}: no checkpoint of this step in {workdir}; {found}")
    if not steps and storage.is_file(workdir / CONFIG_FILE):
        _check_gone(workdir)
    return not steps


def _check_gone(workdir: epath.Path) -> None:
    """Raises UserError if the run in `workdir` has saved checkpoints, of which nothing is left."""
    path = workdir / METRICS_FILE
    rows = read_metrics(path) if storage.is_file(path) else []
    newest = rows[-1]["step"] if rows else 0
    config = read_config(workdir)
    # A save may end as late as the next one begins, so a run that was killed has one from two intervals on. The last
    # save creates the folder.
    is_complete = newest >= config.training.num_steps
    if newest > 2 * config.checkpoint.every or (is_complete and not storage.is_dir(workdir / CHECKPOINTS)):
        raise UserError(
            f"--workdir={workdir}: its {METRICS_FILE} goes to step {newest} and {CHECKPOINTS}/ has no checkpoint; "
            "restore them, use another folder, or start over in this one with --resume_step=0"
        )
    if newest:
        notice(f"{workdir} has metrics up to step {newest} and no checkpoint; the run starts over")


def set_aside(workdir: epath.Path) -> str | None:
    """Renames the folder of checkpoints of a run that starts over; returns its new name, or None if there are none."""
    folder = workdir / CHECKPOINTS
    if not Checkpoints(folder).steps():
        return None
    target, number = workdir / f"{CHECKPOINTS}.superseded", 0
    while storage.exists(target):
        number += 1
        target = workdir / f"{CHECKPOINTS}.superseded.{number}"
    with storage.errors(folder):
        folder.rename(target)
    return str(target)


def bent_schedule(old: Config, new: Config, step: int) -> str | None:
    """Returns a line if another length of the run changes the learning rate at `step`; None if it does not.

    A change of the schedule that was asked for by name changes the rate too, and is no surprise.
    """
    if old.training.num_steps == new.training.num_steps or old.optimizer != new.optimizer or not step:
        return None
    was, now = (float(schedules.learning_rate(c.optimizer, c.training.num_steps)(step - 1)) for c in (old, new))
    if abs(now - was) <= LEARNING_RATE_TOLERANCE * max(abs(was), abs(now)):
        return None
    return (
        f"training.num_steps {old.training.num_steps} -> {new.training.num_steps} bends the schedule "
        f"(optimizer.schedule={new.optimizer.schedule}): the learning rate at step {step} was {was:.3g} and is "
        f"{now:.3g} in the new one; to choose it, set optimizer.learning_rate and optimizer.schedule and name both "
        "with --change"
    )
