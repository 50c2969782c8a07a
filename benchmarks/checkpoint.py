"""Time of checkpoints: what a save takes from the training loop, until it is on disk, and what a restore takes.

    python benchmarks/checkpoint.py [--gib=1] [--directory=DIR_OR_URL] [--repeats=3]

Appends a line to benchmarks/results/checkpoint.jsonl. Seconds are medians over the repeats: `save` until the call
returns, `commit` until the step is on disk, `checksums` of one pass over the state (part of `save` and of `restore`;
zero if the version measured has none), `restore` of the newest step. `raw_write` is the time to write as many bytes to
one file. The state is random float32 in shapes of a transformer with Adam's moments.
"""

import argparse
import os
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measuring import append  # noqa: E402
from mtp_jax.config import CheckpointConfig  # noqa: E402
from mtp_jax.training import checksums  # noqa: E402
from mtp_jax.training.checkpoint import Checkpoints  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "checkpoint.jsonl"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--gib", type=float, default=1.0)
    flags.add_argument("--directory", help="default: a temporary folder")
    flags.add_argument("--repeats", type=int, default=3)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        record = measure(args.directory or os.path.join(scratch, "checkpoints"), args.gib, args.repeats)
        record["raw_write_seconds"] = raw_write(os.path.join(scratch, "raw"), int(args.gib * 2**30))
    append(RESULTS, {"benchmark": "checkpoint", "gib": args.gib, "cpus": os.cpu_count(), **record})


def measure(directory: str, gib: float, repeats: int) -> dict[str, float]:
    """Returns the median seconds of each part."""
    state = make_state(gib)
    list_leaves = getattr(checksums, "list_leaves", None)
    times: dict[str, list[float]] = {"save": [], "commit": [], "restore": [], "checksums": []}
    with Checkpoints(directory, CheckpointConfig(keep=1)) as checkpoints:
        for step in range(repeats + 1):  # the first one compiles
            started = time.perf_counter()
            checkpoints.save(step, state)
            times["save"].append(time.perf_counter() - started)
            checkpoints.wait()
            times["commit"].append(time.perf_counter() - started)
            started = time.perf_counter()
            if list_leaves is not None:
                list_leaves(state)
            times["checksums"].append(time.perf_counter() - started)
        abstract = jax.eval_shape(lambda: state)
        for _ in range(repeats + 1):
            started = time.perf_counter()
            jax.block_until_ready(checkpoints.restore_latest(abstract))
            times["restore"].append(time.perf_counter() - started)
    return {f"{name}_seconds": round(statistics.median(found[1:]), 3) for name, found in times.items()}


def make_state(gib: float) -> dict:
    """Returns 12 layers of weights with two moments each, of `gib` in all."""
    width = int((gib * 2**30 / 4 / 3 / 12 / 12) ** 0.5) // 8 * 8
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.standard_normal(shape, np.float32))

    def weights() -> dict:
        shapes = {"attention": (12, width, 4 * width), "up": (12, width, 4 * width), "down": (12, 4 * width, width)}
        return {name: normal(*shape) for name, shape in shapes.items()}

    return jax.block_until_ready(
        {"params": weights(), "opt_state": {"mu": weights(), "nu": weights()}, "step": jnp.int32(0)}
    )


def raw_write(path: str, num_bytes: int) -> float:
    block = np.random.default_rng(0).bytes(2**26)
    started = time.perf_counter()
    with open(path, "wb") as file:
        for _ in range(num_bytes // len(block)):
            file.write(block)
    return round(time.perf_counter() - started, 3)


if __name__ == "__main__":
    main()
