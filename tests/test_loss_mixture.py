"""A mixture of losses equals the sum of its parts, each as a term of its own."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.losses import CrossEntropy, EndToEndTotalVariation, Mixture, Term, TotalVariation, evaluate


@pytest.mark.parametrize("other", [TotalVariation(), EndToEndTotalVariation()], ids=["tv", "end_to_end"])
def test_a_mixture_is_the_sum_of_its_parts(other):
    keys = jax.random.split(jax.random.key(0), 5)
    hidden, teacher = (jax.random.normal(key, (3, 2, 6, 8)) for key in keys[:2])
    head, weight = jax.random.normal(keys[2], (8, 20)), jax.random.uniform(keys[3], (3, 2, 6))
    targets = jax.random.randint(keys[4], (3, 2, 6), 0, 20)

    def term(loss, hidden, head):
        return Term(loss, hidden, head, targets, weight, jnp.array([1.0, 0.5, 0.25]), teacher_KBTD=teacher)

    def mixed(hidden, head):
        return evaluate([term(Mixture(((0.1, CrossEntropy()), (0.9, other))), hidden, head)], 8)[0]

    def apart(hidden, head):
        each = [(0.1, term(CrossEntropy(), hidden, head)), (0.9, term(other, hidden, head))]
        return evaluate([dataclasses.replace(t, scale_K=w * t.scale_K) for w, t in each], 8)[0]

    got, expected = (jax.value_and_grad(f, (0, 1))(hidden, head) for f in (mixed, apart))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected)
