"""Works off the runs of a sweep: what is missing of each, some at a time, one line each when it starts and ends."""

import os
import pathlib
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field

from mtp_jax.evaluation.decode_tasks import OWN_FLAGS
from mtp_jax.mtp import kind_of
from mtp_jax.tools.sweeping import children, run_folder
from mtp_jax.tools.sweeping.grid import Planned
from mtp_jax.training.metrics import clock

DRAFTING = ("speculative", "advice")  # tasks of eval.py that a model without extra depths cannot do
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunsFailed(RuntimeError):
    """Some runs failed; the others are done. Exit code 1."""


class Stopped(RuntimeError):
    """The sweep was told to end, and its runs have ended. Exit code 1."""


@dataclass(frozen=True)
class Commands:
    """What has to be called for a run, and whether it was."""

    config_file: str
    root: pathlib.Path
    tasks: list[str]
    eval_flags: list[str]

    def folder(self, run: Planned) -> pathlib.Path:
        return self.root / run.name

    def evaluation(self, run: Planned) -> list[str]:
        """The flags of eval.py; none where there is nothing to measure."""
        tasks = [task for task in self.tasks if kind_of(run.config).max_drafts != 0 or task not in DRAFTING]
        flags = self.eval_flags
        if not any(task in DRAFTING for task in tasks):
            # which eval.py refuses without them
            theirs = OWN_FLAGS if "--speculative" in flags else (*OWN_FLAGS, "num_speculative_tokens")
            flags = [flag for flag in flags if flag.removeprefix("--").partition("=")[0] not in theirs]
        return [f"--tasks={','.join(tasks)}", *flags] if tasks else []

    def is_trained(self, run: Planned) -> bool:
        """Whether train.py ended well after the config's last step."""
        return run_folder.read_record(self.folder(run)).get("trained") == run.config.training.num_steps

    def is_complete(self, run: Planned) -> bool:
        """Whether the run is trained, and what was trained is evaluated as asked for now."""
        wanted, path = self.evaluation(run), self.folder(run)
        evaluated = run_folder.read_record(path).get("evaluated") == wanted and (path / run_folder.EVAL_FILE).is_file()
        return self.is_trained(run) and (evaluated or not wanted)

    def line(self, script: str, run: Planned) -> list[str]:
        """The command line of a script for this run."""
        workdir = f"--workdir={self.folder(run)}"
        if script == "train.py":
            return children.command(script, [f"--config={self.config_file}", workdir, *run.overrides])
        output = f"--output={self.folder(run) / run_folder.EVAL_FILE}"
        return children.command(script, [workdir, *self.evaluation(run), output])


@dataclass
class Task:
    """A run that is being worked on: by which command, since when, on which cores."""

    run: Planned
    number: int
    lock: int
    cores: frozenset[int] | None
    script: str
    process: subprocess.Popen
    log_start: int
    began: float = field(default_factory=time.monotonic)
    num_told: int = 0  # how often it was told to end


class Runner:
    """Everything happens in the thread that calls `run`: Linux ends a child with the *thread* that started it."""

    def __init__(self, commands: Commands, runs: list[Planned], cores: list[frozenset[int] | None]):
        self.commands = commands
        self.waiting = deque(enumerate(runs, 1))
        self.num_runs = len(runs)
        self.free_cores = list(cores)
        self.active: list[Task] = []
        self.failed: list[Planned] = []
        self.told_of: set[str] = set()  # runs of which it was said that another sweep is at them
        self.num_done = self.num_before = self.num_signals = 0

    def run(self) -> None:
        """Do what is missing of every run.

        Raises:
          RunsFailed: some failed.
          Stopped: a signal came.
        """
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:  # as nohup, or a shell's &, has it
                signal.signal(number, self._count_signal)
        try:
            while self.active or (self.waiting and not self.num_signals):
                self._start_some()
                time.sleep(POLL_SECONDS)
                for task in list(self.active):
                    self._look_at(task)
        finally:
            for task in self.active:  # after a fault of our own
                children.kill(task.process)
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._conclude()

    def _count_signal(self, *_) -> None:
        self.num_signals += 1

    def _start_some(self) -> None:
        """Start runs while there are cores; those that another sweep is at go to the end of the line."""
        for _ in range(len(self.waiting)):
            if not self.free_cores or self.num_signals:
                return
            number, run = self.waiting.popleft()
            lock = run_folder.try_lock(self.commands.folder(run))
            if lock is None:
                self.waiting.append((number, run))
                if run.name not in self.told_of:
                    self._say(number, run, "another sweep is at it; waiting for its end")
                self.told_of.add(run.name)
            elif self.commands.is_complete(run):
                os.close(lock)
                self.num_before += 1
                self._say(number, run, "was done before")
            else:
                self._begin(number, run, lock)

    def _begin(self, number: int, run: Planned, lock: int) -> None:
        path, script = self.commands.folder(run), "eval.py"
        record = {k: v for k, v in run_folder.read_record(path).items() if k not in ("error", "evaluated")}
        if not self.commands.is_trained(run):
            script = "train.py"
            record.pop("trained", None)
        (path / run_folder.EVAL_FILE).unlink(missing_ok=True)  # of fewer steps, or other tasks
        run_folder.write_record(path, record)
        self._say(number, run, f"{script} started")
        cores = self.free_cores.pop(0)
        process, log_start = self._start(script, run, cores, lock)
        self.active.append(Task(run, number, lock, cores, script, process, log_start))

    def _start(
        self, script: str, run: Planned, cores: frozenset[int] | None, lock: int
    ) -> tuple[subprocess.Popen, int]:
        """(process, where its output begins in its log)."""
        line, log = self.commands.line(script, run), self.commands.folder(run) / run_folder.LOGS[script]
        log_start = run_folder.start_of_log(log, line)
        return children.start(line, log, cores, lock), log_start

    def _look_at(self, task: Task) -> None:
        """Go on with a run whose command has ended; tell it to end where the sweep has been told."""
        code = task.process.poll()
        if code is None:
            self._tell(task)
            return
        children.kill(task.process)  # what the command may have left of its own
        if code == 0:
            self._note_done(task)
            next_one = self.commands.evaluation(task.run) and task.script == "train.py"
            if next_one and not self.num_signals:
                task.script = "eval.py"
                task.process, task.log_start = self._start(task.script, task.run, task.cores, task.lock)
                return
            if not next_one:
                self.num_done += 1
                self._say(task.number, task.run, f"done in {clock(time.monotonic() - task.began)}")
        elif self.num_signals:
            self._say(task.number, task.run, f"{task.script} stopped")
        else:
            self._note_failure(task, code)
        self.active.remove(task)
        self.free_cores.append(task.cores)
        os.close(task.lock)

    def _tell(self, task: Task) -> None:
        """Once: to save its state and end. Twice: to end."""
        if task.num_told == 0 and self.num_signals:
            task.process.terminate()
        elif task.num_told == 1 and self.num_signals > 1:
            children.kill(task.process)
        task.num_told = min(self.num_signals, 2)

    def _note_done(self, task: Task) -> None:
        path = self.commands.folder(task.run)
        done: dict[str, object] = {"trained": task.run.config.training.num_steps}
        if task.script == "eval.py":
            done = {"evaluated": self.commands.evaluation(task.run)}
        run_folder.write_record(path, run_folder.read_record(path) | done)

    def _note_failure(self, task: Task, code: int) -> None:
        path = self.commands.folder(task.run)
        log = path / run_folder.LOGS[task.script]
        error = f"{children.how_it_ended(code)}{run_folder.last_line(log, task.log_start)}"
        run_folder.write_record(path, run_folder.read_record(path) | {"error": f"{task.script}: {error}"})
        self.failed.append(task.run)
        after = clock(time.monotonic() - task.began)
        self._say(task.number, task.run, f"{task.script} failed after {after}: {error} ({log})")

    def _say(self, number: int, run: Planned, text: str) -> None:
        print(f"[{number}/{self.num_runs}] {run.name}: {text}", flush=True)

    def _conclude(self) -> None:
        """The closing line."""
        before = f" ({self.num_before} before)" if self.num_before else ""
        left = self.num_runs - self.num_done - self.num_before - len(self.failed)
        counts = [f"{self.num_done + self.num_before} done{before}", f"{len(self.failed)} failed", f"{left} left"]
        shown = ", ".join(text for text in counts if not text.startswith("0 ")) or "nothing to do"
        print(f"{self.num_runs} run{'s' if self.num_runs != 1 else ''}: {shown}")
        print(f"tables and curves: python -m mtp_jax.tools.report --sweep={self.commands.root}", flush=True)
        if self.num_signals:
            raise Stopped("stopped by a signal; the same command goes on where the runs were")
        if self.failed:
            names = ", ".join(run.name for run in self.failed)
            raise RunsFailed(
                f"{len(self.failed)} of {self.num_runs} runs failed: {names}; the same command tries them again"
            )
