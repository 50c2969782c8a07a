"""Runner of a sweep: trains and evaluates what is missing of each run, with one line at each start and end."""

import pathlib
import signal
import subprocess
import time
from collections import deque
from dataclasses import dataclass, field

from mtp_jax.evaluation.decode_tasks import OWN_FLAGS
from mtp_jax.lease import Lease
from mtp_jax.mtp import kind_of
from mtp_jax.tools.sweeping import children, run_folder
from mtp_jax.tools.sweeping.grid import SweepRun
from mtp_jax.training.metrics import clock

DRAFTING = ("speculative", "advice")  # tasks of eval.py that require a model with extra depths
POLL_SECONDS = 0.2
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class RunsFailed(RuntimeError):
    """Raised if some runs failed; the others are done. Exit code 1."""


class Stopped(RuntimeError):
    """Raised if a signal stopped the sweep, after its runs have ended. Exit code 1."""


@dataclass(frozen=True)
class Commands:
    """Commands of each run, and the record of those that are done."""

    config_file: str
    root: pathlib.Path
    tasks: list[str]
    eval_flags: list[str]

    def folder(self, run: SweepRun) -> pathlib.Path:
        return self.root / run.name

    def evaluation(self, run: SweepRun) -> list[str]:
        """Returns the flags of eval.py; empty if there is nothing to measure."""
        tasks = [task for task in self.tasks if kind_of(run.config).max_drafts != 0 or task not in DRAFTING]
        flags = self.eval_flags
        if not any(task in DRAFTING for task in tasks):
            # eval.py refuses these flags without a drafting task
            theirs = OWN_FLAGS if "--speculative" in flags else (*OWN_FLAGS, "num_speculative_tokens")
            flags = [flag for flag in flags if flag.removeprefix("--").partition("=")[0] not in theirs]
        return [f"--tasks={','.join(tasks)}", *flags] if tasks else []

    def is_trained(self, run: SweepRun) -> bool:
        """Returns whether train.py completed the config's last step."""
        return run_folder.read_record(self.folder(run)).get("trained") == run.config.training.num_steps

    def is_complete(self, run: SweepRun) -> bool:
        """Returns whether the run is trained, and evaluated with the current flags."""
        wanted, path = self.evaluation(run), self.folder(run)
        evaluated = run_folder.read_record(path).get("evaluated") == wanted and (path / run_folder.EVAL_FILE).is_file()
        return self.is_trained(run) and (evaluated or not wanted)

    def line(self, script: str, run: SweepRun) -> list[str]:
        """Returns the command line of a script for this run."""
        workdir = f"--workdir={self.folder(run)}"
        if script == "train.py":
            return children.command(script, [f"--config={self.config_file}", workdir, *run.overrides])
        output = f"--output={self.folder(run) / run_folder.EVAL_FILE}"
        return children.command(script, [workdir, *self.evaluation(run), output])


@dataclass
class Task:
    """A run in progress: its command, start time and cores."""

    run: SweepRun
    number: int
    lease: Lease
    cores: frozenset[int] | None
    script: str
    process: subprocess.Popen
    log_start: int
    began: float = field(default_factory=time.monotonic)
    num_told: int = 0  # signals passed on to its process


class Runner:
    """Runner of the commands, all in the thread that calls `run`: Linux ends a child with the *thread* that started
    it."""

    def __init__(self, commands: Commands, runs: list[SweepRun], cores: list[frozenset[int] | None]):
        self.commands = commands
        self.waiting = deque(enumerate(runs, 1))
        self.num_runs = len(runs)
        self.free_cores = list(cores)
        self.active: list[Task] = []
        self.failed: list[SweepRun] = []
        self.told_of: set[str] = set()  # runs already reported as locked by another sweep
        self.num_done = self.num_before = self.num_signals = 0

    def run(self) -> None:
        """Runs the missing commands of every run.

        Raises:
          RunsFailed: some runs failed.
          Stopped: a signal arrived.
        """
        previous = {number: signal.getsignal(number) for number in STOP_SIGNALS}
        for number, handler in previous.items():
            if handler is not signal.SIG_IGN:  # ignored under nohup or a shell's &
                signal.signal(number, self._count_signal)
        try:
            while self.active or (self.waiting and not self.num_signals):
                self._start_some()
                time.sleep(POLL_SECONDS)
                for task in list(self.active):
                    self._handle(task)
        finally:
            for task in self.active:  # after an exception in this loop
                children.kill(task.process)
            for number, handler in previous.items():
                signal.signal(number, handler)
        self._conclude()

    def _count_signal(self, *_) -> None:
        self.num_signals += 1

    def _start_some(self) -> None:
        """Starts runs while cores are free; runs that another sweep has locked go to the end of the queue."""
        for _ in range(len(self.waiting)):
            if not self.free_cores or self.num_signals:
                return
            number, run = self.waiting.popleft()
            lease = run_folder.try_lock(self.commands.folder(run))
            if lease is None:
                self.waiting.append((number, run))
                if run.name not in self.told_of:
                    self._say(number, run, "another sweep is at it; waiting for its end")
                self.told_of.add(run.name)
            elif self.commands.is_complete(run):
                lease.release()
                self.num_before += 1
                self._say(number, run, "was done before")
            else:
                self._begin(number, run, lease)

    def _begin(self, number: int, run: SweepRun, lease: Lease) -> None:
        path, script = self.commands.folder(run), "eval.py"
        record = {k: v for k, v in run_folder.read_record(path).items() if k not in ("error", "evaluated")}
        if not self.commands.is_trained(run):
            script = "train.py"
            record.pop("trained", None)
        (path / run_folder.EVAL_FILE).unlink(missing_ok=True)  # it is of fewer steps, or of other tasks
        run_folder.write_record(path, record)
        self._say(number, run, f"{script} started")
        cores = self.free_cores.pop(0)
        process, log_start = self._start(script, run, cores, lease)
        self.active.append(Task(run, number, lease, cores, script, process, log_start))

    def _start(
        self, script: str, run: SweepRun, cores: frozenset[int] | None, lease: Lease
    ) -> tuple[subprocess.Popen, int]:
        """Returns (process, offset of its output in its log)."""
        line, log = self.commands.line(script, run), self.commands.folder(run) / run_folder.LOGS[script]
        log_start = run_folder.start_of_log(log, line)
        return children.start(line, log, cores, lease.descriptor), log_start

    def _handle(self, task: Task) -> None:
        """Passes signals on to a running command; after it has ended, starts the next one or closes the run."""
        code = task.process.poll()
        if code is None:
            self._pass_signals_on(task)
            return
        children.kill(task.process)  # ends processes that the command has left running
        if code == 0:
            self._record_success(task)
            next_one = self.commands.evaluation(task.run) and task.script == "train.py"
            if next_one and not self.num_signals:
                task.script = "eval.py"
                task.process, task.log_start = self._start(task.script, task.run, task.cores, task.lease)
                return
            if not next_one:
                self.num_done += 1
                self._say(task.number, task.run, f"done in {clock(time.monotonic() - task.began)}")
        elif self.num_signals:
            self._say(task.number, task.run, f"{task.script} stopped")
        else:
            self._record_failure(task, code)
        self.active.remove(task)
        self.free_cores.append(task.cores)
        task.lease.release()

    def _pass_signals_on(self, task: Task) -> None:
        """Passes signals on: the first lets the command save its state and end, the second kills it."""
        if task.num_told == 0 and self.num_signals:
            task.process.terminate()
        elif task.num_told == 1 and self.num_signals > 1:
            children.kill(task.process)
        task.num_told = min(self.num_signals, 2)

    def _record_success(self, task: Task) -> None:
        path = self.commands.folder(task.run)
        done: dict[str, object] = {"trained": task.run.config.training.num_steps}
        if task.script == "eval.py":
            done = {"evaluated": self.commands.evaluation(task.run)}
        run_folder.write_record(path, run_folder.read_record(path) | done)

    def _record_failure(self, task: Task, code: int) -> None:
        path = self.commands.folder(task.run)
        log = path / run_folder.LOGS[task.script]
        error = f"{children.how_it_ended(code)}{run_folder.last_line(log, task.log_start)}"
        run_folder.write_record(path, run_folder.read_record(path) | {"error": f"{task.script}: {error}"})
        self.failed.append(task.run)
        after = clock(time.monotonic() - task.began)
        self._say(task.number, task.run, f"{task.script} failed after {after}: {error} ({log})")

    def _say(self, number: int, run: SweepRun, text: str) -> None:
        print(f"[{number}/{self.num_runs}] {run.name}: {text}", flush=True)

    def _conclude(self) -> None:
        """Prints the closing lines.

        Raises:
          RunsFailed, Stopped: see `run`.
        """
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
