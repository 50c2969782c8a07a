"""Loss curves of a small model with and without the GPU kernels, and their difference.

    python benchmarks/curves.py [--steps=200]

Trains a mixture of experts with DeepSeek's head dims three times on the same packed documents, in which every token has
four likely successors: with the kernels in bfloat16, without them in bfloat16, and without them in float32. Appends a
line to benchmarks/results/h200.jsonl with the mean absolute difference of the loss over the steps, with and without
kernels, and of bfloat16 and float32; the former is expected to be within the latter, as noise.
"""

import argparse
import os
import pathlib
import statistics
import sys
from dataclasses import replace

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax  # noqa: E402
import numpy as np  # noqa: E402

from benchmarks.measuring import RESULTS, append  # noqa: E402
from mtp_jax import sharding  # noqa: E402
from mtp_jax.config import Config, DataConfig, ModelConfig, MTPConfig, OptimizerConfig, TrainingConfig  # noqa: E402
from mtp_jax.mtp import kind_of  # noqa: E402
from mtp_jax.training.step import make_trainer  # noqa: E402

MODEL = ModelConfig(
    **{"vocab_size": 512, "num_layers": 3, "embed_dim": 256, "num_heads": 4, "kv_lora_rank": 128, "ffn_dim": 512},
    **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "moe_dispatch": "ragged"},
    **{"num_experts": 8, "num_experts_per_token": 2, "expert_dim": 256},
)
RUNS = {
    "kernels": {"compute_dtype": "bfloat16", "attention_kernel": "pallas_hopper", "expert_kernel": "pallas_hopper"},
    "plain": {"compute_dtype": "bfloat16", "attention_kernel": "xla", "expert_kernel": "xla"},
    "float32": {"compute_dtype": "float32", "attention_kernel": "xla", "expert_kernel": "xla"},
}
DOCUMENT, SUCCESSORS = 100, 4


def batches(config: Config, num: int):
    """Yields rows of documents of 100 tokens on average, each a random walk over the same random graph."""
    rng = np.random.default_rng(0)
    successors = rng.integers(0, config.model.vocab_size, (config.model.vocab_size, SUCCESSORS))
    shape = (config.data.batch_size, config.data.sequence_length + 1 + kind_of(config).depth)
    for _ in range(num):
        begins = rng.random(shape) < 1 / DOCUMENT
        begins[:, 0] = True
        tokens, turns = rng.integers(0, config.model.vocab_size, shape), rng.integers(0, SUCCESSORS, shape)
        for i in range(1, shape[1]):
            tokens[:, i] = np.where(begins[:, i], tokens[:, i], successors[tokens[:, i - 1], turns[:, i]])
        index = np.broadcast_to(np.arange(shape[1]), shape)
        start = np.maximum.accumulate(np.where(begins, index, 0), axis=1)
        yield {"tokens": tokens, "segment_ids": np.cumsum(begins, axis=1), "positions": index - start}


def curve(changes: dict[str, str], num_steps: int) -> list[float]:
    """Returns the loss of every step."""
    config = Config(
        model=replace(MODEL, **changes),
        mtp=MTPConfig(kind="sequential", depth=1),
        data=DataConfig(sequence_length=512, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=20),
        training=TrainingConfig(num_steps=num_steps),
    )
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        state, losses = trainer.init(), []
        for batch in batches(config, num_steps):
            batch = {name: value.astype(np.int32) for name, value in batch.items()}
            state, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
            losses.append(metrics["loss"])
        return [float(loss) for loss in losses]


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--steps", type=int, default=200)
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    losses = {name: curve(changes, args.steps) for name, changes in RUNS.items()}

    def difference(one: str, other: str) -> float:
        return statistics.mean(abs(a - b) for a, b in zip(losses[one], losses[other], strict=True))

    line = {"benchmark": "curves", "steps": args.steps, "first": {name: ends[0] for name, ends in losses.items()}}
    line |= {"last": {name: ends[-1] for name, ends in losses.items()}}
    line |= {"kernels_apart": difference("kernels", "plain"), "bfloat16_apart": difference("plain", "float32")}
    append(args.output, line)


if __name__ == "__main__":
    main()
