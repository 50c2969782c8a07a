"""The training loop, in order of execution: data, mesh, state, steps, checkpoints."""

import collections
import os
import pathlib
import signal
import time
from dataclasses import replace
from typing import Any

import jax

from mtp_jax.config import Config, UserError
from mtp_jax.model import Tree, count_parameters
from mtp_jax.mtp import kind_of
from mtp_jax.training import workdir as workdirs
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.flops import peak_flops, train_flops_per_token
from mtp_jax.training.init_from import check_source, copy_sides, load_from
from mtp_jax.training.metrics import MetricsWriter, Progress, check_finite, peak_memory_gib
from mtp_jax.training.run import Run, global_batches, set_up


class Preempted(RuntimeError):
    """The run received a signal to stop and has saved its state. Exit code 1: it is not finished."""


def train(config: Config, workdir: str) -> Run:
    """Trains `config` in `workdir`, from its newest checkpoint if it has one.

    Raises:
      UserError: a config, data or workdir that cannot be used; nothing was written.
      CheckpointError, NonFiniteLoss, Preempted: the run failed or was stopped.
    """
    started = _process_start()
    run = set_up(config)
    is_main = jax.process_index() == 0
    _check_start(run, workdir)
    workdirs.open_workdir(workdir, run.config, is_main)
    if is_main:
        if config.init_from:
            copy_sides(config.init_from, workdir)
        _announce(run)
    with jax.set_mesh(run.mesh), Checkpoints(pathlib.Path(workdir) / workdirs.CHECKPOINTS, config.checkpoint) as saved:
        first_step, state = _first_state(run, saved, is_main)
        run = replace(run, state=state)
        with MetricsWriter(workdir, first_step or None, is_main) as writer:
            return replace(run, state=_steps(run, first_step, saved, writer, started))


def _check_start(run: Run, workdir: str) -> None:
    """Rejects what would fail later: fewer steps than the run has done, initial weights that do not fit."""
    saved = Checkpoints(pathlib.Path(workdir) / workdirs.CHECKPOINTS)
    steps, num_steps = saved.steps(), run.config.training.num_steps
    parts = saved.saved_part(("params", "opt_state")) if steps else None
    if parts and parts["params"] and not parts["opt_state"]:
        raise UserError(
            f"--workdir={workdir}: holds imported weights and no training state; start a run in another folder with "
            f"--config.init_from={workdir}"
        )
    if steps and steps[-1] > num_steps:
        raise UserError(
            f"training.num_steps={num_steps}: the run in {workdir} is at step {steps[-1]} already; "
            f"use at least {steps[-1]}, or another --workdir"
        )
    if run.config.init_from and not steps:
        check_source(run.config.init_from, run.trainer.abstract_state)


def _announce(run: Run) -> None:
    counts, kind = count_parameters(run.config.architecture), kind_of(run.config)
    axes = ", ".join(f"{n}={s}" for n, s in run.mesh.shape.items() if s > 1) or "1 device"
    tokens = run.corpus.num_tokens("train")
    extra = f" (+ {counts.mtp_total / 1e6:,.2f} M)" if counts.mtp_total else ""
    sizes = f"{counts.total / 1e6:,.2f} M parameters, {counts.active / 1e6:,.2f} M active per token"
    print(f"model    {sizes}; {kind.describe()}{extra}")
    source, tokenizer = run.config.data.source, run.config.data.tokenizer
    print(f"data     {source}: {tokens / 1e6:,.1f} M training tokens, tokenizer {tokenizer}")
    print(f"mesh     {axes} ({jax.devices()[0].device_kind}, {jax.process_count()} process(es))", flush=True)


def _first_state(run: Run, saved: Checkpoints, is_main: bool) -> tuple[int, Tree]:
    """Returns (steps done, state) of the newest valid checkpoint, or with fresh weights, or with those of init_from."""
    restored = saved.restore_latest(run.trainer.abstract_state)
    if restored is not None:
        if is_main:
            print(f"resumed  from step {restored[0]}", flush=True)
        return restored
    state = run.trainer.init()
    if run.config.init_from:
        state, note = load_from(run.config.init_from, run.config, state, run.trainer.abstract_state)
        if is_main:
            print(f"weights  {note}", flush=True)
    return 0, state


def _steps(run: Run, first_step: int, saved: Checkpoints, writer: MetricsWriter, started: float) -> Tree:
    """Runs the steps. Between two log points the host does not wait for the device."""
    config, state = run.config, run.state
    num_steps, every = config.training.num_steps, config.training.log_every
    log = _Log(config, writer, first_step)
    stop = _StopSignal()
    batches = global_batches(run, "train", first_step)
    done = first_step
    try:
        for done in range(first_step + 1, num_steps + 1):
            state, metrics = run.trainer.step(state, next(batches))
            log.add(done, metrics)
            if done == first_step + 1:
                jax.block_until_ready(metrics)
                log.started(f"first step done {time.time() - started:.1f} s after the start, compilation included")
            is_last, stopped = done == num_steps, stop.reached(done)
            if done % every == 0 or is_last or stopped:
                log.write(on_grid=done % every == 0 or is_last)
            if done % config.checkpoint.every == 0 or is_last or stopped:
                log.check()  # a state that is not finite is never saved
                saved.save(done, state)
                log.pause_over()
            if stopped and not is_last:
                saved.wait()
                raise Preempted(f"stopped by a signal at step {done}, state saved; run the same command to go on")
    finally:
        stop.restore()
        batches.close()
    saved.wait()
    return state


MAX_STEPS_ON_DEVICE = 256  # steps whose metrics stay on the device between two log points


class _Log:
    """Metrics kept on the device until a log point, then checked, written and printed."""

    def __init__(self, config: Config, writer: MetricsWriter, first_step: int):
        self.config, self.writer = config, writer
        self.progress = Progress(config.training.num_steps)
        self.waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = collections.deque()
        self.newest: dict[str, float] = {}
        self.timed_step, self.timed_at, self.first_seconds = first_step, time.perf_counter(), 0.0
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None
        self.tokens_per_step = config.data.batch_size * config.data.sequence_length
        self.flops_per_token = train_flops_per_token(config)

    def started(self, note: str) -> None:
        """Restarts the clock after the first step, most of which is compilation."""
        self.first_seconds = time.perf_counter() - self.timed_at
        self.timed_step, self.timed_at = self.timed_step + 1, time.perf_counter()
        if jax.process_index() == 0:
            print(note, flush=True)

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        self.waiting.append((step, metrics))
        if len(self.waiting) > MAX_STEPS_ON_DEVICE:  # the older half is computed: fetching it does not wait
            self.check(len(self.waiting) // 2)

    def check(self, num: int | None = None) -> None:
        """Fetches the waiting metrics (the `num` oldest) and raises at the first loss that is not finite."""
        count = len(self.waiting) if num is None else num
        fetched = jax.device_get([self.waiting.popleft() for _ in range(count)])
        for step, metrics in fetched:
            self.newest = {name: float(value) for name, value in metrics.items()}
            self.newest_step = step
            check_finite(step, self.newest)

    def write(self, on_grid: bool) -> None:
        """Writes a line to metrics.jsonl and the terminal; off the grid (a stopped run) to the terminal only."""
        self.check()
        step, now = self.newest_step, time.perf_counter()
        seconds, steps = now - self.timed_at, step - self.timed_step
        if steps == 0:  # the first step is a log point, or a checkpoint was saved in between
            steps, seconds = 1, self.first_seconds
        rate = steps * self.tokens_per_step / seconds
        self.timed_step, self.timed_at = step, now
        record: dict[str, Any] = {"tokens": step * self.tokens_per_step} | self.newest
        record["tokens_per_second"] = rate
        record["mfu"] = rate * self.flops_per_token / self.peak if self.peak else None
        record["peak_memory_gib"] = peak_memory_gib(jax.local_devices())
        if on_grid:
            self.writer.write(step, record)
        if jax.process_index() == 0:
            print(self.progress.line(step, record), flush=True)

    def pause_over(self) -> None:
        """Restarts the clock at the step just checked, so that the checkpoint does not count as step time."""
        self.timed_step, self.timed_at = self.newest_step, time.perf_counter()


class _StopSignal:
    """SIGTERM and SIGINT request a checkpoint and the end of the run; a second one ends it at once."""

    def __init__(self) -> None:
        self.is_set = False
        self.previous: dict[int, Any] = {}
        # With several processes jax.distributed has its own handler, which agrees with the others on a step.
        numbers = (signal.SIGTERM, signal.SIGINT) if jax.process_count() == 1 else ()
        try:
            for number in numbers:
                self.previous[number] = signal.signal(number, self._set)
        except ValueError:  # not the main thread (a notebook's): signals stay as they are
            pass

    def _set(self, number: int, frame: Any) -> None:
        del frame
        self.is_set = True
        self._give_back(number)

    def _give_back(self, number: int) -> None:
        before = self.previous[number]
        signal.signal(number, signal.SIG_DFL if before is None else before)  # None: a handler not made in Python

    def reached(self, step: int) -> bool:
        """Returns whether to stop after this step; the same on every process."""
        if jax.process_count() == 1:
            return self.is_set
        from jax.experimental import multihost_utils

        return bool(multihost_utils.reached_preemption_sync_point(step))

    def restore(self) -> None:
        for number in self.previous:
            self._give_back(number)


def _process_start() -> float:
    """Returns the start time of this process, in the seconds of time.time()."""
    try:
        ticks = int(pathlib.Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
        boot = next(line for line in pathlib.Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
        return int(boot.split()[1]) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, StopIteration):  # no /proc: count from here
        return time.time()
