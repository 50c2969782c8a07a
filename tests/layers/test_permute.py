"""Rows by expert and back: the same values and gradients as plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.layers import permute

TOKENS, CHOSEN, EXPERTS, DIM = 13, 3, 5, 4


def test_spread_and_combine_equal_plain_indexing_and_its_gradients():
    keys = jax.random.split(jax.random.key(0), 4)
    x_MD = jax.random.normal(keys[0], (TOKENS, DIM))
    gates_MK = jax.random.uniform(keys[1], (TOKENS, CHOSEN))
    expert_N = jax.random.randint(keys[2], (TOKENS * CHOSEN,), 0, EXPERTS)
    order_N, place_N, sizes_E = permute.by_expert(expert_N, EXPERTS)
    np.testing.assert_array_equal(order_N, np.argsort(expert_N, kind="stable"))
    np.testing.assert_array_equal(place_N, np.argsort(order_N))
    np.testing.assert_array_equal(sizes_E, np.bincount(expert_N, minlength=EXPERTS))
    weight_ND = jax.random.normal(keys[3], (TOKENS * CHOSEN, DIM))

    def plain(x_MD, gates_MK):
        y_ND = jnp.tanh(x_MD[order_N // CHOSEN] * weight_ND)
        return (y_ND[place_N].reshape(TOKENS, CHOSEN, DIM) * gates_MK[..., None]).sum(axis=1)

    def ours(x_MD, gates_MK):
        y_ND = jnp.tanh(permute.spread(x_MD, order_N, place_N, CHOSEN) * weight_ND)
        return permute.combine(y_ND, gates_MK, order_N, place_N)

    (expected, pull_expected), (found, pull_found) = (jax.vjp(run, x_MD, gates_MK) for run in (plain, ours))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    cotangent = jnp.cos(jnp.arange(TOKENS * DIM, dtype=jnp.float32)).reshape(TOKENS, DIM)
    for a, b in zip(pull_found(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
