"""RMSNorm (1910.07467): y = x / sqrt(mean(x^2) + eps) * scale."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.param import scaled, vector


class Deferred(NamedTuple):
    """Array [..., D] whose norm is taken by the products that read it (`layers.linear`); in inference only.

    scale_D: None if it is part of the weights that multiply the array (`RMSNorm.fold_scale`).
    """

    x: jax.Array
    scale_D: jax.Array | None
    eps: float

    @property
    def dtype(self) -> jnp.dtype:
        return self.x.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape

    @property
    def normed(self) -> jax.Array:
        """Returns the norm of the array, computed in float32 and returned in its dtype."""
        y = self.x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
        if self.scale_D is not None:
            y = y * self.scale_D.astype(jnp.float32)
        return y.astype(self.x.dtype)


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last dim, computed in float32 and returned in the input's dtype."""

    def __init__(self, dim: int, config: ModelConfig, axis: str | None = None, eps: float | None = None):
        self.scale = vector((dim,), (axis,), 1.0, config)
        self.eps = config.norm_eps if eps is None else eps

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.deferred(x).normed

    def deferred(self, x: jax.Array) -> Deferred:
        """Returns the array with the norm to be taken."""
        return Deferred(x, self.scale[...] if hasattr(self, "scale") else None, self.eps)

    def fold_scale(self, module: nnx.Module, names: Sequence[str]) -> None:
        """Multiplies the named weights of a module by the scale, and removes the scale; for inference."""
        for name in names:
            setattr(module, name, scaled(getattr(module, name), self.scale[...]))
        del self.scale


def normed(x: jax.Array | Deferred) -> jax.Array:
    """Returns the array, after the norm that it waits for."""
    return x.normed if isinstance(x, Deferred) else x
