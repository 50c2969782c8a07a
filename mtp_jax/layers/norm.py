"""RMSNorm (1910.07467): y = x / sqrt(mean(x^2) + eps) * scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.param import vector


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim, computed in float32 and returned in the input's dtype."""

    def __init__(self, dim: int, config: ModelConfig, axis: str | None = None, eps: float | None = None):
        self.scale = vector((dim,), (axis,), 1.0, config)
        self.eps = config.norm_eps if eps is None else eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)
