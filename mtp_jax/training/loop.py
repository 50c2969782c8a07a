"""The training loop, in order of execution: data, mesh, state, steps. What happens beside the steps is in `stages`."""

import os
import pathlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

import jax
from etils import epath
from jax.experimental import multihost_utils

from mtp_jax import storage
from mtp_jax.config import Config, UserError
from mtp_jax.model import Tree, count_parameters
from mtp_jax.mtp import kind_of
from mtp_jax.training import resume as resumes
from mtp_jax.training import trackers
from mtp_jax.training import workdir as workdirs
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.clock import Clock
from mtp_jax.training.init_from import check_source, copy_sides, load_from
from mtp_jax.training.notices import notice
from mtp_jax.training.resume import Resume
from mtp_jax.training.run import Run, global_batches, set_up
from mtp_jax.training.stages import STAGES, NonFiniteLoss, Preempted, Session, Stage
from mtp_jax.training.step import Batch

__all__ = ["NonFiniteLoss", "Preempted", "Resume", "process_start", "train"]


def train(config: Config, workdir: str, resume: Resume | None = None, started: float | None = None) -> Run:
    """Trains `config` in `workdir`, from its newest checkpoint if it has one.

    Args:
      config: the run.
      workdir: its folder.
      resume: the checkpoint and the settings to continue with; None: the newest checkpoint and the settings so far.
      started: start of the process in the seconds of time.time(), for the time until the first step; None: now.

    Raises:
      UserError: a config, data or workdir that cannot be used; nothing was written.
      CheckpointError, NonFiniteLoss, Preempted: the run failed or was stopped.
    """
    clock, resume, folder = Clock(started), resume or Resume(), storage.path(workdir, "--workdir")
    resumes.check(resume, config)
    trackers.check(config.training.trackers)
    run = set_up(config)
    is_main = jax.process_index() == 0
    with workdirs.hold(workdir, is_main) as lease:  # from the first look: another run may be about to save
        is_new = resumes.is_new(resume, folder)
        step = 0 if is_new else _check_start(run, folder, resume)
        if not is_new and storage.is_file(folder / workdirs.CONFIG_FILE) and is_main:
            bent = resumes.bent_schedule(workdirs.read_config(folder), run.config, step)
            if bent:
                notice(bent)
        if is_new and run.config.init_from:
            check_source(run.config.init_from, run.trainer.abstract_state)
        multihost_utils.sync_global_devices("every process has looked, and one writes from here on")
        workdirs.open_workdir(workdir, run.config, is_main, is_new=is_new, by_name=resume.changes, step=step)
        workdirs.check_data(workdir, run.corpus, is_main, is_new)
        if is_new and is_main and (aside := resumes.set_aside(folder)):
            print(f"the checkpoints of the earlier run are now in {aside}", flush=True)
        if is_main:
            if config.init_from:
                copy_sides(config.init_from, workdir)
            _announce(run)
        with jax.set_mesh(run.mesh), Checkpoints(folder / workdirs.CHECKPOINTS, config.checkpoint) as saved:
            step, state = _initial_state(run) if is_new else _restored_state(run, saved, resume.step)
            session = Session(run, folder, saved, clock, step, state, lease=lease)
            return replace(run, state=run_steps(session, [make() for make in STAGES]))


def run_steps(session: Session, stages: Sequence[Stage]) -> Tree:
    """Runs the steps up to training.num_steps, or until a stage stops them, and returns the state.

    Between two log points the host waits for no step but an earlier one (`sharding.MAX_PROGRAMS_AHEAD`).
    """
    session.stages, run, clock = stages, session.run, session.clock
    batches = global_batches(run, "train", session.step)
    try:
        for stage in stages:
            stage.start(session)
        while session.step < run.config.training.num_steps and not session.is_stopped:
            for stage in stages:
                stage.before_step(session)
            batch = _next_batch(batches, session)
            with clock.counting("step"), jax.profiler.StepTraceAnnotation("train", step_num=session.step + 1):
                state, metrics = run.trainer.step(session.state, batch)
            session.advance(state, metrics)
            for stage in stages:
                stage.after_step(session)
        for stage in reversed(stages):
            stage.finish(session)
    finally:
        for stage in reversed(stages):
            stage.close()
        batches.close()
    return session.state


def _next_batch(batches: Iterator[Batch], session: Session) -> Batch:
    """Returns the next batch. The wait is not counted as data where the device was still computing the steps before."""
    before = session.clock.seconds["data"]
    with session.clock.counting("data"):
        batch = next(batches)
    if session.metrics and not cast(Any, session.metrics["loss"]).is_ready():
        session.clock.move(session.clock.seconds["data"] - before, "data", "step")
    return batch


def _check_start(run: Run, workdir: epath.Path, resume: Resume) -> int:
    """Returns the step to continue from; rejects weights without a training state, and fewer steps than are done."""
    saved, num_steps = Checkpoints(workdir / workdirs.CHECKPOINTS), run.config.training.num_steps
    workdirs.check_has_config(workdir)
    step = saved.steps()[-1] if resume.step is None else resume.step
    parts = saved.saved_part(("params", "opt_state"))
    if parts and parts["params"] and not parts["opt_state"]:
        raise UserError(
            f"--workdir={workdir}: holds imported weights and no training state; start a run in another folder with "
            f"--config.init_from={workdir}"
        )
    if step > num_steps:
        raise UserError(
            f"training.num_steps={num_steps}: the run in {workdir} is at step {step} already; "
            f"use at least {step}, an earlier step with --resume_step, or another --workdir"
        )
    return step


def _announce(run: Run) -> None:
    counts, kind = count_parameters(run.config.architecture), kind_of(run.config)
    axes = ", ".join(f"{n}={s}" for n, s in run.mesh.shape.items() if s > 1) or "1 device"
    tokens = run.corpus.num_tokens("train")
    extra = f" (+ {counts.mtp_total / 1e6:,.2f} M)" if counts.mtp_total else ""
    sizes = f"{counts.total / 1e6:,.2f} M parameters, {counts.active / 1e6:,.2f} M active"
    print(f"model    {sizes}; {kind.describe()}{extra}")
    data = run.config.data
    source = ", ".join(part.name for part in run.corpus.sources) if data.mixture else data.source
    print(f"data     {source}: {tokens / 1e6:,.1f} M training tokens, tokenizer {data.tokenizer}")
    print(f"mesh     {axes} ({jax.devices()[0].device_kind}, {jax.process_count()} process(es))", flush=True)


def _restored_state(run: Run, saved: Checkpoints, step: int | None) -> tuple[int, Tree]:
    """Returns (step, state) of a checkpoint; None: the newest valid one."""
    restored = saved.restore_latest(run.trainer.abstract_state, step)
    assert restored is not None, "there is a checkpoint"
    if jax.process_index() == 0:
        print(f"resumed  from step {restored[0]}", flush=True)
    return restored


def _initial_state(run: Run) -> tuple[int, Tree]:
    """Returns (0, state) with fresh weights, or with those of init_from."""
    state = run.trainer.init()
    if run.config.init_from:
        state, note = load_from(run.config.init_from, run.config, state, run.trainer.abstract_state)
        if jax.process_index() == 0:
            print(f"weights  {note}", flush=True)
    return 0, state


def process_start() -> float:
    """Returns the start time of this process, in the seconds of time.time()."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = next(line for line in pathlib.Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):  # no /proc: count from here
        return time.time()
