"""Commands of a sweep, each in a separate process that cannot outlive the sweep."""

import ctypes
import os
import pathlib
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Sequence

from mtp_jax.config import UserError

ROOT = pathlib.Path(__file__).parents[3]  # the folder that has the package: a clone, or site-packages
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


class CheckFailed(RuntimeError):
    """Raised if a check before the first run cannot be made. Exit code 1."""


def command(script: str, arguments: Sequence[str]) -> list[str]:
    """Returns the command line of train.py or eval.py, a module of mtp_jax.tools."""
    return [sys.executable, "-m", f"mtp_jax.tools.{script.removesuffix('.py')}", *arguments]


def environment() -> dict[str, str]:
    """Returns the environment of a command: it imports the package that runs here, not one of the current folder."""
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    if str(ROOT) != sysconfig.get_path("purelib"):
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return env


def devices() -> tuple[str, int]:
    """Returns (platform, number of devices) for a run, from a separate process: a child cannot open an accelerator that
    this process has opened.

    Raises:
      CheckFailed: jax finds no devices.
    """
    code = "import jax; print(jax.default_backend(), jax.device_count())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CheckFailed(f"jax finds no devices: {_last(done.stderr)}")
    platform, count = done.stdout.split()[-2:]
    return platform, int(count)


def check_evaluation(arguments: Sequence[str], workdir: pathlib.Path) -> None:
    """Lets eval.py check its arguments before the first run starts.

    Raises:
      UserError: eval.py refuses them; the message is its own.
      CheckFailed: eval.py fails for another reason.
    """
    checked = command("eval.py", [f"--workdir={workdir}", *arguments, "--check_only"])
    done = subprocess.run(checked, capture_output=True, text=True, check=False, env=environment())
    if done.returncode == 2:
        raise UserError(f"{_last(done.stderr).removeprefix('error: ')} (from eval.py)")
    if done.returncode:
        raise CheckFailed(f"eval.py cannot check its arguments: {_last(done.stderr)}")


def shares_of_cores(num_jobs: int) -> list[frozenset[int] | None]:
    """Returns the cores of each of the runs that run at the same time; None stands for all cores.

    Raises:
      UserError: there are fewer cores than jobs, or the system has no CPU affinity.
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


def start(arguments: list[str], log: pathlib.Path, cores: frozenset[int] | None, lease: int) -> subprocess.Popen:
    """Starts a command on `cores`, with its output appended to `log` and the descriptor `lease` open until it ends.

    It runs in a new session: Ctrl-C reaches only the sweep, which terminates its children once.
    """
    parent = os.getpid()

    def before_exec() -> None:
        if _LIBC is not None:
            _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # ends the run if the sweep is killed
            if os.getppid() != parent:  # the sweep was killed before prctl
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
            pass_fds=[lease],
            preexec_fn=before_exec,
            env={**environment(), "PYTHONUNBUFFERED": "1"},
        )


def kill(process: subprocess.Popen) -> None:
    """Kills a command and the processes that it started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def how_it_ended(code: int) -> str:
    """Returns "killed by NAME: " for the exit code of a process that a signal ended, else ""."""
    return f"killed by {signal.Signals(-code).name}: " if code < 0 else ""


def _last(text: str) -> str:
    return ([line.strip() for line in text.splitlines() if line.strip()] or ["no output"])[-1]
