"""Runs killed at random moments, and damaged checkpoints: the number of steps lost, repeated or changed.

    python benchmarks/fault_injection.py [--kills=100] [--object_store_kills=40] [--damages=200]

A small run is started, killed with SIGKILL in a phase chosen at random, and started again by the same command, until it
ends; then the next one begins in a new workdir, until there were as many kills. Phases are start-up (imports and data),
restore, compile, steps, and save. When a run has ended, metrics.jsonl must hold each step once with the losses of a run
that was never killed, and the last checkpoint must be equal to that run's bit for bit. `object_store` repeats it with
the workdir on an emulator of Google Cloud Storage. `damages` flips a bit of, or truncates, a random file of the newest
checkpoint; the state restored afterwards must be that of an undamaged step.

Appends a line per part to benchmarks/results/fault_injection.jsonl.
"""

import argparse
import collections
import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import queue
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
os.environ["JAX_PLATFORMS"] = "cpu"

from etils import epath  # noqa: E402

from benchmarks.measuring import commit  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "fault_injection.jsonl"
NUM_STEPS, EVERY = 24, 4
PHASES = ("start-up", "restore", "compile", "steps", "save")
SECONDS = 300.0  # until an attempt counts as hung
STARTED, RESUMED, STEP = "mesh ", "resumed ", "step "  # beginnings of the lines of train.py
OVERRIDES = {
    "data.source": "synthetic",
    "data.synthetic_documents": 200,
    "data.sequence_length": 16,
    "data.batch_size": 2,
    "model.num_layers": 2,
    "mtp.depth": 1,
    "training.num_steps": NUM_STEPS,
    "training.sample_tokens": 0,
    "training.eval_batches": 1,
    "checkpoint.every": EVERY,
}


@dataclasses.dataclass(frozen=True)
class Place:
    """A folder of workdirs, the environment of runs in it, and the local folder of compiled programs."""

    folder: epath.Path
    env: dict[str, str]
    programs: pathlib.Path

    def command(self, workdir: epath.Path) -> list[str]:
        flags = [f"--config.{key}={value}" for key, value in OVERRIDES.items()]
        return [sys.executable, "train.py", "--config=configs/tiny.py", f"--workdir={workdir}", *flags]


class Attempt:
    """One process of a run, whose output is read line by line."""

    def __init__(self, place: Place, workdir: epath.Path, programs: pathlib.Path | None = None):
        env = os.environ | place.env | {"JAX_COMPILATION_CACHE_DIR": str(programs or place.programs)}
        env |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONUNBUFFERED": "1"}
        self.started = time.monotonic()
        self.lines: list[str] = []
        self._has_ended = False
        self._queue: queue.Queue[str | None] = queue.Queue()
        self._process = subprocess.Popen(
            *(place.command(workdir),),
            **{"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._queue.put(line.rstrip())
        self._queue.put(None)

    def until(self, *beginnings: str) -> float | None:
        """Returns the seconds from the start to a line that begins so; None if the process ends before it.

        Raises:
          TimeoutError: no such line within SECONDS.
        """
        while not self._has_ended:
            try:
                line = self._queue.get(timeout=max(0.1, self.started + SECONDS - time.monotonic()))
            except queue.Empty:
                self.kill()
                raise TimeoutError("\n".join(["an attempt hung after:", *self.lines[-20:]])) from None
            if line is None:
                self._has_ended = True
                break
            self.lines.append(line)
            if beginnings and line.startswith(beginnings):
                return time.monotonic() - self.started
        return None

    def finish(self) -> int:
        """Waits for the end and returns the exit code."""
        self.until()
        return self._process.wait()

    def kill(self) -> bool:
        """Kills the process; returns whether it was still running."""
        was_running = self._process.poll() is None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        return was_running


@dataclasses.dataclass(frozen=True)
class Reference:
    """A run that was never killed: its losses, the digest of its last state, and seconds of its phases."""

    losses: dict[int, float]
    digest: str
    start_up: float
    compile: float
    step: float


def run_reference(place: Place) -> Reference:
    """Trains once to fill the folder of compiled programs, and once more for the figures."""
    Attempt(place, place.folder / "warm_up").finish()
    workdir = place.folder / "reference"
    attempt = Attempt(place, workdir)
    start_up = attempt.until(STARTED)
    times = [attempt.until(STEP) for _ in range(NUM_STEPS)]
    if attempt.finish() or start_up is None or None in times:
        raise RuntimeError("\n".join(["the run that is not killed fails:", *attempt.lines[-20:]]))
    times = [at for at in times if at is not None]
    step = (times[-1] - times[0]) / (len(times) - 1)
    return Reference(losses_of(workdir), digest_of(workdir), start_up, times[0] - start_up, step)


def losses_of(workdir: epath.Path) -> dict[int, float]:
    """Returns the loss of each step in metrics.jsonl.

    Raises:
      ValueError: a line that is not JSON, or a step that is missing or there twice.
    """
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [record["step"] for record in records]
    if steps != list(range(1, NUM_STEPS + 1)):
        raise ValueError(f"metrics.jsonl has the steps {steps}")
    return {record["step"]: record["loss"] for record in records}


def digest_of(workdir: epath.Path) -> str:
    """Returns a hash of the newest valid state: names, shapes, dtypes and bytes of all leaves, and the step."""
    import jax
    import numpy as np

    from mtp_jax.training.checkpoint import Checkpoints

    with Checkpoints(workdir / "checkpoints") as saved:
        step, state = saved.open_part(("params", "opt_state", "biases", "step"))
    out = hashlib.sha256(str(step).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        array = np.asarray(leaf[...])
        out.update(f"{jax.tree_util.keystr(path)} {array.shape} {array.dtype}".encode())
        out.update(array.tobytes())
    return f"{step} {out.hexdigest()}"


def kill_once(place: Place, workdir: epath.Path, reference: Reference, rng: random.Random) -> str | None:
    """Starts the run and kills it in a random phase.

    Returns:
      The phase; None if the run ended first.

    Raises:
      RuntimeError: the run ended with an exit code other than 0.
    """
    phase = rng.choice(PHASES)
    with tempfile.TemporaryDirectory() as empty:  # no compiled programs, so that compilation takes its time
        attempt = Attempt(place, workdir, pathlib.Path(empty) if phase == "compile" else None)
        if phase == "start-up":
            time.sleep(rng.uniform(0, reference.start_up))
        elif phase == "restore":  # the weights are read, or made, between these lines
            if attempt.until(STARTED) is not None:
                time.sleep(rng.uniform(0, 0.5 * reference.compile))
        elif phase == "compile":
            if attempt.until(STARTED) is not None:
                time.sleep(rng.uniform(0.2, 1) * reference.compile)
        elif phase == "steps":
            for _ in range(rng.randint(1, NUM_STEPS - 1)):
                if attempt.until(STEP) is None:
                    break
            time.sleep(rng.uniform(0, reference.step))
        else:
            wanted = [f"{STEP}{step}/" for step in range(EVERY, NUM_STEPS, EVERY)]
            for _ in range(rng.randint(1, len(wanted) - 1)):
                if attempt.until(*wanted) is None:
                    break
            time.sleep(rng.uniform(0, 0.3))
        if attempt.kill():
            return phase
        if code := attempt.finish():
            raise RuntimeError("\n".join([f"exit code {code}:", *attempt.lines[-20:]]))
    return None


def kills(place: Place, num_kills: int, rng: random.Random) -> dict:
    """Returns counts of kills by phase and of what they did to the runs."""
    reference = run_reference(place)
    by_phase: collections.Counter[str] = collections.Counter()
    problems: list[str] = []
    num_runs = 0
    while sum(by_phase.values()) < num_kills or num_runs == 0:
        workdir = place.folder / f"run{num_runs}"
        rest = min(num_kills - sum(by_phase.values()), 12)  # kills of one run
        for _ in range(rest):
            phase = kill_once(place, workdir, reference, rng)
            if phase is None:
                break
            by_phase[phase] += 1
        attempt = Attempt(place, workdir)
        num_runs += 1
        if code := attempt.finish():
            problems.append(f"run {num_runs} ends with exit code {code}: {attempt.lines[-1:]}")
            continue
        try:
            if losses_of(workdir) != reference.losses:
                problems.append(f"run {num_runs}: losses differ")
            if digest_of(workdir) != reference.digest:
                problems.append(f"run {num_runs}: the last state differs")
        except Exception as error:
            problems.append(f"run {num_runs}: {error}")
        workdir.rmtree()
        print(f"{sum(by_phase.values())} kills, {num_runs} runs ended, {len(problems)} problems", flush=True)
    return {"kills": dict(by_phase), "num_kills": sum(by_phase.values()), "num_runs": num_runs, "problems": problems}


def damages(place: Place, num_damages: int, rng: random.Random) -> dict:
    """Returns counts of damaged checkpoints that were detected, that were harmless, and that changed the state."""
    workdir = place.folder / "damaged"
    attempt = Attempt(place, workdir)
    if code := attempt.finish():
        raise RuntimeError("\n".join([f"exit code {code}:", *attempt.lines[-20:]]))
    checkpoints = pathlib.Path(workdir) / "checkpoints"
    newest = max(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())
    valid = digest_of(workdir)
    with tempfile.TemporaryDirectory() as kept:
        whole = pathlib.Path(kept) / "checkpoints"
        shutil.copytree(checkpoints, whole)
        shutil.rmtree(checkpoints / str(newest))
        older = digest_of(workdir)
        shutil.copytree(whole / str(newest), checkpoints / str(newest))
        files = sorted(
            p.relative_to(whole)
            for p in whole.rglob("*")
            if p.is_file() and p.relative_to(whole).parts[0] == str(newest)
        )
        counts: collections.Counter[str] = collections.Counter()
        problems = []
        for number in range(num_damages):
            file = files[number % len(files)]  # every file, then again
            content = bytearray((whole / file).read_bytes())
            kind = "truncated" if number // len(files) % 2 else "flipped"
            if kind == "truncated":
                content = content[: rng.randrange(max(1, len(content)))]
            elif content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (checkpoints / file).write_bytes(content)
            try:
                with contextlib.redirect_stderr(open(os.devnull, "w")):
                    found = digest_of(workdir)
                outcome = {older: "older step restored", valid: "same state restored"}.get(found, "CHANGED")
            except Exception as error:
                outcome = "FAILED"
                problems.append(f"{kind} {file}: {error!r}"[:300])
            if outcome == "CHANGED":
                problems.append(f"{kind} {file}: another state")
            counts[f"{kind}: {outcome}"] += 1
            (checkpoints / file).write_bytes((whole / file).read_bytes())
    return {"num_damages": num_damages, "num_files": len(files), "outcomes": dict(counts), "problems": problems}


@contextlib.contextmanager
def on_disk() -> Iterator[Place]:
    with tempfile.TemporaryDirectory() as folder:
        yield Place(epath.Path(folder), {}, pathlib.Path(folder) / "programs")


@contextlib.contextmanager
def on_object_store() -> Iterator[Place]:
    from tests import object_store

    with object_store.serving() as store, tempfile.TemporaryDirectory() as programs:
        os.environ.update(store.env)
        name = f"faults-{uuid.uuid4().hex[:12]}"
        store.call("POST", "/storage/v1/b?project=test", {"name": name})
        yield Place(epath.Path(f"gs://{name}"), store.env, pathlib.Path(programs))


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--kills", type=int, default=100)
    flags.add_argument("--object_store_kills", type=int, default=40)
    flags.add_argument("--damages", type=int, default=200)
    flags.add_argument("--seed", type=int, default=0)
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    num_problems = 0
    parts = [
        ("kills on disk", on_disk, kills, args.kills),
        ("kills on object store", on_object_store, kills, args.object_store_kills),
        ("damaged files", on_disk, damages, args.damages),
    ]
    for name, place, measure, number in parts:
        if not number:
            continue
        started = time.monotonic()
        with place() as opened:
            line = {"benchmark": "fault_injection", "part": name} | measure(opened, number, random.Random(args.seed))
        line |= {"seconds": round(time.monotonic() - started), "seed": args.seed, "cpus": os.cpu_count()}
        line |= {"commit": commit(), "date": datetime.date.today().isoformat()}
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        num_problems += len(line["problems"])
    sys.exit(1 if num_problems else 0)


if __name__ == "__main__":
    main()
