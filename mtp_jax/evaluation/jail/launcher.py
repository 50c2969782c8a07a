"""One job from standard input, one report to standard output; see `mtp_jax/evaluation/sandbox.py`."""

import fcntl
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable

from . import runner, seccomp, walls

REPORT = 3  # the program's file descriptor for what the runner says
MAX_SAID = 1 << 16
KEPT_OUTPUT = 2000  # bytes of what a program prints
CHUNK = 1 << 16


def main() -> None:
    """Start the guard, tell the system who its users are, and wait until all processes inside are gone."""
    walls.die_with_parent()
    job = json.loads(sys.stdin.buffer.read())
    unshared, say_unshared = os.pipe()
    mapped, say_mapped = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(unshared)
        os.close(say_mapped)
        _or_refuse(_guard, job, say_unshared, mapped)
    os.close(say_unshared)
    os.close(mapped)
    if os.read(unshared, 1):
        try:
            other = walls.map_users(guard)
        except walls.Refused as refusal:
            _refuse(refusal)
        else:
            os.write(say_mapped, b"1" if other else b"0")
    os.close(say_mapped)
    os.waitpid(guard, 0)


def _or_refuse(function: Callable[..., None], *arguments: object) -> None:
    """Call a function that ends this process; if it raises, that is the report."""
    try:
        function(*arguments)
    except walls.Refused as refusal:
        _refuse(refusal)
    except BaseException as error:
        _refuse(_unforeseen(function, error))
    os._exit(1)


def _unforeseen(function: Callable[..., None], error: BaseException) -> walls.Refused:
    return walls.Refused(function.__name__.strip("_"), f"{type(error).__name__}: {error}")


def _refuse(refusal: walls.Refused) -> None:
    _report(refused={"step": refusal.step, "reason": refusal.reason})


def _report(**values: object) -> None:
    data = json.dumps(values).encode()
    while data:
        data = data[os.write(1, data) :]


def _guard(job: dict, say_unshared: int, mapped: int) -> None:
    """Outside of the new process namespace still, whose first process is its child."""
    walls.enter_namespaces()
    os.write(say_unshared, b"1")
    answer = os.read(mapped, 1)
    if not answer:  # the launcher has said why
        os._exit(1)
    walls.die_with_parent()
    init = os.fork()
    if init == 0:
        _or_refuse(_init, job, answer == b"1")
    os.waitpid(init, 0)  # returns when every process of the namespace is gone
    os._exit(0)


def _init(job: dict, change_user: bool) -> None:
    """Process 1: no signal from inside reaches it, and when it ends the system kills all others."""
    walls.die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Python's own handler would be reached
    limits = job["limits"]
    walls.enter_root([*sys.path, *job["visible"]], limits["disk_bytes"], limits["num_files"])
    walls.prctl("PR_SET_DUMPABLE", walls.PR_SET_DUMPABLE, 0)
    output, program_output = os.pipe()
    said, program_says = os.pipe()
    token = os.urandom(16).hex().encode()
    os.close(os.pidfd_open(os.getpid()))  # Linux 5.3; to fail before the program is there
    pid = os.fork()
    if pid == 0:
        _program(job, change_user, token, program_output, program_says)
    os.close(program_output)
    os.close(program_says)
    seen = _watch(pid, output, said, limits)
    words = seen["said"]
    if words.startswith(runner.READY):
        verdict = _verdict(seen, words[len(runner.READY) :], token, limits)
        _report(**verdict, output=seen["output"], cpu_seconds=seen["cpu_seconds"])
    else:
        _report(refused=_refusal(words, seen))
    os._exit(0)


def _program(job: dict, change_user: bool, token: bytes, output: int, says: int) -> None:
    """From here to the program; nothing of init's is left open."""
    try:
        os.setsid()
        null = os.open("/dev/null", os.O_RDONLY)
        sources = [fcntl.fcntl(fd, fcntl.F_DUPFD, 16) for fd in (null, output, output, says)]
        for target, source in enumerate(sources):
            os.dup2(source, target)
        says = REPORT
        os.closerange(REPORT + 1, os.sysconf("SC_OPEN_MAX"))
        sys.path += job["packages"]
        sys.argv[:] = ["program.py"]
        code, check = job["code"], job["check"]
        walls.limit(job["limits"])
        walls.drop_privileges(change_user)
        walls.prctl("PR_SET_DUMPABLE", walls.PR_SET_DUMPABLE, 0)
        seccomp.install(threads=walls.counts_processes())
    except BaseException as error:
        refusal = error if isinstance(error, walls.Refused) else _unforeseen(_program, error)
        os.write(says, json.dumps({"step": refusal.step, "reason": refusal.reason}).encode())
        os._exit(1)
    job.clear()
    runner.run(code, check, token, REPORT)


def _watch(pid: int, output: int, said: int, limits: dict) -> dict:
    """Read both pipes until the program ends or is over its limit of time or output, when it is killed.

    Returns:
      {"exit", "cpu_seconds", "over", "output", "said"}; over: "" or the limit that ended it.
    """
    deadline = time.monotonic() + limits["wall_seconds"]
    process, poll = os.pidfd_open(pid), select.poll()
    for fd in (process, output, said):
        poll.register(fd, select.POLLIN)
    text, words, num_bytes, over, ended = b"", b"", 0, "", False
    while not (ended or over):
        left = deadline - time.monotonic()
        ready = {fd for fd, _ in poll.poll(max(0.0, left) * 1000)}
        for fd in ready - {process}:
            data = os.read(fd, CHUNK)
            num_bytes += len(data)
            if not data:
                poll.unregister(fd)
            elif fd == output:
                text = (text + data)[-KEPT_OUTPUT:]
            else:
                words = (words + data)[:MAX_SAID]
        ended = ready == {process}  # and nothing is left in the pipes
        if not ended:
            over = "output" if num_bytes > limits["output_bytes"] else "time" if left <= 0 else ""
    os.kill(pid, signal.SIGKILL)
    _, status, usage = os.wait4(pid, 0)
    return {
        "exit": os.waitstatus_to_exitcode(status),
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "over": over,
        "output": text.decode("utf-8", "replace"),
        "said": words,
    }


def _verdict(seen: dict, said: bytes, token: bytes, limits: dict) -> dict:
    """{"passed", "reason", "detail"}: passed only with the token, the exit code 0 and within the limits."""
    over, code = seen["over"], seen["exit"]
    if over == "output":
        return _failed("output", f"more than {limits['output_bytes']} bytes")
    if over == "time":
        return _failed("time", f"{limits['wall_seconds']} s")
    # the limit is checked at the clock's ticks, which count otherwise than the seconds that are reported
    if code == -signal.SIGKILL and seen["cpu_seconds"] >= limits["cpu_seconds"] / 2:
        return _failed("time", f"{limits['cpu_seconds']} s of CPU time")
    if code < 0:
        return _failed("signal", signal.Signals(-code).name if -code in set(signal.Signals) else str(-code))
    if said == token and code == 0:
        return {"passed": True, "reason": "", "detail": ""}
    try:
        words = json.loads(said)
        return _failed(str(words["kind"]), str(words["detail"])[: runner.MAX_DETAIL])
    except (ValueError, TypeError, KeyError, RecursionError):
        return _failed("exit", f"ended itself with code {code} before its check did")


def _failed(reason: str, detail: str) -> dict:
    return {"passed": False, "reason": reason, "detail": detail}


def _refusal(said: bytes, seen: dict) -> dict[str, str]:
    """Why the program was not started."""
    try:
        words = json.loads(said)
        return {"step": str(words["step"]), "reason": str(words["reason"])}
    except (ValueError, TypeError, KeyError):
        return {"step": "start", "reason": f"exit code {seen['exit']}, {seen['output'][-200:]!r}"}
