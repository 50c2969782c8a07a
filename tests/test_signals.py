"""Signals, lost output and stalls, with real processes: the exit code, one line, and a rerun that misses no step."""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import pytest

from mtp_jax.training.metrics import read_metrics
from tests.commands import DENSE, QUICK, command
from tests.conftest import ROOT

TRAIN = [
    *("--config=configs/tiny.py", *DENSE, "--config.data.batch_size=2", "--config.data.validation_fraction=0"),
    *("--config.checkpoint.every=3", "--config.optimizer.schedule=constant"),  # of any length
]
ENV = {**QUICK, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
ENDLESS = "--config.training.num_steps=1000000"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 75, signal.SIGHUP: 75, signal.SIGUSR1: 75}
STOPPED = re.compile(
    r"error: stopped by (a signal at step \d+, state saved|SIG\w+; there is nothing to save); "
    "run the same command to go on"
)


def start(*line, **options):
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": ENV, "cwd": ROOT} | options
    return subprocess.Popen(line, **options)


def wait_for(condition, process):
    end = time.monotonic() + 240
    while not condition():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.01)


def catches(pid, number):
    """Returns whether a process has a handler for a signal."""
    status = pathlib.Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"SigCgt:\s*(\w+)", status)[1], 16) >> (number - 1) & 1


# ---------------------------------------------------------------------------------------------------------------
# train.py

# What the run has reached, then at most so many seconds more, at random: from the first imports to a save.
MOMENTS = [
    ("handlers", 0, signal.SIGTERM),
    ("handlers", 4, signal.SIGHUP),
    ("compilation", 2, signal.SIGINT),
    ("steps", 1, signal.SIGTERM),
    ("save", 0, signal.SIGHUP),
    ("save", 0.1, signal.SIGUSR1),
]
WORKERS = "--config.data.num_workers=1"  # of the last


def reached(moment, process, workdir):
    if moment == "handlers":
        wait_for(lambda: catches(process.pid, signal.SIGUSR2), process)
        return
    if moment == "save":
        before = set(workdir.glob("checkpoints/*"))
        wait_for(lambda: set(workdir.glob("checkpoints/*")) - before, process)
        return
    wanted = {"compilation": "mesh ", "steps": "first step done"}[moment]
    while not process.stdout.readline().startswith(wanted):
        assert process.poll() is None, process.communicate()


def own(errors):
    """Lines on stderr, without notices and orbax's warnings about slow saves."""
    return [line for line in errors.splitlines() if not line.startswith(("note: ", "WARNING:absl:"))]


def test_signals_at_random_moments_lose_no_step(tmp_path):
    workdir, moments = tmp_path / "run", random.Random(0)
    line = command("train.py", *TRAIN, f"--workdir={workdir}")
    ends = []
    for moment, seconds, number in MOMENTS:
        workers = [WORKERS] if (moment, seconds, number) == MOMENTS[-1] else []
        process = start(*line, ENDLESS, *workers, start_new_session=True)
        try:
            reached(moment, process, workdir)
            time.sleep(seconds * moments.random())
            os.killpg(process.pid, number)  # as Ctrl-C does
            errors = process.communicate(timeout=120)[1]
        finally:
            process.kill()
        found = [text for text in errors.splitlines() if not text.startswith("note: ")]
        assert (process.returncode, len(found)) == (CODES[number], 1), (moment, number, errors)
        assert STOPPED.fullmatch(found[0]), found
        ends.append("saved" in found[0])
    assert any(ends) and not all(ends)
    logged = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
    # A sample with a character that the encoding lacks, written to a full disk: still exit code 0.
    last = [*line, f"--config.training.num_steps={logged[-1] + 4}", "--config.training.sample_prompt=é"]
    with open("/dev/full", "w") as full:
        done = start(*last, "--config.training.sample_tokens=2", env={**ENV, "PYTHONIOENCODING": "ascii"}, stdout=full)
        errors = done.communicate(timeout=240)[1]
    assert (done.returncode, own(errors)) == (0, [])
    steps = [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]
    assert steps == list(range(1, logged[-1] + 5))


def test_a_hung_data_worker_is_a_stall(tmp_path):
    line = command("train.py", *TRAIN, f"--workdir={tmp_path / 'run'}", ENDLESS, "--config.training.stall_seconds=3")
    process = start(*line, WORKERS)
    try:
        while not process.stdout.readline().startswith("first step done"):
            assert process.poll() is None, process.communicate()
        children = pathlib.Path(f"/proc/{process.pid}").glob("task/*/children")
        workers = [p for path in children for p in path.read_text().split() if b"spawn_main" in cmdline(p)]
        assert workers
        for worker in workers:
            status = pathlib.Path(f"/proc/{worker}/status").read_text()  # Ctrl-C in a terminal reaches it, too
            assert all(int(re.search(r"SigBlk:\s*(\w+)", status)[1], 16) >> (n - 1) & 1 for n in CODES)
            os.kill(int(worker), signal.SIGSTOP)
        errors = process.communicate(timeout=120)[1]
    finally:
        process.kill()
    assert process.returncode == 76
    assert re.search(r"error: stalled: no step has finished after step \d+ for \d+ s, process 0 on ", errors)
    assert "next(batches)" in errors or 'loop.py", line' in errors  # the stack of the main thread
    assert not any(b"spawn_main" in cmdline(worker) for worker in workers)


def cmdline(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


# ---------------------------------------------------------------------------------------------------------------
# mtp_jax.signals

IN_C = "import hashlib; hashlib.pbkdf2_hmac('sha256', b'x', b'y', 2**31 - 1)"  # minutes without a Python instruction


def signalled(code, *numbers, pause=0.0, **options):
    """(exit code, stdout, stderr) of a program that receives signals after it has printed a line."""
    process = start(sys.executable, "-c", code, **options)
    try:
        assert process.stdout.readline() == "ready\n"
        for index, number in enumerate(numbers):
            time.sleep(pause if index else 0)
            process.send_signal(number)
        out, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, out, errors


@pytest.mark.parametrize("number", CODES)
def test_a_process_with_nothing_to_save_ends_within_a_call_into_c(number):
    code = f"from mtp_jax import signals; signals.install(); print('ready', flush=True); {IN_C}"
    code, _, errors = signalled(code, number)
    assert (code, errors.count("\n")) == (CODES[number], 1)
    assert errors.startswith(f"error: stopped by {number.name}; there is nothing to save")


DEFERRED = f"""
from mtp_jax import signals
signals.REPEAT_SECONDS, signals.GRACE_SECONDS = 0.2, 0.1
signals.install()
with signals.STOP.deferred() as stop:
    stop.waiting_for = "step 7"
    print("ready", flush=True)
    {IN_C}
"""


def test_a_second_signal_ends_a_process_at_once_and_notices_name_the_cause_of_waiting():
    code, _, errors = signalled(DEFERRED, signal.SIGTERM, signal.SIGINT, pause=1.0)
    *notes, last = errors.splitlines()
    assert code == 75 and last.startswith("error: stopped by SIGTERM twice: ended at once")
    assert notes and set(notes) == {"note: SIGTERM received; waiting for step 7"}


def test_a_signal_that_a_launcher_repeats_is_one():
    waits = """
import time
from mtp_jax import signals
signals.install()
with signals.STOP.deferred() as stop:
    print("ready", flush=True)
    while stop.number is None: time.sleep(0.01)
    time.sleep(0.5)
    print("saved", flush=True)
"""
    code, out, errors = signalled(waits, signal.SIGTERM, signal.SIGHUP, pause=0.1)
    assert (code, out) == (75, "saved\n")
    assert errors == "error: stopped by SIGTERM; the state of the last step is saved; run the same command to go on\n"


def test_ignored_signals_stay_ignored_as_under_nohup():
    code = "from mtp_jax import signals; signals.install(); print('ready', flush=True); input(); print('end')"
    process = start(*("bash", "-c", 'trap \'\' HUP; exec "$0" "$@"', sys.executable, "-c", code), stdin=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate("\n", timeout=60) == ("end\n", "") and process.returncode == 0


def test_threads_children_and_callers_keep_their_signals():
    code = """
import os, signal, threading
from mtp_jax import signals
before = signal.getsignal(signal.SIGINT)
def elsewhere():
    signals.install()
    with signals.STOP.deferred():
        assert signal.getsignal(signal.SIGINT) is before
thread = threading.Thread(target=elsewhere)
thread.start(); thread.join()
with signals.STOP.deferred() as stop:  # called from a program that has not installed anything
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.number == signal.SIGTERM and signal.getsignal(signal.SIGINT) is before
assert stop.number is None
signals.install()
if os.fork() == 0:
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    os.kill(os.getpid(), signal.SIGTERM)
assert os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM
print("ready", flush=True)
"""
    assert signalled(code) == (0, "", "")


def test_notices_have_time_and_level_under_a_command_and_are_plain_elsewhere():
    lines = "import sys; from mtp_jax import cli, errors; errors.warn_once('a'); "
    lines += "cli.run(lambda _: (errors.warn_once('b'), cli.set_up_logging(3), errors.warn_once('c')))"
    _, errors = start(sys.executable, "-c", lines).communicate(timeout=60)
    when = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    assert re.fullmatch(rf"note: a\n{when} WARNING note: b\n{when} process 3 WARNING note: c\n", errors), errors


# ---------------------------------------------------------------------------------------------------------------
# mtp_jax.streams

PRINTS = """
import pathlib, sys
from mtp_jax import cli
def main(argv):
    for i in range(20000): print("line", i, "\\u00e9", flush=i % 100 == 0)
    pathlib.Path(argv[0]).write_text("done")
cli.run(main)
"""


@pytest.mark.parametrize("after", ["| head -3", "> /dev/full", ">&-", "> /dev/null", "2>&- >&-"])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_lost_output_fails_nothing(after, encoding, tmp_path):
    done = tmp_path / "done"
    line = f'set -o pipefail; "$0" -c "$1" "$2" {after}'
    env = {**ENV, "PYTHONUNBUFFERED": "", "PYTHONIOENCODING": encoding}
    process = start("bash", "-c", line, sys.executable, PRINTS, str(done), env=env)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (0, "") and done.read_text() == "done"
    assert out.count("\n") == (3 if "head" in after else 0)


def test_characters_outside_the_encoding_are_replaced():
    code = "from mtp_jax import cli; cli.run(lambda argv: print('caf\\u00e9'))"
    process = start(sys.executable, "-c", code, env={**ENV, "PYTHONIOENCODING": "ascii"})
    assert process.communicate(timeout=60) == ("caf?\n", "") and process.returncode == 0


def test_a_file_opened_without_stdout_is_not_stdout(tmp_path):
    code = "import sys; from mtp_jax import streams; streams.protect(); "
    code += "print(open(sys.argv[1], 'w').fileno() > 2, file=sys.stderr)"
    process = start("bash", "-c", '"$0" -c "$1" "$2" >&-', sys.executable, code, str(tmp_path / "file"))
    assert process.communicate(timeout=60)[1] == "True\n"


# ---------------------------------------------------------------------------------------------------------------
# mtp_jax.training.watchdog

STEPS = """
import time
from mtp_jax.training.watchdog import Watchdog
class Result:
    def __init__(self, ready): self.is_ready = lambda: ready
watchdog = Watchdog(0.5, process_index=3)
def steps(last):
    for step in range(1, last + 1):
        watchdog.dispatched(step, Result(True))
        time.sleep(0.1)
"""
NO_STALL = {
    "compilation": "watchdog.dispatched(1, Result(False)); time.sleep(2)",
    "pause": "steps(3)\nwith watchdog.paused('a checkpoint'): time.sleep(2)\nsteps(3)",
    "closed": "steps(3)\nwatchdog.close()\ntime.sleep(2)",
    "off": "watchdog.close()\nwatchdog = Watchdog(0)\nsteps(3)\ntime.sleep(2)",
    "debugger": "steps(3)\nimport pdb; pdb.Pdb().user_line = None\n"
    "exec(compile('time.sleep(2)', 'pdb', 'exec'), {'time': time, '__name__': 'pdb'})",
    "steps": "steps(20)",
}


@pytest.mark.parametrize("name", NO_STALL)
def test_no_stall(name):
    process = start(sys.executable, "-c", f"{STEPS}{NO_STALL[name]}")
    assert process.communicate(timeout=60) == ("", "") and process.returncode == 0


STALL = {
    "no step": ("steps(3)\ntime.sleep(60)", "no step has finished after step 3 for"),
    "on the device": (
        "steps(3)\nwhile True: watchdog.dispatched(4, Result(False)); time.sleep(0.1)",
        "no step has finished after step 3 for",
    ),
    "pause": (
        "steps(3)\nwith watchdog.paused('the checkpoint of step 3'): time.sleep(60)",
        "the checkpoint of step 3 has taken",
    ),
}


@pytest.mark.parametrize("name", STALL)
def test_a_stall_ends_the_process_with_its_stacks(name):
    code, expected = STALL[name]
    process = start(sys.executable, "-c", f"{STEPS}{code}")
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out) == (76, "")
    assert 'File "<string>", line' in errors and "(most recent call first)" in errors
    line = errors.splitlines()[-1]
    assert line.startswith(f"error: stalled: {expected}") and "process 3 on " in line and "stall_seconds" in line


def test_the_limit_follows_slow_steps():
    code = STEPS + "watchdog.close()\nwatchdog._times.extend([60.0] * 5)\nprint(watchdog.limit())"
    assert start(sys.executable, "-c", code).communicate(timeout=60)[0] == "1200.0\n"
