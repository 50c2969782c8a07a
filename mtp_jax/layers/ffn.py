"""Gated feed-forward (2002.05202): (silu(x W_gate) * (x W_up)) W_down, and variants of its gated linear unit."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import GatedUnitConfig, ModelConfig
from mtp_jax.layers.linear import combined, linear
from mtp_jax.layers.norm import Deferred
from mtp_jax.layers.param import matrix
from mtp_jax.sharding import constrain


class SwiGLU(nnx.Module):
    """Dense feed-forward network of the given width; [..., D] -> [..., D]."""

    def __init__(self, width: int, config: ModelConfig, rngs: nnx.Rngs):
        dim, self.unit = config.embed_dim, config.gated_unit
        self.gate = matrix(rngs, (dim, width), ("embed", "ffn"), 1, config)
        self.up = matrix(rngs, (dim, width), ("embed", "ffn"), 1, config)
        self.down = matrix(rngs, (width, dim), ("ffn", "embed"), 1, config)

    def __call__(self, x_BTD: jax.Array | Deferred, residual_BTD: jax.Array | None = None) -> jax.Array:
        h_BTF = combined(x_BTD, (self.gate, self.up), functools.partial(gated_unit, config=self.unit))
        return linear(constrain(h_BTF, "batch", "length", "ffn"), self.down, residual=residual_BTD)


def gated_unit(gate: jax.Array, up: jax.Array, config: GatedUnitConfig) -> jax.Array:
    """gate * sigmoid(alpha * gate) * (up + offset).

    With config.limit, gate is clipped from above and up to [-limit, limit] (gpt-oss, 2508.10925).
    """
    if config.limit:
        gate, up = jnp.minimum(gate, config.limit), jnp.clip(up, -config.limit, config.limit)
    gate = jax.nn.silu(gate) if config.alpha == 1 else gate * jax.nn.sigmoid(config.alpha * gate)
    return gate * (up + config.offset if config.offset else up)
