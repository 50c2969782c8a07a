"""Weighted sum of losses on the same logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import Logits, Loss


@dataclass(frozen=True)
class Mixture(Loss):
    """sum_j weight_j loss_j, such as 0.1 cross-entropy + 0.9 total variation for drafts (DSpark, 2607.05147).

    The logits of a chunk are computed once and shared by all parts.

    Attributes:
      parts: (weight, loss) pairs.
    """

    parts: tuple[tuple[float, Loss], ...]

    @property
    def is_joint(self) -> bool:  # type: ignore[override]
        return any(loss.is_joint for _, loss in self.parts)

    def value(self, chunk: Logits) -> jax.Array:
        return sum((weight * loss.value(chunk) for weight, loss in self.parts), jnp.float32(0.0))

    def gradient(self, chunk: Logits, cotangent: jax.Array) -> jax.Array:
        return sum((loss.gradient(chunk, weight * cotangent) for weight, loss in self.parts), jnp.float32(0.0))
