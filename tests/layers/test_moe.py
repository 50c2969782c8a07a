"""The experts as GPUs run them, on a stand-in for one, against the way of all other devices."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.grouped_matmul import gradient
from mtp_jax.layers.moe import MixtureOfExperts
from tests.kernels.hopper import assert_close, hopper_only
from tests.reference.moe import moe

CONFIG = ModelConfig(embed_dim=128, num_experts=4, num_experts_per_token=2, expert_dim=128, compute_dtype="bfloat16")


def forward_and_backward(config):
    """Output and gradients of one layer in x and its weights; the same weights and x whatever the config."""
    graph, state = nnx.split(MixtureOfExperts(config, nnx.Rngs(params=jax.random.key(0))))
    state = jax.tree.map(lambda w: 10 * w, state)
    x_BTD = jax.random.normal(jax.random.key(1), (2, 96, 128)).astype(config.compute_dtype)

    @jax.jit
    def run(state, x_BTD):
        return nnx.merge(graph, state)(x_BTD, jnp.ones((2, 96), bool))[0]

    out_BTD, pull = jax.vjp(run, state, x_BTD)
    return jax.tree.leaves(
        (out_BTD, pull(jnp.cos(jnp.arange(out_BTD.size)).reshape(out_BTD.shape).astype(out_BTD.dtype)))
    )


def check(config):
    expected = forward_and_backward(replace(CONFIG, moe_dispatch="dense", expert_kernel="xla"))
    for a, b in zip(forward_and_backward(config), expected, strict=True):
        assert_close(a, b, 2e-2)


def test_experts_on_a_gpu_equal_every_expert_on_every_token(monkeypatch, stand_ins):
    calls = []
    differentiable = gradient.differentiable
    monkeypatch.setattr(gradient, "differentiable", lambda *a: calls.append(a[2].shape) or differentiable(*a))
    check(CONFIG)
    assert calls == [(4, 128, 256), (4, 128, 128)]  # gate and up in one


@pytest.mark.parametrize("kernel", ["auto", "xla"])
def test_experts_on_a_gpu_without_the_kernels(kernel):
    with pretend("gpu"):
        check(replace(CONFIG, expert_kernel=kernel))


@hopper_only
def test_on_hopper_experts_equal_every_expert_on_every_token():
    check(replace(CONFIG, expert_kernel="pallas_hopper"))


def test_experts_in_8_bits_round_alike_in_both_dispatches(stand_ins):
    """One rounds h after its gate and one before it, which is where they differ."""
    fp8 = replace(CONFIG, matmul_precision="fp8")
    dense, ragged = (forward_and_backward(replace(fp8, moe_dispatch=dispatch)) for dispatch in ("dense", "ragged"))
    plain = forward_and_backward(replace(CONFIG, moe_dispatch="dense"))
    for a, b, exact in zip(ragged, dense, plain, strict=True):
        assert_close(a, b, 8e-2)
        assert_close(a, exact, 1.5e-1)


@pytest.mark.parametrize("num_shared_experts", [0, 1])
def test_few_tokens_read_only_the_experts_that_they_chose(num_shared_experts):
    """As on a Hopper GPU, compared with the numpy oracle; with more assignments than experts all are read."""
    shared = {"num_shared_experts": num_shared_experts, "compute_dtype": "float32"}
    config = replace(CONFIG, num_experts=8, embed_dim=24, expert_dim=20, **shared)
    layer = MixtureOfExperts(config, nnx.Rngs(params=jax.random.key(0)))
    layer.router.bias[...] = jnp.linspace(-0.1, 0.1, 8)
    names = ("gate", "up", "down")
    weights = [layer.router.weight, *(getattr(layer, name) for name in names)]
    weights += [getattr(layer.shared, name) for name in names] if num_shared_experts else []
    for n, weight in enumerate(weights):
        weight[...] = 0.5 * jax.random.normal(jax.random.key(n), weight.shape)
    params = {"router": layer.router.weight[...], "bias": layer.router.bias[...]}
    params |= {name: getattr(layer, name)[...] for name in names}
    if num_shared_experts:
        params["shared"] = {name: getattr(layer.shared, name)[...] for name in names}
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    for num_tokens in (1, 4, 5):
        x_BTD = jax.random.normal(jax.random.key(9), (1, num_tokens, 24))
        valid_BT = jnp.ones((1, num_tokens), bool)
        with pretend("gpu", "9.0"):
            trace = jax.make_jaxpr(lambda x, v: layer.decode(x, v))(x_BTD, valid_BT)
            assert ("few_rows_experts" in str(trace)) == (num_tokens <= 4)
            found = layer.decode(x_BTD, valid_BT)
        expected, _, _ = moe(params, config, np.asarray(x_BTD, np.float64), np.ones((1, num_tokens), bool))
        assert_close(found, expected, 1e-5)
