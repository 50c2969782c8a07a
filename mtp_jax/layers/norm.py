"""RMSNorm (1910.07467): y = x / sqrt(mean(x^2) + eps) * scale."""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels import residual_norm
from mtp_jax.layers.param import vector
from mtp_jax.sharding import is_on_one_device


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim, computed in float32 and returned in the input's dtype."""

    def __init__(self, dim: int, config: ModelConfig, axis: str | None = None, eps: float | None = None):
        self.scale = vector((dim,), (axis,), 1.0, config)
        self.eps = config.norm_eps if eps is None else eps

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)

    def decode(self, h_BTD: jax.Array, out_BTD: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """Returns h + out (h if out is None) and its norm, for inference: has no gradient."""
        h_ND = h_BTD.reshape(-1, h_BTD.shape[-1])
        if is_on_one_device() and not residual_norm.unsupported_reason(h_ND):
            out_ND = None if out_BTD is None else out_BTD.reshape(h_ND.shape)
            sum_ND, normed_ND = residual_norm.add_and_norm(h_ND, out_ND, self.scale[...], self.eps)
            return sum_ND.reshape(h_BTD.shape), normed_ND.reshape(h_BTD.shape)
        sum_BTD = h_BTD if out_BTD is None else h_BTD + out_BTD
        return sum_BTD, self(sum_BTD)
