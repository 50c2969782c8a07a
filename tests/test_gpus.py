"""The kernels on a mesh of two GPUs: the steps of one GPU. Run with JAX_PLATFORMS=cuda,cpu where there are two."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax import sharding
from mtp_jax.config import Config, DataConfig, MeshConfig, ModelConfig, MTPConfig, OptimizerConfig, TrainingConfig
from mtp_jax.mtp import kind_of
from mtp_jax.training.step import make_trainer
from tests.kernels.hopper import is_hopper

NUM_STEPS, LENGTH = 5, 512
CONFIG = Config(
    model=ModelConfig(
        **{"vocab_size": 512, "num_layers": 2, "embed_dim": 256, "num_heads": 4, "kv_lora_rank": 128, "ffn_dim": 512},
        **{"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "compute_dtype": "bfloat16"},
        **{"num_experts": 8, "num_experts_per_token": 2, "expert_dim": 256, "moe_dispatch": "ragged"},
        **{
            "attention_kernel": "pallas_hopper",
            "expert_kernel": "pallas_hopper",
        },  # asked for: an error where they cannot be
    ),
    mtp=MTPConfig(kind="sequential", depth=2),
    data=DataConfig(sequence_length=LENGTH, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=3e-3, warmup_steps=0),
    training=TrainingConfig(num_steps=100),
)
two_gpus = pytest.mark.skipif(not is_hopper() or jax.device_count() < 2, reason="needs two Hopper GPUs")


def losses(config, num_devices):
    """Of a few steps on packed documents."""
    rng, shape = np.random.default_rng(0), (4, LENGTH + 1 + kind_of(config).depth)
    begins = rng.random(shape) < 1 / 100
    begins[:, 0] = True
    index = np.broadcast_to(np.arange(shape[1]), shape)
    batch = {
        "tokens": rng.integers(0, 512, shape),
        "segment_ids": np.cumsum(begins, axis=1),
        "positions": index - np.maximum.accumulate(np.where(begins, index, 0), axis=1),
    }
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        state, found = trainer.init(), []
        batch = jax.device_put({k: v.astype(np.int32) for k, v in batch.items()}, trainer.batch_sharding)
        for _ in range(NUM_STEPS):
            state, metrics = trainer.step(state, batch)
            found.append([float(metrics[key]) for key in ("loss_main", "loss_mtp_1", "loss_mtp_2", "grad_norm")])
    return np.array(found)


@pytest.fixture(scope="module")
def of_one_gpu():
    return losses(CONFIG, 1)


@two_gpus
@pytest.mark.parametrize("axis", ["data", "fsdp", "expert", "context", "tensor"])
def test_two_gpus_take_the_steps_of_one(of_one_gpu, axis):
    found = losses(replace(CONFIG, mesh=replace(MeshConfig(), **{axis: 2})), 2)
    np.testing.assert_allclose(found[:, :3], of_one_gpu[:, :3], rtol=5e-3)
    np.testing.assert_allclose(found[:, 3], of_one_gpu[:, 3], rtol=5e-2)  # of the gradients
    assert of_one_gpu[-1, 0] < of_one_gpu[0, 0] - 0.5  # it learns the batch by heart
