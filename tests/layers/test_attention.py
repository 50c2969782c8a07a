"""Attention over long rows in blocks of queries; its values against the numpy oracle are in tests/test_model.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.layers import attention


@pytest.mark.parametrize("length", [32, 36])
@pytest.mark.parametrize(("limit", "value"), [("QUERY_BLOCK", 10), ("SCORE_BYTES", 2 * 4 * 36 * 4 * 10)])
def test_blocks_of_queries_change_neither_values_nor_gradients(monkeypatch, length, limit, value):
    keys = jax.random.split(jax.random.key(0), 4)
    q, k = jax.random.normal(keys[0], (2, length, 4, 6)), jax.random.normal(keys[1], (2, length, 2, 6))
    v = jax.random.normal(keys[2], (2, length, 2, 5))
    segments = jnp.sort(jax.random.randint(keys[3], (2, length), 0, 4), axis=1)

    def loss(q, k, v):
        out = attention.attend(q, k, v, segments, 0.3)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    (_, whole), whole_grads = run(q, k, v)
    monkeypatch.setattr(attention, limit, value)  # 10 queries at most: 4 blocks of 8, or of 9
    assert attention._num_blocks(2, length, 4, length) == 4
    (_, blocked), blocked_grads = run(q, k, v)
    np.testing.assert_allclose(blocked, whole, atol=1e-6)
    for a, b in zip(blocked_grads, whole_grads, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
