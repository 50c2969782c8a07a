"""Transformer block of the decoder and the MTP modules: h + attention(norm(h)), then h + ffn(norm(h))."""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels.device import device
from mtp_jax.layers.attention import attention_of
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.moe import MixtureOfExperts
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.router import RouterStats
from mtp_jax.layers.spec import LayerSpec
from mtp_jax.sharding import constrain, is_on_one_device, num_shards
from mtp_jax.typing import Cache


class Block(nnx.Module):
    """Pre-norm transformer block with a dense or a mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig, spec: LayerSpec, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.embed_dim, config)
        self.attention = attention_of(config)(config, spec.attention, rngs)
        self.ffn_norm = RMSNorm(config.embed_dim, config)
        self.ffn = MixtureOfExperts(config, rngs) if spec.is_moe else SwiGLU(config.ffn_dim, config, rngs)

    def __call__(
        self, h_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, RouterStats | None]:
        """Returns the output [B, T, D] and the router's statistics (None for a dense block).

        Args:
          h_BTD: the residual stream.
          positions_BT: int, for the rotary embedding.
          segments_BT: int, document ids; 0 is padding, which no document attends to and no statistic counts. None:
            every row is one document.
        """
        h_BTD = constrain(h_BTD, "batch", "length", None)
        with jax.named_scope("attention"):
            h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), positions_BT, segments_BT)
        valid_BT = jnp.ones(h_BTD.shape[:2], bool) if segments_BT is None else segments_BT != 0
        out_BTD, stats = self._feed_forward(self.ffn_norm(h_BTD), valid_BT)
        return constrain(h_BTD + out_BTD, "batch", "length", None), stats

    def decode(
        self, h_BTD: jax.Array, slots: Slots, cache: Cache, num_wanted: int | None = None
    ) -> tuple[jax.Array, Cache]:
        """Runs new tokens, which attend to the tokens before them through the cache.

        Args:
          h_BTD: the residual stream.
          num_wanted: number of tokens, at the end of each row, whose output is returned; the others only get their
            cache entries. None: all.

        Returns:
          the output [B, num_wanted, D], and the cache with the entries of all T tokens.
        """
        length = h_BTD.shape[1]
        first = 0 if num_wanted is None else length - num_wanted
        padded = length + -length % num_shards("length")  # equal shards
        if padded > length:
            h_BTD = constrain(jnp.pad(h_BTD, ((0, 0), (0, padded - length), (0, 0))), "batch", "length", None)
            slots = slots.padded(padded - length)
        start = 0 if num_shards("length") > 1 else first
        x_BTD = self.attention_norm.deferred(h_BTD)
        h_BTD, cache = self.attention.decode(x_BTD, slots, cache, start, h_BTD[:, start:])
        x_BTD = self.ffn_norm.deferred(h_BTD)
        if isinstance(self.ffn, MixtureOfExperts):
            h_BTD = h_BTD + self.ffn.decode(x_BTD.normed, slots.is_written_BT[:, start:])
        else:
            h_BTD = self.ffn(x_BTD, h_BTD)
        return constrain(h_BTD[:, first - start : length - start], "batch", "length", None), cache

    def folded(self) -> "Block":
        """Returns the block with the scales of its norms multiplied into weights; unchanged except on a single GPU.

        Products of few rows then take the norm themselves (`layers.norm.Deferred`).
        """
        is_default = self.attention.config.matmul_precision == "default"
        if is_default and is_on_one_device() and device().prefers_outputs_first:
            if names := self.attention.input_weights():
                self.attention_norm.fold_scale(self.attention, names)
            if isinstance(self.ffn, SwiGLU):
                self.ffn_norm.fold_scale(self.ffn, ("gate", "up"))
        return self

    def joined(self) -> "Block":
        """Returns the block with joined weights; see `Attention.joined`."""
        self.attention = self.attention.joined()
        return self

    def _feed_forward(self, x_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats | None]:
        if isinstance(self.ffn, MixtureOfExperts):
            return self.ffn(x_BTD, valid_BT)
        with jax.named_scope("ffn"):
            return self.ffn(x_BTD), None
