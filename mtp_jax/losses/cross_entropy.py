"""Cross-entropy of the target token, with z-loss."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import Logits, Loss


@dataclass(frozen=True)
class CrossEntropy(Loss):
    """-log p(target) + z_weight * log^2 Z, in nats; the z-loss is that of PaLM (2204.02311, section 5.1)."""

    z_weight: float = 0.0

    def value(self, chunk: Logits) -> jax.Array:
        nll = chunk.log_z - chunk.target_logit
        return nll + self.z_weight * jnp.square(chunk.log_z) if self.z_weight else nll

    def softmax_factor(self, log_z: jax.Array) -> jax.Array | float:
        return 1.0 + 2.0 * self.z_weight * log_z if self.z_weight else 1.0

    def gradient(self, chunk: Logits, cotangent: jax.Array) -> jax.Array:
        """Returns (softmax * (1 + 2 z_weight log Z) - one_hot(target)) * cotangent."""
        is_target = jnp.arange(chunk.logits.shape[-1]) == chunk.targets[..., None]
        probs = jnp.exp(chunk.logits - chunk.log_z[..., None])
        return (probs * self.softmax_factor(chunk.log_z[..., None]) - is_target) * cotangent[..., None]
