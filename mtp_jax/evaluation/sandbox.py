"""Running programs that a model has written, locked in: no network, no files but an empty folder, no other process.

A program is a Python process of its own in new user, process, mount, network and IPC namespaces (`jail/`), behind a
filter of system calls and limits of time, memory, disk and output. Where a machine does not allow that, nothing is run.
It needs Linux 5.3 or newer on x86_64 or arm64, as root or as anybody, and no packages. Threads are refused where the
system does not count them (to the machine's root in a namespace without other users); before Linux 5.14 those of all an
ordinary user's processes are counted, so a program may get none. /tmp is the program's folder, unless this interpreter
or its packages lie below it: then it is read-only, and TMPDIR says where to write.

What a pass means: the last line of the check was reached, in the program's own interpreter. A program that looks for it
there can still pretend: by shadowing what the check calls, by values that equal everything, or by finding the runner's
token through frames or memory. So a benchmark's figure is as honest as the model is; the walls hold for any program.
"""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_jax.config import UserError

GRACE_SECONDS = 20.0  # beyond the program's own limit, for starting and ending on a busy machine
MACHINES = ("x86_64", "aarch64")
# Libraries outside the interpreter's own folders, and the time zones.
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store", "/usr/share/zoneinfo")
ENVIRONMENT = {
    "HOME": "/program",
    "TMPDIR": "/program",
    "PATH": "",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    # numpy's libraries start a thread a core otherwise, and the C library reserves 64 MiB for each
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
INTERPRETERS_OWN = ("LD_LIBRARY_PATH",)  # where modules of a cluster keep libpython
START = "import sys; sys.path.append({!r}); from jail.launcher import main; sys.path.pop(); main()"
REMEDY = (
    "programs of a model are run only behind walls: take a Linux machine that allows user namespaces (sysctl "
    "user.max_user_namespaces, kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; a "
    "container needs --security-opt seccomp=unconfined --security-opt apparmor=unconfined)"
)


@dataclass(frozen=True)
class Limits:
    """Of one program, its check included; each at least 1 (UserError).

    cpu_seconds is what ends a slow program, so that a busy machine fails nobody; wall_seconds ends one that sleeps.
    (The harness's own runner ends both after 3 s on the wall.)
    num_open_files includes four of its own; the disk is memory, beside memory_bytes; output_bytes: stdout and stderr.
    """

    wall_seconds: float = 15.0
    cpu_seconds: int = 5
    memory_bytes: int = 1 << 30
    disk_bytes: int = 64 << 20
    num_files: int = 1000
    num_open_files: int = 64
    num_threads: int = 32
    output_bytes: int = 1 << 20

    def __post_init__(self):
        least = {"memory_bytes": 64 << 20, "num_open_files": 8}  # what the interpreter itself needs
        for name, value in dataclasses.asdict(self).items():
            if not value >= least.get(name, 1):
                raise UserError(f"limits: {name}={value}: must be at least {least.get(name, 1)}")


@dataclass(frozen=True)
class Program:
    """code: what the model wrote. check: Python that raises unless `code` is right; run after it in its namespace."""

    code: str
    check: str = ""


@dataclass(frozen=True)
class Outcome:
    """What became of a program.

    reason: "" for a pass, else "error" (an exception), "exit" (it ended itself), "signal", "time", "memory", "output",
    or "lost" (no report: the system killed the launcher). detail: one line. output: the end of what it printed.
    """

    passed: bool
    reason: str = ""
    detail: str = ""
    output: str = ""
    cpu_seconds: float = 0.0

    def __str__(self) -> str:
        return "passed" if self.passed else f"{self.reason}: {self.detail}"


DEFAULT_LIMITS = Limits()


def run_programs(
    programs: Sequence[Program], limits: Limits = DEFAULT_LIMITS, num_workers: int | None = None
) -> list[Outcome]:
    """Run every program locked in, `num_workers` at a time (default: the cores this process may use).

    Returns:
      an outcome each, in their order. When it returns, nothing of them is left: no process, no file.

    Raises:
      UserError: this machine cannot lock a program in. None is run then.
    """
    _check_machine()
    probe = _run(Program("assert 1 + 1 == 2"), dataclasses.replace(limits, wall_seconds=30.0, cpu_seconds=30))
    if not probe.passed:
        raise UserError(f"sandbox: a program that does nothing fails in it ({probe}); {REMEDY}")
    with concurrent.futures.ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(lambda program: _run(program, limits), programs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _check_machine() -> None:
    """Raises UserError where there can be no walls."""
    if sys.platform != "linux":
        raise UserError(f"platform {sys.platform}: has no namespaces; {REMEDY}")
    machine = os.uname().machine
    if machine not in MACHINES:
        raise UserError(f"machine {machine}: its system calls are not known, only those of {', '.join(MACHINES)}")
    if not sys.executable:
        raise UserError("sys.executable: is empty, so no interpreter can be started; start Python from its own command")


def _run(program: Program, limits: Limits) -> Outcome:
    """One program in a process of its own: no fork of this one, which has JAX's threads."""
    here = pathlib.Path(__file__).resolve().parent
    packages = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]
    libraries = [os.path.join(sys.base_prefix, name) for name in ("lib", sys.platlibdir)]
    job = {
        "code": program.code,
        "check": program.check,
        "limits": dataclasses.asdict(limits),
        "packages": packages,
        "visible": [*packages, *libraries, *LIBRARIES],
    }
    command = [sys.executable, "-P", "-s", "-S", "-X", "utf8", "-c", START.format(str(here))]
    try:
        done = subprocess.run(
            command,
            input=json.dumps(job).encode(),
            env=ENVIRONMENT | {name: os.environ[name] for name in INTERPRETERS_OWN if name in os.environ},
            cwd="/",
            capture_output=True,
            start_new_session=True,
            timeout=limits.wall_seconds + GRACE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # which has killed it, and the system the rest with it
        return Outcome(False, "lost", "its launcher did not answer in time")
    return _outcome(done)


def _outcome(done: subprocess.CompletedProcess[bytes]) -> Outcome:
    if not done.stdout:
        said = done.stderr.decode("utf-8", "replace").strip().split("\n")[-1]
        return Outcome(False, "lost", f"its launcher ended with code {done.returncode} {said}".strip())
    values = json.loads(done.stdout)
    if "refused" in values:
        refused = values["refused"]
        raise UserError(f"sandbox: {refused['step']} failed ({refused['reason']}); {REMEDY}")
    return Outcome(**values)
