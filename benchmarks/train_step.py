"""Training step of a config on this machine's devices: rate, MFU, peak memory, compile time and kernel time by part.

    python benchmarks/train_step.py --config=configs/moe_4b.py [--profile] [--peer=hf] [--config.section.key=VALUE ...]

Appends a line to benchmarks/results/h200.jsonl. Batches are random tokens: one document per row (packing=contiguous),
or documents of 1024 tokens on average (packed). --profile adds `parts_ms`, kernel time of a step by part of the model,
and `gap`, the fraction of a step in which no kernel ran. --peer=hf trains the same architecture with transformers on
the same machine (benchmarks/train_step_hf.py).
"""

import argparse
import collections
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of the GPU's memory; jax takes 0.75 by default
if "--profile" in sys.argv:  # CUDA graphs hide the operations of their kernels
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measuring import RESULTS, ROOT, append  # noqa: E402
from mtp_jax import sharding  # noqa: E402
from mtp_jax.config import Config, load_config  # noqa: E402
from mtp_jax.data import tokenizer  # noqa: E402
from mtp_jax.model import validate  # noqa: E402
from mtp_jax.mtp import kind_of  # noqa: E402
from mtp_jax.training.flops import peak_flops, train_flops_per_token  # noqa: E402
from mtp_jax.training.run import with_vocabulary  # noqa: E402
from mtp_jax.training.step import make_trainer  # noqa: E402

DOCUMENT = 1024
PARTS = ("optimizer", "loss", "mtp", "experts", "router", "dispatch", "attention", "ffn")  # scopes; the first match


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


def measure(config: Config, num_steps: int, is_profiled: bool) -> dict:
    """Returns the measurements. The time is from the end of the second step to the end of num_steps more steps."""
    mesh = sharding.make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        rng = np.random.default_rng(0)
        batches = [jax.device_put(batch_of(config, rng), trainer.batch_sharding) for _ in range(4)]
        started = time.perf_counter()
        step = trainer.step.lower(trainer.abstract_state, batches[0]).compile()
        compile_seconds = time.perf_counter() - started
        state, metrics = step(trainer.init(), batches[0])
        state, metrics = step(state, batches[1])
        losses = [float(metrics["loss"])]
        started = time.perf_counter()
        for number in range(num_steps):
            state, metrics = step(state, batches[number % len(batches)])
        losses.append(float(metrics["loss"]))
        seconds = (time.perf_counter() - started) / num_steps
        found = figures(config, seconds) | {"compile_seconds": round(compile_seconds, 1), "losses": losses}
        if is_profiled:
            found |= profile(step, state, batches[0])
    return found


def figures(config: Config, seconds: float) -> dict:
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


def profile(step, state, batch, num_steps: int = 3) -> dict:
    """Returns kernel milliseconds per step by part, the largest kernels, and the fraction of the time without any."""
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
    spans = []
    for event in kernels(data):
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
    }


def kernels(data):
    """Yields the events on the first GPU's streams."""
    for plane in data.planes:
        if plane.name == "/device:GPU:0":
            for line in plane.lines:
                if line.name.startswith("Stream"):
                    yield from line.events


def covered(spans: list[tuple[float, float]]) -> float:
    """Returns the length of the union of intervals."""
    total, end = 0.0, -float("inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def peer(config: Config) -> dict:
    """Returns the figures of transformers, from a separate process."""
    command = [sys.executable, str(ROOT / "benchmarks" / "train_step_hf.py"), json.dumps(peer_config(config))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    return {"peer": found["peer"], "peer_tokens_per_second": found["tokens_per_second"], "peer_gib": found["peak_gib"]}


def peer_config(config: Config) -> dict:
    """Returns the model's config.json in DeepSeek-V3's layout, and the shape of the batch."""
    from mtp_jax.interop import config_json

    shape = {"rows": config.data.batch_size, "length": config.data.sequence_length}
    return shape | {"model": config_json.from_config(config, "deepseek_v3")}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", required=True)
    flags.add_argument("--steps", type=int, default=10)
    flags.add_argument("--profile", action="store_true")
    flags.add_argument("--peer", choices=["none", "hf"], default="none")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args, overrides = flags.parse_known_args()
    config = load_config(args.config, overrides)
    config = with_vocabulary(config, tokenizer.load(config.data.tokenizer).vocab_size)
    line = {"benchmark": "train_step", "config": pathlib.Path(args.config).stem, "overrides": overrides}
    beside = peer(config) if args.peer == "hf" else {"peer": None, "peer_tokens_per_second": None}
    validate(config, jax.device_count())  # opens the device; only after the peer, which uses all of its memory
    line |= {"num_devices": jax.device_count()} | measure(config, args.steps, args.profile) | beside
    append(args.output, line)
    if args.peer == "hf":
        print(f"{line['tokens_per_second'] / line['peer_tokens_per_second']:.2f} times {line['peer']}")


if __name__ == "__main__":
    main()
