"""Multi-head latent attention (DeepSeek-V2, 2405.04434, eqs. 9-19).

Shape letters: B rows, T positions (one device's queries, S its keys: those of whole rows; S slots of a cache), D model,
H heads, N nope dim, R rotary dim, V value dim, X = N + V, C key/value latent, W = C + R numbers a token in a cache.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig
from mtp_jax.kernels.attention import attend, attend_cached
from mtp_jax.kernels.device import device
from mtp_jax.layers import rope
from mtp_jax.layers.cache import Slots, write
from mtp_jax.layers.linear import cast, linear
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import matrix
from mtp_jax.sharding import constrain, first_position, local, whole_length


class MultiHeadLatentAttention(nnx.Module):
    """Keys and values come from one latent of C dims and one rotary key of R dims a token, shared by all heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        dim, heads = config.embed_dim, config.num_heads
        nope, rotary, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
        if config.q_lora_rank:
            self.q_a = matrix(rngs, (dim, config.q_lora_rank), ("embed", None), 1, config)
            self.q_a_norm = RMSNorm(config.q_lora_rank, config, eps=config.latent_norm_eps)
            self.q_b = matrix(rngs, (config.q_lora_rank, heads, nope + rotary), ("embed", "heads", None), 1, config)
        else:
            self.q = matrix(rngs, (dim, heads, nope + rotary), ("embed", "heads", None), 1, config)
        self.kv_a = matrix(rngs, (dim, config.kv_lora_rank + rotary), ("embed", None), 1, config)
        self.kv_a_norm = RMSNorm(config.kv_lora_rank, config, eps=config.latent_norm_eps)
        self.kv_b = matrix(rngs, (config.kv_lora_rank, heads, nope + value), ("embed", "heads", None), 1, config)
        self.o = matrix(rngs, (heads, value, dim), ("heads", None, "embed"), 2, config)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; see `attend` for who sees whom."""
        q_BTHQ = self.queries(x_BTD, positions_BT)
        latent_BTC, rotary_BTR = self.latents(x_BTD, positions_BT)
        # Each device expands the latents of whole rows to keys and values of its own heads.
        attention = local(
            self._attend,
            (
                ("batch", "length", "heads", None),
                ("batch", "length", None),
                ("batch", "length", None),
                (None, "heads", None),
                ("batch", None),
            ),
            ("batch", "length", "heads", None),
        )
        out_BTHV = attention(q_BTHQ, latent_BTC, rotary_BTR, cast(self.kv_b, x_BTD.dtype), segments_BT)
        return linear(out_BTHV, self.o)

    def _attend(self, q_BTHQ, latent_BTC, rotary_BTR, kv_b_CHX, segments_BS):
        """One device's queries over whole rows.

        The latent is what crosses the context axis, and its gradient what comes back: C + R numbers a token, where keys
        and values are H (N + R + V). Left to the compiler the gradients of keys and values would cross.
        """
        k_BSHQ, v_BSHV = self._expand(whole_length(latent_BTC), whole_length(rotary_BTR), kv_b_CHX)
        scale, first = rope.mla_softmax_scale(self.config), first_position(q_BTHQ.shape[1])
        return attend(q_BTHQ, k_BSHQ, v_BSHV, segments_BS, scale, first, self.config.attention_kernel)

    def _expand(self, latent_BSC, rotary_BSR, kv_b_CHX):
        """Keys [B, S, H, N + R] and values [B, S, H, V] of every head."""
        nope = self.config.qk_nope_head_dim
        kv_BSHX = jnp.einsum("bsc,chx->bshx", latent_BSC, kv_b_CHX)
        k_nope_BSHN, v_BSHV = kv_BSHX[..., :nope], kv_BSHX[..., nope:]
        rotary_BSHR = jnp.broadcast_to(rotary_BSR[:, :, None], (*k_nope_BSHN.shape[:3], rotary_BSR.shape[-1]))
        return jnp.concatenate([k_nope_BSHN, rotary_BSHR], axis=-1), v_BSHV

    def empty_cache(self, num_rows: int, num_slots: int, dtype: DTypeLike) -> jax.Array:
        """[B, S, C + R]: of each token its latent and its rotary key, whatever the number of heads."""
        return jnp.zeros((num_rows, num_slots, self.config.kv_lora_rank + self.config.qk_rope_head_dim), dtype)

    def decode(
        self, x_BTD: jax.Array, slots: Slots, cache_BSW: jax.Array, start: int = 0
    ) -> tuple[jax.Array, jax.Array]:
        """New tokens [B, T, D] -> [B, T - start, D], without the first, and the cache with the entries of all."""
        last_BT = slots.positions_BT[:, start:]
        q_BTHQ = self.queries(x_BTD[:, start:], last_BT)
        entries_BTW = jnp.concatenate(self.latents(x_BTD, slots.positions_BT), axis=-1)
        cache_BSW = write(cache_BSW, entries_BTW, slots.slots_BT)
        seen_BSW = cache_BSW[:, : slots.num_visible]
        attention = self._absorbed if self._absorbs(q_BTHQ.shape[1]) else self._expanded
        out_BTHV = attention(q_BTHQ, seen_BSW, cast(self.kv_b, x_BTD.dtype), last_BT)
        return linear(out_BTHV, self.o), cache_BSW

    def _absorbs(self, num_queries: int) -> bool:
        """Which form takes fewer multiplications for each entry seen: absorbed, T H (2 C + R), or expanded,
        H (C (N + V) + T (N + R + V))."""
        config = self.config
        rank, heads = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
        return num_queries * (2 * rank - heads) <= rank * heads

    def _absorbed(self, q_BTHQ, seen_BSW, kv_b_CHX, last_BT):
        """Queries and outputs go through the up-projections of keys and values, entries are read as they are: they are
        the keys, and their first C numbers the values, of one head that all share (section 2.1.2)."""
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        q_nope_BTHN, key_up_CHN, value_up_CHV = q_BTHQ[..., :nope], kv_b_CHX[..., :nope], kv_b_CHX[..., nope:]
        if device().copies_sliced_weights:  # the whole weight serves both products, half of each on zeros or unused
            q_nope_BTHN = jnp.pad(q_nope_BTHN, ((0, 0),) * 3 + ((0, self.config.v_head_dim),))
            key_up_CHN = value_up_CHV = kv_b_CHX
        q_BTHC = jnp.einsum("bthn,chn->bthc", q_nope_BTHN, key_up_CHN)
        q_BTHW = jnp.concatenate([q_BTHC, q_BTHQ[..., nope:]], axis=-1)
        seen_BS1W = seen_BSW[:, :, None]
        out_BTHW = attend_cached(q_BTHW, seen_BS1W, seen_BS1W, last_BT, rope.mla_softmax_scale(self.config))
        out_BTHV = jnp.einsum("bthc,chv->bthv", out_BTHW[..., :rank], value_up_CHV)
        return out_BTHV[..., -self.config.v_head_dim :]

    def _expanded(self, q_BTHQ, seen_BSW, kv_b_CHX, last_BT):
        """Keys and values of every head, as in training."""
        rank = self.config.kv_lora_rank
        k_BSHQ, v_BSHV = self._expand(seen_BSW[..., :rank], seen_BSW[..., rank:], kv_b_CHX)
        return attend_cached(q_BTHQ, k_BSHQ, v_BSHV, last_BT, rope.mla_softmax_scale(self.config))

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """[B, T, H, N + R], the last R dims rotated."""
        nope = self.config.qk_nope_head_dim
        if self.config.q_lora_rank:
            q_BTHQ = linear(self.q_a_norm(linear(x_BTD, self.q_a)), self.q_b)
        else:
            q_BTHQ = linear(x_BTD, self.q)
        rotated_BTHR = rope.rotate(q_BTHQ[..., nope:], positions_BT, self.config)
        return constrain(jnp.concatenate([q_BTHQ[..., :nope], rotated_BTHR], -1), "batch", "length", "heads", None)

    def latents(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a cache holds: the normalised latent [B, T, C] and the rotated shared key [B, T, R]."""
        kv_BTW = linear(x_BTD, self.kv_a)
        rank = self.config.kv_lora_rank
        rotary_BTR = rope.rotate(kv_BTW[:, :, None, rank:], positions_BT, self.config)[:, :, 0]
        return self.kv_a_norm(kv_BTW[..., :rank]), rotary_BTR
