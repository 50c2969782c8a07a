"""The commands a sweep runs, each a process of its own that cannot outlive the sweep."""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Sequence

from mtp_jax.config import UserError

ROOT = pathlib.Path(__file__).parents[3]  # of the project: train.py and eval.py lie beside the package
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class CheckFailed(RuntimeError):
    """What has to be known before the first run could not be found out. Exit code 1."""


def command(script: str, arguments: Sequence[str]) -> list[str]:
    """The command line of train.py or eval.py."""
    return [sys.executable, str(ROOT / script), *arguments]


def check_scripts() -> None:
    """Raises:
    UserError: the package was installed without the scripts beside it.
    """
    missing = [script for script in ("train.py", "eval.py") if not (ROOT / script).is_file()]
    if missing:
        raise UserError(
            f"{ROOT / missing[0]}: no such file; a sweep runs train.py and eval.py of the project: clone it, and call "
            "python -m mtp_jax.tools.sweep from its folder"
        )


def devices() -> tuple[str, int]:
    """(platform, number of devices) that a run will find. Asked by a process of its own: an accelerator that this one
    has opened, no child could."""
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckFailed(f"jax finds no devices: {_last(done.stderr)}")
    platform, count = done.stdout.split()[-2:]
    return platform, int(count)


def check_evaluation(arguments: Sequence[str], workdir: pathlib.Path) -> None:
    """Let eval.py look at its arguments, before hours are spent on what it cannot measure.

    Raises:
      UserError: as eval.py says it.
    """
    checked = command("eval.py", [f"--workdir={workdir}", *arguments, "--check_only"])
    done = subprocess.run(checked, capture_output=True, text=True, check=False)
    if done.returncode == 2:
        raise UserError(f"{_last(done.stderr).removeprefix('error: ')} (from eval.py)")
    if done.returncode:
        raise CheckFailed(f"eval.py cannot check its arguments: {_last(done.stderr)}")


def shares_of_cores(num_jobs: int) -> list[frozenset[int] | None]:
    """The cores of each of the runs that go at a time; None: all there are.

    Raises:
      UserError: fewer cores than jobs, or a system that cannot keep a process to its cores.
    """
    if num_jobs == 1:
        return [None]
    if not hasattr(os, "sched_getaffinity"):
        raise UserError(f"--jobs={num_jobs}: this system cannot keep a process to its share of the cores; use --jobs=1")
    cores = sorted(os.sched_getaffinity(0))
    if num_jobs > len(cores):
        raise UserError(f"--jobs={num_jobs}: more than the {len(cores)} cores there are; use at most {len(cores)}")
    bounds = [len(cores) * i // num_jobs for i in range(num_jobs + 1)]
    return [frozenset(cores[low:high]) for low, high in zip(bounds, bounds[1:], strict=False)]


def start(arguments: list[str], log: pathlib.Path, cores: frozenset[int] | None, lock: int) -> subprocess.Popen:
    """Start a command whose output goes to the end of `log`, on `cores`, holding `lock` as long as it lives.

    Its session is its own: Ctrl-C reaches the sweep alone, which then asks its children once to end.
    """
    parent = os.getpid()

    def before_exec() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # a sweep that is killed leaves no run behind
            if os.getppid() != parent:  # it was killed just now
                os._exit(1)
        if cores is not None:
            os.sched_setaffinity(0, cores)

    with log.open("ab") as output:
        return subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            pass_fds=[lock],
            preexec_fn=before_exec,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )


def kill(process: subprocess.Popen) -> None:
    """End a command and what it started, at once."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def how_it_ended(code: int) -> str:
    """Of a process that left with `code`, what its output may not say."""
    return f"killed by {signal.Signals(-code).name}: " if code < 0 else ""


def _last(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1]
