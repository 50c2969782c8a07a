"""Total variation losses between the distributions of drafts and of the main model.

Rejection sampling accepts a draft with probability 1 - TV(p, q) (2211.17192, theorem 3.5), so these losses optimize
acceptance directly (Bebop, 2606.12370). The teacher p is the main model's distribution of the same token, detached.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import Logits, Loss


def _distance(chunk: Logits) -> jax.Array:
    """Returns 1/2 sum_v |p_v - q_v|, float32[...]."""
    assert chunk.teacher is not None, "a total variation needs a teacher (Term.teacher_KBTD)"
    probs = jnp.exp(chunk.logits - chunk.log_z[..., None])
    return 0.5 * jnp.abs(jax.nn.softmax(chunk.teacher) - probs).sum(axis=-1)


@dataclass(frozen=True)
class TotalVariation(Loss):
    """TV(p, q) of each depth separately."""

    def value(self, chunk: Logits) -> jax.Array:
        return _distance(chunk)


@dataclass(frozen=True)
class EndToEndTotalVariation(Loss):
    """1 - prod_{i <= j} (1 - TV_i) at depth j, the probability that draft j is not used.

    With scales 1 / K the term is 1 - (1/K) sum_j prod_{i <= j} (1 - TV_i) (2606.12370). A chunk holds the logits of all
    K depths, for 1 / K as many positions.
    """

    is_joint = True

    def value(self, chunk: Logits) -> jax.Array:
        return 1.0 - jnp.cumprod(1.0 - _distance(chunk), axis=0)
