"""Grouped-query attention (2305.13245) with optional query/key norm and biases: Llama, Qwen, GLM blocks.

Shape letters: B rows, T positions (one device's queries, S its keys: those of whole rows; S slots of a cache), D model,
H query heads, G key/value heads, Q head dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig
from mtp_jax.kernels.attention import attend, attend_cached
from mtp_jax.layers import rope
from mtp_jax.layers.cache import Slots, write
from mtp_jax.layers.linear import cast, linear
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import matrix, vector
from mtp_jax.sharding import first_position, local, whole_length


class HeadCache(NamedTuple):
    """Keys and values of the G heads, [B, S, G, Q] each."""

    k_BSGQ: jax.Array
    v_BSGQ: jax.Array


class GroupedQueryAttention(nnx.Module):
    """H query heads share G key and value heads; the first rotary_fraction of each head is rotated."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        dim, heads, groups, size = config.embed_dim, config.num_heads, config.num_kv_heads, config.head_dim
        self.q = matrix(rngs, (dim, heads, size), ("embed", "heads", None), 1, config)
        self.k = matrix(rngs, (dim, groups, size), ("embed", "kv_heads", None), 1, config)
        self.v = matrix(rngs, (dim, groups, size), ("embed", "kv_heads", None), 1, config)
        self.o = matrix(rngs, (heads, size, dim), ("heads", None, "embed"), 2, config)
        if config.qkv_bias:
            self.q_bias = vector((heads, size), ("heads", None), 0.0, config)
            self.k_bias = vector((groups, size), ("kv_heads", None), 0.0, config)
            self.v_bias = vector((groups, size), ("kv_heads", None), 0.0, config)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config)
            self.k_norm = RMSNorm(size, config)

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; see `attend` for who sees whom."""
        q_BTHQ, k_BTGQ, v_BTGQ = self._project(x_BTD, positions_BT)
        heads, groups = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
        attention = local(self._attend, (heads, groups, groups, ("batch", None)), heads)
        out_BTHQ = attention(q_BTHQ, k_BTGQ, v_BTGQ, segments_BT)
        return linear(out_BTHQ, self.o)

    def empty_cache(self, num_rows: int, num_slots: int, dtype: DTypeLike) -> HeadCache:
        """Room for the keys and values of `num_slots` tokens a row."""
        shape = (num_rows, num_slots, self.config.num_kv_heads, self.config.head_dim)
        return HeadCache(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))

    def decode(self, x_BTD: jax.Array, slots: Slots, cache: HeadCache, start: int = 0) -> tuple[jax.Array, HeadCache]:
        """New tokens [B, T, D] -> [B, T - start, D], without the first, and the cache with the entries of all."""
        q_BTHQ, k_BTGQ, v_BTGQ = self._project(x_BTD, slots.positions_BT)
        cache = HeadCache(write(cache.k_BSGQ, k_BTGQ, slots.slots_BT), write(cache.v_BSGQ, v_BTGQ, slots.slots_BT))
        k_BSGQ, v_BSGQ = (x[:, : slots.num_visible] for x in cache)
        last_BT = slots.positions_BT[:, start:]
        out_BTHQ = attend_cached(q_BTHQ[:, start:], k_BSGQ, v_BSGQ, last_BT, self.config.head_dim**-0.5)
        return linear(out_BTHQ, self.o), cache

    def _project(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries [B, T, H, Q], keys and values [B, T, G, Q]; queries and keys normed and rotated."""
        config, dtype = self.config, x_BTD.dtype
        q_BTHQ, k_BTGQ, v_BTGQ = (linear(x_BTD, weight) for weight in (self.q, self.k, self.v))
        if config.qkv_bias:
            q_BTHQ = q_BTHQ + cast(self.q_bias, dtype)
            k_BTGQ = k_BTGQ + cast(self.k_bias, dtype)
            v_BTGQ = v_BTGQ + cast(self.v_bias, dtype)
        if config.qk_norm:
            q_BTHQ, k_BTGQ = self.q_norm(q_BTHQ), self.k_norm(k_BTGQ)
        return self._rotate(q_BTHQ, positions_BT), self._rotate(k_BTGQ, positions_BT), v_BTGQ

    def _attend(self, q_BTHQ, k_BTGQ, v_BTGQ, segments_BS):
        """One device's queries over whole rows: keys and values of its groups are collected over the context axis."""
        k_BSGQ, v_BSGQ = whole_length(k_BTGQ), whole_length(v_BTGQ)
        scale, first = self.config.head_dim**-0.5, first_position(q_BTHQ.shape[1])
        return attend(q_BTHQ, k_BSGQ, v_BSGQ, segments_BS, scale, first, self.config.attention_kernel)

    def _rotate(self, x_BTHQ: jax.Array, positions_BT: jax.Array) -> jax.Array:
        rotary = round(self.config.rotary_fraction * self.config.head_dim)
        rotated = rope.rotate(x_BTHQ[..., :rotary], positions_BT, self.config)
        return jnp.concatenate([rotated, x_BTHQ[..., rotary:]], axis=-1)
