"""Sum and norm of a residual stream in one kernel, interpreted on CPUs, compared with the numpy oracle of RMSNorm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels import residual_norm
from mtp_jax.kernels.device import pretend
from mtp_jax.layers.norm import RMSNorm
from tests.kernels.hopper import assert_close
from tests.reference.norm import rms_norm

EPS = 1e-3


@pytest.mark.parametrize("dim", [64, 20])  # 20: no power of two
@pytest.mark.parametrize("has_output", [True, False])
def test_sum_and_norm(dim, has_output, as_on_hopper):
    rng = np.random.default_rng(0)
    h, out = rng.standard_normal((2, 2, 3, dim))
    norm = RMSNorm(dim, ModelConfig(), eps=EPS)
    norm.scale[...] = jnp.asarray(rng.standard_normal(dim), jnp.float32)
    expected = h + out if has_output else h
    run = jax.jit(norm.decode)
    args = (jnp.float32(h), jnp.float32(out)) if has_output else (jnp.float32(h),)
    assert "add_and_norm" in str(jax.make_jaxpr(norm.decode)(*args))
    found, normed = run(*args)
    assert_close(found, expected, 1e-6)
    assert_close(normed, rms_norm({"scale": np.asarray(norm.scale[...])}, expected, EPS), 1e-6)


def test_bfloat16_is_normed_after_rounding_the_sum(as_on_hopper):
    """The next layer adds to the rounded sum."""
    norm = RMSNorm(32, ModelConfig())
    h, out = jax.random.normal(jax.random.key(0), (2, 1, 4, 32), jnp.bfloat16)
    found, normed = jax.jit(norm.decode)(h, out)
    with pretend("cpu"):
        expected, expected_normed = jax.jit(lambda h, out: norm.decode(h, out))(h, out)
    np.testing.assert_array_equal(found, expected)
    assert_close(normed, expected_normed, 1e-2)
    assert normed.dtype == jnp.bfloat16


def test_it_runs_under_vmap(as_on_hopper):
    """Parallel heads share their input and differ in weights."""
    norms = nnx.vmap(lambda scale: RMSNorm(16, ModelConfig()), in_axes=0)(jnp.arange(3.0))
    norms.scale[...] = jnp.arange(48.0).reshape(3, 16)
    h = jax.random.normal(jax.random.key(0), (1, 2, 16))
    _, found = jax.vmap(lambda norm: norm.decode(h))(norms)
    with pretend("cpu"):
        _, expected = jax.vmap(lambda norm: norm.decode(h))(norms)
    assert_close(found, expected, 1e-6)


@pytest.mark.parametrize(("shape", "device"), [((33, 16), "9.0"), ((1, 16384), "9.0"), ((1, 16), "8.0")])
def test_other_operands_and_devices_are_refused(shape, device):
    with pretend("gpu", device):
        assert residual_norm.unsupported_reason(jax.ShapeDtypeStruct(shape, jnp.float32))
