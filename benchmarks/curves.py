"""Do the fast paths of a GPU train as the slow ones do? Loss curves of a small model with both, and how far apart.

    python benchmarks/curves.py [--steps=200]

Trains a mixture of experts with DeepSeek's head dims three times on the same data: with the kernels in bfloat16,
without them in bfloat16, and without them in float32. Appends a line to benchmarks/results/h200.jsonl with the mean
absolute difference of the main loss over the steps, of kernels against none, and of bfloat16 against float32, which is
the noise it is to be within.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

from benchmarks.measuring import RESULTS, ROOT, append  # noqa: E402

MODEL = {
    **{"num_layers": 4, "embed_dim": 256, "num_heads": 4, "kv_lora_rank": 128, "qk_nope_head_dim": 128},
    **{"qk_rope_head_dim": 64, "v_head_dim": 128, "ffn_dim": 512, "num_experts": 8, "num_experts_per_token": 2},
    **{"expert_dim": 256, "moe_dispatch": "ragged"},
}
RUNS = {
    "kernels": {"compute_dtype": "bfloat16", "attention_kernel": "cudnn", "expert_kernel": "mosaic"},
    "plain": {"compute_dtype": "bfloat16", "attention_kernel": "xla", "expert_kernel": "xla"},
    "float32": {"compute_dtype": "float32", "attention_kernel": "xla", "expert_kernel": "xla"},
}


def start(folder: pathlib.Path, changes: dict[str, object], num_steps: int) -> subprocess.Popen[bytes]:
    """Train the quickstart's data with this model."""
    keys = {f"model.{name}": value for name, value in {**MODEL, **changes}.items()}
    keys |= {"training.num_steps": num_steps, "training.log_every": 1, "training.sample_tokens": 0}
    keys |= {"data.sequence_length": 512, "data.batch_size": 8, "data.validation_fraction": 0.02}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, str(ROOT / "train.py"), "--config=configs/quickstart.py", f"--workdir={folder}", *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: pathlib.Path(scratch) / name for name in RUNS}
        running = [start(folders[name], changes, args.steps) for name, changes in RUNS.items()]
        assert not any([process.wait() for process in running]), "a run failed"
        losses = {name: curve(folder) for name, folder in folders.items()}

    def apart(one: str, other: str) -> float:
        return statistics.mean(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))

    line = {"benchmark": "curves", "steps": args.steps, "last": {name: curve[-1] for name, curve in losses.items()}}
    line |= {"kernels_apart": apart("kernels", "plain"), "bfloat16_apart": apart("plain", "float32")}
    append(args.output, line)


def curve(folder: pathlib.Path) -> list[float]:
    """The main loss of every step."""
    return [json.loads(line)["loss_main"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    main()
