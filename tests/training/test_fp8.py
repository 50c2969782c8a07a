"""Training with 8-bit matmuls: the loss follows that of float32, on a mesh too, and nothing else is in 8 bits."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax.config import MeshConfig, with_values
from mtp_jax.kernels.device import pretend
from mtp_jax.model import validate
from mtp_jax.sharding import make_mesh
from mtp_jax.tools.planning.matmul_flops import matmul_flops
from mtp_jax.training.flops import train_flops_per_token
from mtp_jax.training.step import compiler_options, make_trainer
from tests.layers.test_linear import dots
from tests.test_mistakes import rows, tiny

NUM_STEPS = 20
FP8 = ("float8_e4m3fn",) * 2


def config_of(precision, kind="none", num_experts=0, **mesh):
    """One layer, and with kind="sequential" one module."""
    small = ("num_layers=1", "num_dense_layers=0", f"num_experts={num_experts}", "embed_dim=32", "ffn_dim=32")
    config = tiny(
        *(f"--config.mtp.kind={kind}", "--config.mtp.depth=1", "--config.optimizer.learning_rate=0.01"),
        *("--config.optimizer.warmup_steps=1", f"--config.model.matmul_precision={precision}"),
        *(f"--config.model.{setting}" for setting in small),
    )
    return replace(config, mesh=MeshConfig(**{"data": 1, **mesh}))


def trainer_of(config):
    mesh = make_mesh(config.mesh, jax.devices()[: math.prod(vars(config.mesh).values())])
    return mesh, make_trainer(config, mesh)


def losses(config):
    """Losses of steps on two batches in turn, so that the model learns them."""
    mesh, trainer = trainer_of(config)
    with jax.set_mesh(mesh):
        batches = [jax.device_put(rows(config, seed), trainer.batch_sharding) for seed in range(2)]
        state, out = trainer.init(), []
        for step in range(NUM_STEPS):
            state, metrics = trainer.step(state, batches[step % 2])
            out.append([metrics["loss"], metrics["grad_norm"]])
        return np.asarray(jax.device_get(out))


@pytest.fixture(scope="module")
def on_one_device():
    return {precision: losses(config_of(precision)) for precision in ("default", "fp8")}


def test_the_loss_follows_that_of_float32(on_one_device):
    plain, fp8 = on_one_device["default"][:, 0], on_one_device["fp8"][:, 0]
    assert plain[-2:].mean() < plain[:2].mean() - 0.5  # it has learnt
    assert 0 < np.abs(fp8 - plain).max() < 0.05


def test_the_loss_in_8_bits_is_part_of_training_steps_alone(on_one_device):
    config = with_values(config_of("default"), {"training.loss_precision": "fp8"})
    found, plain = losses(config), on_one_device["default"]
    assert 0 < np.abs(found - plain)[:, 0].max() < 0.05
    in_step = list(dots(step_program(config)))
    assert in_step.count(("float8_e5m2", "float8_e4m3fn")) == in_step.count(("float8_e4m3fn", "float8_e5m2")) == 1
    mesh, trainer = trainer_of(config)
    with jax.set_mesh(mesh):
        arguments = trainer.abstract_state, rows(config), np.ones(config.model.vocab_size, np.int32)
        assert not any(
            "float8" in name for pair in dots(trainer.evaluate.trace(*arguments).jaxpr.jaxpr) for name in pair
        )


def test_gpus_compile_steps_without_searching_in_triton():
    """With 8-bit matmuls the search did not end within two minutes on an H200."""
    mesh = make_mesh(config_of("default").mesh, jax.devices()[:1])
    with pretend("gpu", "9.0"):
        assert compiler_options(mesh) == {"xla_gpu_enable_triton_gemm": False}
    assert not compiler_options(mesh)  # a CPU


def test_a_mesh_equals_one_device(on_one_device):
    """A scale is of a whole row or matrix, also where the dim it is taken over is sharded."""
    one, mesh = on_one_device["fp8"], losses(config_of("fp8", fsdp=2, tensor=2))
    np.testing.assert_allclose(mesh[0], one[0], rtol=1e-5)
    # Later a value within float32's noise of the middle between two 8-bit ones is rounded to the other one.
    np.testing.assert_allclose(mesh[:, 0], one[:, 0], atol=0.02)
    assert np.abs(one[0] - on_one_device["default"][0]).min() > 1e-5 * one[0].max()


def step_program(config):
    mesh, trainer = trainer_of(config)
    with jax.set_mesh(mesh):
        return trainer.step.trace(trainer.abstract_state, rows(config)).jaxpr.jaxpr


@pytest.mark.parametrize("dispatch", ["dense", "ragged"])
def test_products_with_weights_are_in_8_bits_and_count_the_same_flops(dispatch):
    configs = (config_of(precision, "sequential", num_experts=4) for precision in ("default", "fp8"))
    plain, fp8 = (step_program(with_values(config, {"model.moe_dispatch": dispatch})) for config in configs)
    assert matmul_flops(fp8, 1) == matmul_flops(plain, 1)
    assert train_flops_per_token(config_of("fp8")) == train_flops_per_token(config_of("default"))
    before, after = list(dots(plain)), list(dots(fp8))
    assert len(before) == len(after) and FP8 not in before
    # In two blocks: q_a, q_b, kv_a, kv_b, o, three of the shared experts, three of the routed; and the projection.
    assert after.count(FP8) == 3 * (2 * (11 if dispatch == "dense" else 8) + 1)


def test_all_but_a_training_step_computes_as_without_it():
    """Validation, scoring, generation and conversion read `architecture`."""
    plain, fp8 = config_of("default"), config_of("fp8")
    validate(fp8, 1)
    assert fp8.architecture == plain.architecture
    assert fp8.training_architecture != plain.training_architecture
    mesh, trainer = trainer_of(fp8)
    with jax.set_mesh(mesh):
        arguments = trainer.abstract_state, rows(fp8), np.ones(fp8.model.vocab_size, np.int32)
        assert FP8 not in set(dots(trainer.evaluate.trace(*arguments).jaxpr.jaxpr))


@pytest.mark.parametrize("precision", ["high", "highest"])
def test_other_precisions_are_those_of_every_pass(precision):
    config = with_values(config_of("default"), {"model.matmul_precision": precision})
    assert config.architecture == config.training_architecture
