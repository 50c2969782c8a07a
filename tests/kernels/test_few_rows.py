"""Products of a few rows in one kernel, interpreted on CPUs, compared with numpy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.config import GatedUnitConfig, ModelConfig
from mtp_jax.kernels import few_rows
from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.few_rows import experts
from mtp_jax.layers.ffn import gated_unit
from mtp_jax.layers.linear import combined, join, linear, outputs_first
from mtp_jax.layers.norm import Deferred, RMSNorm
from mtp_jax.layers.param import matrix, scaled
from tests.kernels.hopper import assert_close, hopper_only
from tests.reference.norm import rms_norm

EPS = 1e-3


def silu(x):
    return x / (1 + np.exp(-x))


def operands(num_rows, contracted, num_outputs, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    weights = [0.1 * draw(num_outputs, contracted) for _ in range(2)]
    return draw(num_rows, contracted), weights, draw(num_rows, num_outputs)


def unscaled_norm(x):
    return rms_norm({"scale": np.ones(x.shape[-1])}, np.asarray(x, np.float64), EPS)


# One row and several; one block, several, and numbers that no block divides.
SHAPES = [(1, 64, 8), (1, 8192, 6), (1, 100, 9), (2, 4096, 4), (3, 512, 6), (4, 2600, 5), (8, 300, 10), (3, 64, 4098)]


@pytest.mark.parametrize(("num_rows", "contracted", "num_outputs"), SHAPES)
def test_products_equal_numpy(num_rows, contracted, num_outputs):
    x, (w, u), added = operands(num_rows, contracted, num_outputs)
    w64, u64, x64 = (np.asarray(a, np.float64) for a in (w, u, x))
    assert_close(few_rows.products(x, [w]), x64 @ w64.T, 1e-6)
    assert_close(few_rows.products(x, [w], added_NF=added), x64 @ w64.T + np.asarray(added), 1e-6)
    unit = functools.partial(gated_unit, config=GatedUnitConfig())
    found = few_rows.products(x, [w, u], EPS, unit, added)
    z = unscaled_norm(x)
    assert_close(found, silu(z @ w64.T) * (z @ u64.T) + np.asarray(added), 1e-6)


@pytest.mark.parametrize("num_rows", [1, 2])
def test_products_are_rounded_before_the_addition(num_rows):
    """As separate operations in bfloat16 do."""
    x, (w, _), added = operands(num_rows, 64, 8, jnp.bfloat16)
    exact = np.asarray(x, np.float64) @ np.asarray(w, np.float64).T
    found = few_rows.products(x, [w], added_NF=added)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, jnp.asarray(exact, jnp.bfloat16) + added)


def param(key, shape, axes, in_dims=1):
    rngs = nnx.Rngs(params=jax.random.key(key))
    return outputs_first(matrix(rngs, shape, axes, in_dims, ModelConfig(init_std=0.1)))


@pytest.mark.parametrize("length", [1, 3])
def test_linear_uses_the_kernel_with_norm_and_residual(length, as_on_hopper):
    """Of weights with several output dims and with several contracted dims, and of joined ones."""
    q, kv = param(0, (64, 2, 32), ("embed", "heads", None)), param(1, (64, 10), ("embed", None))
    o = param(2, (2, 32, 64), ("heads", None, "embed"), 2)
    x_BTD = jax.random.normal(jax.random.key(0), (2, length, 64))
    out_BTHV = jax.random.normal(jax.random.key(1), (2, length, 2, 32))

    def run(x_BTD, out_BTHV):
        x = Deferred(x_BTD, None, EPS)
        unit = combined(x, [kv, kv], lambda gate, up: gate * up)
        return linear(x, q), linear(x, join([q, kv])), linear(out_BTHV, o, residual=x_BTD), unit

    assert str(jax.make_jaxpr(run)(x_BTD, out_BTHV)).count("few_rows_several") >= 4
    found = run(x_BTD, out_BTHV)
    with pretend("cpu"):
        assert "few_rows" not in str(jax.make_jaxpr(lambda *args: run(*args))(x_BTD, out_BTHV))
        expected = jax.jit(lambda *args: run(*args))(x_BTD, out_BTHV)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, 1e-6)
    z = unscaled_norm(x_BTD)
    separate = [np.einsum("btd,hqd->bthq", z, q[...]).reshape(2, length, -1), np.einsum("btd,fd->btf", z, kv[...])]
    assert_close(found[1], np.concatenate(separate, -1), 1e-6)


def test_a_norm_with_its_scale_is_taken_before(as_on_hopper):
    """Only norms whose scale is part of the weights are taken by the kernel."""
    weight, x = param(0, (64, 10), ("embed", None)), jax.random.normal(jax.random.key(0), (1, 1, 64))
    norm = RMSNorm(64, ModelConfig(), eps=EPS)
    norm.scale[...] = jnp.linspace(0.5, 2, 64)
    expected = linear(norm(x), weight)
    assert_close(linear(norm.deferred(x), weight), expected, 1e-6)
    holder = nnx.Module()
    holder.weight = matrix(nnx.Rngs(params=jax.random.key(0)), (64, 10), ("embed", None), 1, ModelConfig(init_std=0.1))
    norm.fold_scale(holder, ["weight"])
    folded = outputs_first(holder.weight)
    assert "few_rows_single" in str(jax.make_jaxpr(lambda x: linear(norm.deferred(x), folded))(x))
    assert_close(linear(norm.deferred(x), folded), expected, 1e-6)
    with pretend("cpu"):
        assert_close(linear(norm.deferred(x), folded), expected, 1e-6)


def test_scales_of_a_stack_are_folded_layer_by_layer():
    weight = matrix(nnx.Rngs(params=jax.random.key(0)), (6, 2, 5), ("embed", "heads", None), 1, ModelConfig())
    value, scale = jax.random.normal(jax.random.key(0), (3, 6, 2, 5)), jnp.arange(18.0).reshape(3, 6)
    stack = nnx.Param(value, info=weight.get_metadata()["info"].stacked())
    np.testing.assert_array_equal(scaled(stack, scale)[...], value * scale[:, :, None, None])


@pytest.mark.parametrize("num_rows", [1, 2])
def test_it_runs_under_vmap(num_rows):
    """Parallel heads share their input and differ in weights."""
    x, (w, u), _ = operands(num_rows, 64, 6)
    found = jax.vmap(lambda w: few_rows.products(x, [w], EPS))(jnp.stack([w, u]))
    z = unscaled_norm(x)
    assert_close(found, np.stack([z @ np.asarray(w).T, z @ np.asarray(u).T]), 1e-6)


@pytest.mark.parametrize(
    ("num_rows", "dtype", "contracted", "reason"),
    [
        (8, jnp.bfloat16, 64, ""),
        (9, jnp.bfloat16, 64, "8 rows"),
        (1, jnp.float16, 64, "bfloat16 and float32"),
        (1, jnp.float32, 32, "at least 64"),
    ],
)
def test_other_operands_are_refused(num_rows, dtype, contracted, reason, as_on_hopper):
    found = few_rows.unsupported_reason(num_rows, contracted, dtype)
    assert reason in found and bool(found) == bool(reason)


def test_other_devices_are_refused():
    with pretend("gpu", "8.0"):
        assert "compute capability 9.0" in few_rows.unsupported_reason(1, 64, jnp.bfloat16)


@hopper_only
@pytest.mark.parametrize("num_rows", [1, 2, 4, 8])
@pytest.mark.parametrize("contracted", [1024, 4096, 1000])
def test_on_a_gpu_as_other_operations(num_rows, contracted):
    x, (w, u), added = operands(num_rows, contracted, 1824, jnp.bfloat16)
    unit = functools.partial(gated_unit, config=GatedUnitConfig())

    def dot(x, w):
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)

    def separate(x, w, u, added):
        z = Deferred(x, None, EPS).normed
        return unit(dot(z, w), dot(z, u)) + added

    found = jax.jit(lambda x, w, u, added: few_rows.products(x, [w, u], EPS, unit, added))(x, w, u, added)
    assert_close(found, jax.jit(separate)(x, w, u, added), 1e-2)


# One row with all its experts, rows with experts in common, and numbers that no block divides.
@pytest.mark.parametrize(
    ("num_rows", "contracted", "num_outputs"), [(1, 64, 64), (3, 100, 70), (2, 512, 5), (6, 16, 8)]
)
def test_products_with_experts_equal_numpy(num_rows, contracted, num_outputs):
    rng = np.random.default_rng(0)
    x, weights = rng.standard_normal((num_rows, contracted)), rng.standard_normal((2, 7, contracted, num_outputs))
    expert = rng.integers(0, 7, 6)
    x32, w32, u32 = (jnp.asarray(a, jnp.float32) for a in (x, *weights))
    row = np.arange(6) // (6 // num_rows)
    w, u = (np.stack([x[n] @ weight[e] for n, e in zip(row, expert, strict=True)]) for weight in weights)
    assert_close(experts.products(x32, [w32], jnp.asarray(expert)), w, 1e-6)
    found = experts.products(x32, [w32, u32], jnp.asarray(expert), lambda gate, up: gate * up)
    assert_close(found, w * u, 1e-6)


@pytest.mark.parametrize(
    ("num_assignments", "dtype", "reason"),
    [(64, jnp.bfloat16, ""), (65, jnp.bfloat16, "more than 64"), (6, jnp.float16, "bfloat16 and float32")],
)
def test_other_experts_are_refused(num_assignments, dtype, reason, as_on_hopper):
    found = experts.unsupported_reason(num_assignments, 64, dtype)
    assert reason in found and bool(found) == bool(reason)
    with pretend("cpu"):
        assert experts.unsupported_reason(6, 64, jnp.bfloat16)


@hopper_only
def test_experts_on_a_gpu_as_other_operations():
    """The size of configs/moe_4b.py."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, u = (
        jax.random.normal(key, shape, jnp.bfloat16) * 0.1
        for key, shape in zip(keys, [(2, 2048), (64, 2048, 1408), (64, 2048, 1408)], strict=True)
    )
    expert = jnp.array([5, 60, 1, 2, 63, 0, 5, 6, 7, 8, 9, 0])
    unit = functools.partial(gated_unit, config=GatedUnitConfig())

    def separate(x, w, u):
        y, z = (jnp.einsum("ak,akf->af", jnp.repeat(x, 6, axis=0), weight[expert]) for weight in (w, u))
        return unit(y, z)

    found = jax.jit(lambda *args: experts.products(args[0], args[1:], expert, unit))(x, w, u)
    assert_close(found, jax.jit(separate)(x, w, u), 1e-2)
