"""Running programs in the sandbox as this user or as an ordinary one, and watching from outside what they do."""

import contextlib
import ctypes
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import threading
import time

from mtp_jax.evaluation.sandbox import Limits, Outcome, Program, run_programs
from tests.conftest import ROOT

NEW_USER = 0x10000000
ORDINARY = 1000


def run(request):
    """The outcomes of {"programs": [[code, check], ...], "limits", "environ", "inherit", "num_workers"}."""
    os.environ.update(request["environ"])
    fds = [os.open(request["inherit"], os.O_RDWR)] if request["inherit"] else []
    for fd in fds:
        os.set_inheritable(fd, True)
    try:
        programs = [Program(*texts) for texts in request["programs"]]
        return run_programs(programs, Limits(**request["limits"]), num_workers=request["num_workers"])
    finally:
        for fd in fds:
            os.close(fd)
        for name in request["environ"]:
            del os.environ[name]


class Here:
    """The sandbox is started by this process."""

    pid = os.getpid()

    def run(self, **request):
        return run(request)

    def close(self):
        pass


class Ordinary:
    """The sandbox is started by a process without privileges that is not root, in a user namespace."""

    def __init__(self):
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.evaluation.sandboxes"],
            **{"cwd": ROOT, "text": True, "stdin": subprocess.PIPE, "stdout": subprocess.PIPE},
        )
        self.pid = self.process.pid
        assert json.loads(self.process.stdout.readline()) == {"uid": ORDINARY, "capabilities": 0}

    def run(self, **request):
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return [Outcome(**values) for values in json.loads(self.process.stdout.readline())]

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        assert self.process.wait(timeout=10) == 0


def serve():
    """Answer a request a line; see `Ordinary`."""
    if os.getuid() != ORDINARY:
        owner, group = os.getuid(), os.getgid()
        assert ctypes.CDLL(None).unshare(NEW_USER) == 0
        for name, text in (("setgroups", "deny"), ("uid_map", owner), ("gid_map", group)):
            text = text if name == "setgroups" else f"{ORDINARY} {text} 1"
            pathlib.Path("/proc/self", name).write_text(text)
        os.execv(sys.executable, [sys.executable, "-m", "tests.evaluation.sandboxes"])  # which drops the capabilities
    status = pathlib.Path("/proc/self/status").read_text()
    print(json.dumps({"uid": os.geteuid(), "capabilities": int(status.split("CapEff:")[1].split()[0], 16)}), flush=True)
    for line in sys.stdin:
        print(json.dumps([dataclasses.asdict(outcome) for outcome in run(json.loads(line))]), flush=True)


class Watch:
    """Number and memory of the descendants of a process, sampled all the time: `with Watch(pid) as seen:`.

    num_processes, num_threads and bytes_used are maxima; left() are the processes seen that still run.
    """

    def __init__(self, pid):
        self.pid, self.done, self.before = pid, threading.Event(), set()
        self.before = {p for p, *_ in self.descendants()}
        self.seen, self.num_processes, self.num_threads, self.bytes_used = set(), 0, 0, 0

    def __enter__(self):
        self.thread = threading.Thread(target=self._sample)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.done.set()
        self.thread.join()

    def descendants(self):
        """(pid, start time, threads, resident bytes) of each that runs. One that has not become its program yet is a
        copy of the process that started it: its memory is that process's."""
        found, parents = {}, {}
        copied = _command_line(self.pid)
        for folder in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                is_copy = _command_line(folder.name) == copied  # before its size: it may become its program in between
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                if fields[0] != "Z":
                    parents[int(folder.name)] = int(fields[1])
                    size = 0 if is_copy else int(fields[21]) * 4096
                    found[int(folder.name)] = (int(fields[19]), int(fields[17]), size)
        inside = {self.pid}
        while more := {p for p, parent in parents.items() if parent in inside} - inside:
            inside |= more
        return [(p, *found[p]) for p in inside - {self.pid} - self.before]

    def _sample(self):
        while not self.done.wait(0.01):
            now = self.descendants()
            self.seen |= {(pid, start) for pid, start, *_ in now}
            self.num_processes = max(self.num_processes, len(now))
            self.num_threads = max(self.num_threads, sum(threads for _, _, threads, _ in now))
            self.bytes_used = max(self.bytes_used, sum(size for *_, size in now))

    def left(self):
        """Those that were seen and still run; at once, without waiting for them."""
        return [pid for pid, start in self.seen if _start_time(pid) == start]


def _command_line(pid):
    """Empty of a process that is gone."""
    with contextlib.suppress(OSError):
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    return b""


def _start_time(pid):
    with contextlib.suppress(OSError):
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if fields[0] != "Z":
            return int(fields[19])
    return None


@contextlib.contextmanager
def elapsed():
    """A list that gets the seconds of the block."""
    seconds, started = [], time.monotonic()
    yield seconds
    seconds.append(time.monotonic() - started)


if __name__ == "__main__":
    serve()
