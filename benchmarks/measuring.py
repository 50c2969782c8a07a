"""Timing of operations and recording of results, common to the benchmarks of this folder."""

import collections
import datetime
import json
import os
import pathlib
import re
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.mtp import kind_of
from mtp_jax.training.flops import peak_flops, train_flops_per_token
from mtp_jax.training.step import make_trainer

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200.jsonl"
DOCUMENT = 1024
NUM_BATCHES = 4
PARTS = ("optimizer", "loss", "mtp", "experts", "router", "dispatch", "attention", "ffn")  # scopes; the first match
COLLECTIVE = re.compile(r"(all-gather|all-reduce|reduce-scatter|ragged-all-to-all|all-to-all|collective-permute)")
Span = tuple[float, float]


def milliseconds(run: Callable[[], Any], calls: int = 10, repeats: int = 7) -> float:
    """Returns the milliseconds of one call: the median over `repeats` of the mean over `calls`, all dispatched before
    waiting for the last. Two calls, which compile, come first."""
    jax.block_until_ready([run(), run()])
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)][-1])
        found.append(1e3 * (time.perf_counter() - started) / calls)
    return statistics.median(found)


def append(output: pathlib.Path, line: dict[str, Any]) -> None:
    """Appends a result as one line, with device, version, compiler flags, commit and date, and prints it."""
    flags = os.environ.get("XLA_FLAGS", "").strip()
    stamped = line | ({"xla_flags": flags} if flags else {})
    stamped |= {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    write_line(output, stamped)
    print(json.dumps(line), flush=True)


def write_line(output: pathlib.Path, line: dict[str, Any]) -> None:
    """Appends one line of JSON."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.write(json.dumps(line) + "\n")


def commit() -> str | None:
    """Returns the commit of the measured code; None outside a git checkout or with uncommitted changes."""
    git = ["git", "-C", str(ROOT)]
    try:
        changed = subprocess.run([*git, "status", "--porcelain", "mtp_jax"], capture_output=True, text=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return None if changed.stdout else head.stdout.strip()


def batch_of(config: Config, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens with the fields of `mtp_jax.data.packing.Row`."""
    shape = (config.data.batch_size, config.data.sequence_length + 1 + kind_of(config).lookahead)
    begins = rng.random(shape) < 1 / DOCUMENT if config.data.packing == "packed" else np.zeros(shape, bool)
    begins[:, 0] = True
    index = np.broadcast_to(np.arange(shape[1]), shape)
    return {
        "tokens": rng.integers(0, config.model.vocab_size, shape, np.int32),
        "segment_ids": np.cumsum(begins, axis=1, dtype=np.int32),
        "positions": (index - np.maximum.accumulate(np.where(begins, index, 0), axis=1)).astype(np.int32),
    }


def batches_of(config: Config) -> list[dict[str, np.ndarray]]:
    """Returns the batches that a benchmark repeats."""
    rng = np.random.default_rng(0)
    return [batch_of(config, rng) for _ in range(NUM_BATCHES)]


def measure(config: Config, num_steps: int, is_profiled: bool, num_warm: int = 2) -> dict[str, Any]:
    """Returns the measurements and the loss of each step. num_steps steps are timed, after num_warm others."""
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        batches = jax.device_put(batches_of(config), trainer.batch_sharding)
        started = time.perf_counter()
        step = trainer.step.lower(trainer.abstract_state, batches[0]).compile()
        compile_seconds = time.perf_counter() - started
        state, losses, started = trainer.init(), [], 0.0
        for number in range(num_warm + num_steps):
            if number == num_warm:
                jax.block_until_ready(state)
                started = time.perf_counter()
            state, metrics = step(state, batches[number % len(batches)])
            losses.append(metrics["loss"])
        jax.block_until_ready(losses)
        seconds = (time.perf_counter() - started) / num_steps
        found = figures(config, seconds) | {
            "compile_seconds": round(compile_seconds, 1),
            "losses": [float(loss) for loss in losses],
        }
        if is_profiled:
            found |= profile(step, state, batches[0])
    return found


def figures(config: Config, seconds: float) -> dict[str, Any]:
    """Returns rate, step time, MFU and peak memory for a step's seconds."""
    rate = config.data.batch_size * config.data.sequence_length / seconds
    peak = peak_flops(jax.devices()[0].device_kind)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "tokens_per_second": round(rate, 1),
        "step_ms": round(1e3 * seconds, 2),
        "mfu": round(rate * train_flops_per_token(config) / (peak * jax.device_count()), 4) if peak else None,
        "peak_gib": round(memory.get("peak_bytes_in_use", 0) / 2**30, 2),
    }


def profile(step, state, batch, num_steps: int = 3) -> dict[str, Any]:
    """Returns kernel milliseconds per step of the first GPU by part, the largest kernels, the fraction of the time
    without any, and `communication`, the mean over all GPUs."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(num_steps):
                state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
        (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(path))
    names = dict(re.findall(r"%?([\w.\-]+) = [^\n]*?metadata=\{[^\n]*?op_name=\"([^\"]*)\"", step.as_text()))
    parts: collections.Counter[str] = collections.Counter()
    ops: collections.Counter[str] = collections.Counter()
    spans: list[Span] = []
    for event in kernels(data, 0):
        stats = dict(event.stats)
        op = str(stats.get("hlo_op", event.name))
        words = set(re.split(r"[/()]", names.get(op, "")))
        part = next((p for p in PARTS if p in words), "other")
        parts[part] += event.duration_ns
        ops[f"{part}: {op} {names.get(op, event.name)[-70:]}"] += event.duration_ns
        spans.append((event.start_ns, event.start_ns + event.duration_ns))
    scale = 1e-6 / num_steps
    return {
        "parts_ms": {part: round(ns * scale, 2) for part, ns in parts.most_common()},
        "largest_ms": {op: round(ns * scale, 2) for op, ns in ops.most_common(12)},
        "gap": round(1 - covered(spans) / (max(s[1] for s in spans) - min(s[0] for s in spans)), 4) if spans else None,
        **communication([list(kernels(data, gpu)) for gpu in range(jax.local_device_count())], num_steps),
    }


def communication(gpus: list[list[Any]], num_steps: int) -> dict[str, Any]:
    """Returns milliseconds per step in collectives, and in collectives while no other kernel runs ("exposed").

    Means over GPUs. A collective's time includes waiting for the other GPUs. collectives_ms has the kinds by their
    total kernel time, which counts collectives that run at the same time twice.

    Args:
      gpus: the events of each GPU's streams.
    """
    kinds: collections.Counter[str] = collections.Counter()
    total, exposed, num_gpus = 0.0, 0.0, 0
    for events in filter(None, gpus):
        named = [(collective_of(event), (event.start_ns, event.start_ns + event.duration_ns)) for event in events]
        for kind, (first, last) in named:
            kinds[kind] += last - first
        total += covered([span for kind, span in named if kind])
        exposed += covered([span for _, span in named]) - covered([span for kind, span in named if not kind])
        num_gpus += 1
    if not num_gpus:
        return {"communication_ms": None, "exposed_ms": None, "collectives_ms": {}}
    scale = 1e-6 / num_steps / num_gpus
    return {
        "communication_ms": round(total * scale, 2),
        "exposed_ms": round(exposed * scale, 2),
        "collectives_ms": {kind: round(ns * scale, 2) for kind, ns in kinds.most_common() if kind},
    }


def collective_of(event: Any) -> str:
    """Returns the kind of collective that an event of a GPU's stream belongs to; empty for all other kernels.

    By the operation of the compiled program, which kernels of XLA's own collectives have too, or the name of NCCL's.
    """
    op = COLLECTIVE.match(str(dict(event.stats).get("hlo_op", "")))
    if op:
        return op.group(1)
    kernel = re.search(r"nccl(?:Dev)?Kernel_(\w+?)(?:_|\()", event.name)
    return kernel.group(1) if kernel else "other" if "nccl" in event.name.lower() else ""


def kernels(data: Any, gpu: int) -> Iterator[Any]:
    """Yields the events on a GPU's streams."""
    for plane in data.planes:
        if plane.name == f"/device:GPU:{gpu}":
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from line.events


def covered(spans: Sequence[Span]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, -float("inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total
