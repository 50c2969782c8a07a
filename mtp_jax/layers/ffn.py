"""SwiGLU feed-forward (2002.05202): (silu(x W_gate) * (x W_up)) W_down."""

import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.linear import linear
from mtp_jax.layers.param import matrix
from mtp_jax.sharding import constrain


class SwiGLU(nnx.Module):
    """A dense feed-forward of the given width; [..., D] -> [..., D]."""

    def __init__(self, width: int, config: ModelConfig, rngs: nnx.Rngs):
        dim = config.embed_dim
        self.gate = matrix(rngs, (dim, width), ("embed", "ffn"), 1, config)
        self.up = matrix(rngs, (dim, width), ("embed", "ffn"), 1, config)
        self.down = matrix(rngs, (width, dim), ("ffn", "embed"), 1, config)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = jax.nn.silu(linear(x_BTD, self.gate)) * linear(x_BTD, self.up)
        return linear(constrain(h_BTF, "batch", "length", "ffn"), self.down)
