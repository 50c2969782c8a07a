"""The kernel that rounds in both orders, interpreted on CPUs: the same values as XLA's operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.kernels import fp8
from mtp_jax.kernels.device import pretend


@pytest.mark.parametrize("is_shifted", [False, True])
def test_the_kernel_rounds_as_xla_does(is_shifted):
    keys = jax.random.split(jax.random.key(0), 2)
    x_BTHD = jax.random.normal(keys[0], (2, 128, 3, 64)) * jnp.exp(jax.random.normal(keys[1], (2, 128, 1, 1)) * 5)
    x_BTHD = x_BTHD.astype(jnp.bfloat16).at[1, 5].set(0)
    factor = jnp.exp2(jnp.arange(256.0).reshape(2, 128, 1, 1) % 7 - 3) if is_shifted else None

    def both(x):
        return fp8.both_orders(x, fp8.rounded(x, (2, 3)), 2, factor)

    expected = jax.jit(both)(x_BTHD)
    jax.clear_caches()
    with pretend("gpu", "9.0"):
        traced = jax.jit(both).trace(x_BTHD)
        assert "rounded_in_both_orders" in str(traced.jaxpr)
        found = traced.lower().compile()(x_BTHD)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.astype(jnp.float32), other.astype(jnp.float32))


def test_other_shapes_are_left_to_xla():
    x_NK = jax.random.normal(jax.random.key(0), (100, 64), jnp.bfloat16)
    jax.clear_caches()
    with pretend("gpu", "9.0"):
        traced = jax.jit(lambda x: fp8.both_orders(x, fp8.rounded(x, (1,)), 1)).trace(x_NK)
        text = str(traced.jaxpr)
        assert "rounded_in_both_orders" not in text and "layout_constraint" in text
        values_NK, turned = traced.lower().compile()(x_NK)
    np.testing.assert_array_equal(values_NK.astype(jnp.float32).T, turned.values.astype(jnp.float32))
    expected = fp8.rounded(x_NK, (1,)).values
    np.testing.assert_array_equal(values_NK.astype(jnp.float32), expected.astype(jnp.float32))
