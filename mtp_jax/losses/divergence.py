"""Kullback-Leibler divergence from a teacher."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import Logits, Loss


@dataclass(frozen=True)
class KLDivergence(Loss):
    """KL(p || q) = sum_v p_v (log p_v - log q_v), in nats; p is the distribution of the teacher, detached."""

    def value(self, chunk: Logits) -> jax.Array:
        assert chunk.teacher is not None, "a divergence needs a teacher (Term.teacher_KBTD)"
        log_p = jax.nn.log_softmax(chunk.teacher)
        return (jnp.exp(log_p) * (log_p - chunk.logits)).sum(axis=-1) + chunk.log_z

    def gradient(self, chunk: Logits, cotangent: jax.Array) -> jax.Array:
        """Returns (q - p) * cotangent."""
        assert chunk.teacher is not None
        probs = jnp.exp(chunk.logits - chunk.log_z[..., None])
        return (probs - jax.nn.softmax(chunk.teacher)) * cotangent[..., None]
