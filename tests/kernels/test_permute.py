"""Rows by expert and back: both backends have the values and gradients of plain indexing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.kernels.device import pretend
from mtp_jax.kernels.permute import gather, sort, through_experts

TOKENS, CHOSEN, EXPERTS, DIM = 13, 3, 5, 4


def operands():
    keys = jax.random.split(jax.random.key(0), 4)
    x_MD = jax.random.normal(keys[0], (TOKENS, DIM))
    gates_MK = jax.random.uniform(keys[1], (TOKENS, CHOSEN))
    chosen_MK = jax.random.randint(keys[2], (TOKENS, CHOSEN), 0, EXPERTS)
    return x_MD, gates_MK, chosen_MK, jax.random.normal(keys[3], (EXPERTS, DIM))


@pytest.mark.parametrize("backend", [gather, sort])
def test_rows_are_sorted_by_expert(backend):
    x_MD, _, chosen_MK, _ = operands()
    expert_N = chosen_MK.reshape(-1)
    rows_ND, sizes_E, _ = backend.dispatch(x_MD, expert_N, EXPERTS, CHOSEN)
    np.testing.assert_array_equal(rows_ND, x_MD[np.argsort(expert_N, kind="stable") // CHOSEN])
    np.testing.assert_array_equal(sizes_E, np.bincount(expert_N, minlength=EXPERTS))


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # by sort, by gather
def test_each_token_goes_through_its_experts(platform):
    x_MD, gates_MK, chosen_MK, scale_ED = operands()

    def experts(rows_ND, sizes_E):
        return jnp.tanh(rows_ND * jnp.repeat(scale_ED, sizes_E, axis=0, total_repeat_length=len(rows_ND)))

    def ours(x_MD, gates_MK):
        return through_experts(x_MD[None], gates_MK[None], chosen_MK[None], EXPERTS, experts)[0]

    def plain(x_MD, gates_MK):
        return (jnp.tanh(x_MD[:, None] * scale_ED[chosen_MK]) * gates_MK[..., None]).sum(axis=1)

    with pretend(platform):
        found, pull_found = jax.vjp(ours, x_MD, gates_MK)
    expected, pull_expected = jax.vjp(plain, x_MD, gates_MK)
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    cotangent = jnp.cos(jnp.arange(TOKENS * DIM, dtype=jnp.float32)).reshape(TOKENS, DIM)
    for a, b in zip(pull_found(cotangent), pull_expected(cotangent), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
