"""Training step of a config on this machine's devices: rate, MFU, peak memory, compile time and kernel time by part.

    python benchmarks/train_step.py --config=configs/moe_4b.py [--profile] [--peer=hf] [--config.section.key=VALUE ...]

Appends a line to benchmarks/results/h200.jsonl. Batches are random tokens: one document per row (packing=contiguous),
or documents of 1024 tokens on average (packed). --profile adds `parts_ms`, kernel time of a step by part of the model,
and `gap`, the fraction of a step in which no kernel ran. --peer=hf trains the same architecture with transformers on
the same machine (benchmarks/train_step_hf.py).
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of the GPU's memory; jax takes 0.75 by default
if "--profile" in sys.argv:  # CUDA graphs hide the operations of their kernels
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax  # noqa: E402

from benchmarks.measuring import RESULTS, ROOT, append, measure  # noqa: E402
from mtp_jax.config import Config, load_config  # noqa: E402
from mtp_jax.data import tokenizer  # noqa: E402
from mtp_jax.model import validate  # noqa: E402
from mtp_jax.training.run import with_vocabulary  # noqa: E402


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
