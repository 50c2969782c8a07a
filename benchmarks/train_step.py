"""Training step of a config on this machine's devices: rate, MFU, peak memory, compile time and kernel time by part.

    python benchmarks/train_step.py --config=configs/moe_4b.py [--profile] [--peer=hf|torch]
        [--config.section.key=VALUE ...]

Appends a line to benchmarks/results/h200.jsonl. Batches are random tokens: one document per row (packing=contiguous),
or documents of 1024 tokens on average (packed). --profile adds `parts_ms`, kernel time of a step by part of the model,
and `gap`, the fraction of a step in which no kernel ran.

A peer trains the same architecture on the same machine, before mtp_jax opens the devices: --peer=hf is transformers
without MTP (benchmarks/train_step_hf.py), --peer=torch a PyTorch step with the same rows, loss and optimizer
(benchmarks/train_step_torch.py). `ratio` is the rate of mtp_jax over that of the peer.
"""

import argparse
import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")  # of the GPU's memory; jax takes 0.75 by default
if "--profile" in sys.argv:  # CUDA graphs hide the operations of their kernels
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_gpu_enable_command_buffer="

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measuring import RESULTS, ROOT, append, batches_of, measure  # noqa: E402
from mtp_jax.config import Config, ModelConfig, RopeConfig, load_config  # noqa: E402
from mtp_jax.data import tokenizer  # noqa: E402
from mtp_jax.model import validate  # noqa: E402
from mtp_jax.mtp import kind_of  # noqa: E402
from mtp_jax.training.run import with_vocabulary  # noqa: E402

# What benchmarks/train_step_torch.py reads of a model. Further fields must have their defaults, except those of OURS.
TORCH_FIELDS = (
    *("vocab_size", "num_layers", "embed_dim", "norm_eps", "latent_norm_eps", "init_std", "num_heads", "kv_lora_rank"),
    *("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "rope", "ffn_dim", "num_experts", "num_dense_layers"),
    *("num_experts_per_token", "num_shared_experts", "expert_dim", "router", "routed_scaling_factor"),
)
OURS = (  # implementations of mtp_jax, and the balance loss
    *("compute_dtype", "matmul_precision", "remat", "moe_dispatch", "attention_kernel", "expert_kernel"),
    *("scan_unroll", "balance_loss_weight"),
)


def peer_figures(name: str, config: Config, num_steps: int) -> dict:
    """Returns the figures of a peer, from a separate process."""
    if name == "none":
        return {"peer": None, "peer_tokens_per_second": None}
    with tempfile.TemporaryDirectory() as folder:
        asked = hf_request(config) if name == "hf" else torch_request(config, num_steps, pathlib.Path(folder))
        command = [sys.executable, str(ROOT / "benchmarks" / f"train_step_{name}.py"), json.dumps(asked)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    rate, gib = found["tokens_per_second"], found["peak_gib"]
    tokens = config.data.batch_size * config.data.sequence_length
    return {
        "peer": found["peer"],
        "peer_tokens_per_second": round(rate, 1),
        "peer_step_ms": round(1e3 * tokens / rate, 2),
        "peer_gib": gib and round(gib, 2),
        "peer_losses": found["losses"],
    }


def hf_request(config: Config) -> dict:
    """Returns the model's config.json in DeepSeek-V3's layout, and the shape of the batch."""
    from mtp_jax.interop import config_json

    shape = {"rows": config.data.batch_size, "length": config.data.sequence_length}
    return shape | {"model": config_json.from_config(config, "deepseek_v3")}


def torch_request(config: Config, num_steps: int, folder: pathlib.Path) -> dict:
    """Returns the model, the loss and the optimizer, and writes the batches to a file of the folder."""
    kept = {name: getattr(config.model, name) for name in (*TORCH_FIELDS, *OURS)}
    refused = [] if dataclasses.replace(ModelConfig(), **kept) == config.model else ["model"]
    refused += [] if config.model.rope == RopeConfig(theta=config.model.rope.theta) else ["model.rope"]
    refused += [] if config.model.router.num_groups == 1 else ["model.router.num_groups"]
    refused += [] if config.mtp.kind in ("none", "sequential") else ["mtp.kind"]
    if refused:
        sys.exit(
            f"--peer=torch: benchmarks/train_step_torch.py has no {', '.join(refused)} of this config; leave it out"
        )
    batches = batches_of(config)
    np.savez(folder / "batches.npz", **{name: np.stack([batch[name] for batch in batches]) for name in batches[0]})
    weight = kind_of(config).default_weight if config.mtp.weight is None else config.mtp.weight
    return {
        "batches": str(folder / "batches.npz"),
        "steps": num_steps,
        "is_packed": config.data.packing == "packed",
        "depth": kind_of(config).depth,
        "mtp_weight": weight,
        "model": dataclasses.asdict(config.model),
        "optimizer": dataclasses.asdict(config.optimizer),
    }


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", required=True)
    flags.add_argument("--steps", type=int, default=10)
    flags.add_argument("--profile", action="store_true")
    flags.add_argument("--peer", choices=["none", "hf", "torch"], default="none")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args, overrides = flags.parse_known_args()
    config = load_config(args.config, overrides)
    config = with_vocabulary(config, tokenizer.load(config.data.tokenizer).vocab_size)
    line = {"benchmark": "train_step", "config": pathlib.Path(args.config).stem, "overrides": overrides}
    beside = peer_figures(args.peer, config, args.steps)
    validate(config, jax.device_count())  # opens the device; only after the peer, which uses all of its memory
    line |= {"num_devices": jax.device_count()} | measure(config, args.steps, args.profile) | beside
    if args.peer != "none":
        line["ratio"] = round(line["tokens_per_second"] / line["peer_tokens_per_second"], 3)
        line["peer_mfu"] = line["mfu"] and round(line["mfu"] / line["ratio"], 4)
    append(args.output, line)
    if args.peer != "none":
        print(f"{line['ratio']:.2f} times {line['peer']}")


if __name__ == "__main__":
    main()
