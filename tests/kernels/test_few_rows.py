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
from mtp_jax.layers.ffn import gated_unit
from mtp_jax.layers.linear import join, linear, outputs_first, unembedded
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import matrix
from tests.kernels.hopper import assert_close, hopper_only
from tests.reference.norm import rms_norm

EPS = 1e-3


def silu(x):
    return x / (1 + np.exp(-x))


def operands(num_rows, contracted, num_outputs, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), dtype)  # noqa: E731
    weights = [0.1 * draw(num_outputs, contracted) for _ in range(2)]
    return draw(num_rows, contracted), weights, jnp.float32(1 + rng.random(contracted)), draw(num_rows, num_outputs)


# One piece, several, several groups of them, and numbers that no block divides.
SHAPES = [(1, 32, 8), (3, 512, 6), (2, 4096, 4), (8, 20, 10), (4, 2600, 5), (3, 16, 4098)]


@pytest.mark.parametrize(("num_rows", "contracted", "num_outputs"), SHAPES)
def test_products_equal_numpy(num_rows, contracted, num_outputs):
    x, (w, u), scale, added = operands(num_rows, contracted, num_outputs)
    w64, u64, x64 = (np.asarray(a, np.float64) for a in (w, u, x))
    assert_close(few_rows.products(x, [w]), x64 @ w64.T, 1e-6)
    assert_close(few_rows.products(x, [w], added_NF=added), x64 @ w64.T + np.asarray(added), 1e-6)
    unit = functools.partial(gated_unit, config=GatedUnitConfig())
    found = few_rows.products(x, [w, u], few_rows.Norm(scale, EPS), unit, added)
    z = rms_norm({"scale": np.asarray(scale)}, x64, EPS)
    assert_close(found, silu(z @ w64.T) * (z @ u64.T) + np.asarray(added), 1e-6)


def test_bfloat16_is_rounded_where_separate_operations_round():
    """The norm, each product and the sum; the logits are float32."""
    x, (w, _), scale, added = operands(2, 64, 8, jnp.bfloat16)
    norm = RMSNorm(64, ModelConfig(), eps=EPS)
    norm.scale[...] = scale
    product = jax.lax.dot_general(norm(x), w, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
    found = few_rows.products(x, [w], few_rows.Norm(scale, EPS), dtype=jnp.float32)
    assert found.dtype == jnp.float32
    assert_close(found, product, 1e-6)
    found = few_rows.products(x, [w], few_rows.Norm(scale, EPS), added_NF=added)
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, product.astype(jnp.bfloat16) + added)


def param(key, shape, axes, in_dims=1):
    rngs = nnx.Rngs(params=jax.random.key(key))
    return outputs_first(matrix(rngs, shape, axes, in_dims, ModelConfig(init_std=0.1)))


@pytest.mark.parametrize("is_deferred", [False, True])
def test_linear_uses_the_kernel_with_norm_and_residual(is_deferred, as_on_hopper):
    """Of weights with several output dims and with several contracted dims, joined ones, and the output head."""
    norm = RMSNorm(24, ModelConfig(), eps=EPS)
    norm.scale[...] = jnp.linspace(0.5, 2, 24)
    q, kv = param(0, (24, 2, 6), ("embed", "heads", None)), param(1, (24, 10), ("embed", None))
    o = param(2, (2, 6, 24), ("heads", None, "embed"), 2)
    x_BTD, out_BTHV = (
        jax.random.normal(jax.random.key(0), (2, 3, 24)),
        jax.random.normal(jax.random.key(1), (2, 3, 2, 6)),
    )
    head_VD = jax.random.normal(jax.random.key(2), (30, 24))

    def run(x_BTD, out_BTHV):
        x = norm.deferred(x_BTD) if is_deferred else x_BTD
        return linear(x, q), linear(x, join([q, kv])), linear(out_BTHV, o, residual=x_BTD), unembedded(x, head_VD)

    assert str(jax.make_jaxpr(run)(x_BTD, out_BTHV)).count("few_rows") >= 4
    found = run(x_BTD, out_BTHV)
    with pretend("cpu"):
        assert "few_rows" not in str(jax.make_jaxpr(lambda *args: run(*args))(x_BTD, out_BTHV))
        expected = jax.jit(lambda *args: run(*args))(x_BTD, out_BTHV)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert_close(a, b, 1e-6)
    joined = np.concatenate([np.asarray(found[0]).reshape(2, 3, 12), linear(x_BTD, kv)], -1)
    if not is_deferred:
        assert_close(found[1], joined, 1e-6)


def test_it_runs_under_vmap(as_on_hopper):
    """Parallel heads share their input and differ in weights."""
    x, (w, u), scale, _ = operands(2, 24, 6)
    stacked = jnp.stack([w, u])
    found = jax.vmap(lambda w, s: few_rows.products(x, [w], few_rows.Norm(s, EPS)))(
        stacked, jnp.stack([scale, 2 * scale])
    )
    z = rms_norm({"scale": np.asarray(scale)}, np.asarray(x, np.float64), EPS)
    assert_close(found, np.stack([z @ np.asarray(w).T, 2 * z @ np.asarray(u).T]), 1e-6)


@pytest.mark.parametrize(
    ("num_rows", "dtype", "is_normed", "contracted", "reason"),
    [
        (8, jnp.bfloat16, True, 8192, ""),
        (9, jnp.bfloat16, False, 64, "8 rows"),
        (1, jnp.float16, False, 64, "bfloat16 and float32"),
        (1, jnp.float32, True, 8193, "8192 dims"),
        (1, jnp.float32, False, 8193, ""),
    ],
)
def test_other_operands_are_refused(num_rows, dtype, is_normed, contracted, reason, as_on_hopper):
    found = few_rows.unsupported_reason(num_rows, contracted, dtype, is_normed)
    assert reason in found and bool(found) == bool(reason)


def test_other_devices_are_refused():
    with pretend("gpu", "8.0"):
        assert "compute capability 9.0" in few_rows.unsupported_reason(1, 64, jnp.bfloat16, False)


@hopper_only
@pytest.mark.parametrize("num_rows", [1, 2, 4, 8])
@pytest.mark.parametrize("contracted", [1024, 4096, 1000])
def test_on_a_gpu_as_other_operations(num_rows, contracted):
    x, (w, u), scale, added = operands(num_rows, contracted, 1824, jnp.bfloat16)
    unit = functools.partial(gated_unit, config=GatedUnitConfig())

    def dot(x, w):
        return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())), preferred_element_type=x.dtype)

    def separate(x, w, u, added):
        norm = RMSNorm(contracted, ModelConfig(), eps=EPS)
        norm.scale[...] = scale
        z = norm(x)
        return unit(dot(z, w), dot(z, u)) + added

    found = jax.jit(lambda x, w, u, a: few_rows.products(x, [w, u], few_rows.Norm(scale, EPS), unit, a))(x, w, u, added)
    assert_close(found, jax.jit(separate)(x, w, u, added), 1e-2)
