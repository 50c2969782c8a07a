"""Total variation between drafts and the main model, which is what rejection sampling pays for.

A draft is accepted with probability 1 - TV(p, q) (2211.17192, theorem 3.5), so these losses train acceptance itself
(Bebop, 2606.12370). The teacher p is the main model's distribution at the position the draft speaks of, detached.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import Logits, Loss


def _distance(chunk: Logits) -> jax.Array:
    """1/2 sum_v |p_v - q_v|, float32[...]."""
    assert chunk.teacher is not None, "a total variation needs a teacher (Term.teacher_KBTD)"
    probs = jnp.exp(chunk.logits - chunk.log_z[..., None])
    return 0.5 * jnp.abs(jax.nn.softmax(chunk.teacher) - probs).sum(axis=-1)


@dataclass(frozen=True)
class TotalVariation(Loss):
    """TV(p, q) of each depth by itself."""

    def value(self, chunk: Logits) -> jax.Array:
        return _distance(chunk)


@dataclass(frozen=True)
class EndToEndTotalVariation(Loss):
    """1 - prod_{i <= j} (1 - TV_i) at depth j: the probability that draft j is not used.

    With scales 1 / K the term is 1 - (1/K) sum_j prod_{i <= j} (1 - TV_i) (2606.12370). Every depth's logits of a
    position are in one chunk, K times a chunk's memory for as many fewer positions.
    """

    is_joint = True

    def value(self, chunk: Logits) -> jax.Array:
        return 1.0 - jnp.cumprod(1.0 - _distance(chunk), axis=0)
