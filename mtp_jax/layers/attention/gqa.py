"""Grouped-query attention (2305.13245) with optional query/key norm and biases, as in Llama, Qwen and GLM.

Shape letters: B rows, T positions (queries of one device), S keys of whole rows or slots of a cache, D model,
H query heads, G key/value heads, Q query/key dim, V value dim.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig, UserError
from mtp_jax.kernels.attention import Mask, attend, attend_cached
from mtp_jax.layers import rope
from mtp_jax.layers.attention.base import Attention
from mtp_jax.layers.cache import Slots, num_slots, read_and_write
from mtp_jax.layers.linear import cast, linear
from mtp_jax.layers.norm import Deferred, RMSNorm
from mtp_jax.layers.param import matrix, vector
from mtp_jax.layers.spec import AttentionSpec
from mtp_jax.sharding import first_position, local, whole_length


class HeadCache(NamedTuple):
    """KV cache: keys [B, S, G, Q] and values [B, S, G, V]."""

    k_BSGQ: jax.Array
    v_BSGV: jax.Array


class GroupedQueryAttention(Attention):
    """Attention of H query heads over G key/value heads; the first rotary_fraction of a head's dims is rotated."""

    def __init__(self, config: ModelConfig, spec: AttentionSpec, rngs: nnx.Rngs):
        super().__init__(config, spec, rngs)
        dim, heads, groups = config.embed_dim, config.num_heads, spec.num_kv_heads
        size, value = config.head_dim, self.value_dim(config)
        self.q = matrix(rngs, (dim, heads, size), ("embed", "heads", None), 1, config)
        self.k = matrix(rngs, (dim, groups, size), ("embed", "kv_heads", None), 1, config)
        self.v = matrix(rngs, (dim, groups, value), ("embed", "kv_heads", None), 1, config)
        self.o = matrix(rngs, (heads, value, dim), ("heads", None, "embed"), 2, config)
        if config.qkv_bias:
            self.q_bias = vector((heads, size), ("heads", None), 0.0, config)
            self.k_bias = vector((groups, size), ("kv_heads", None), 0.0, config)
            self.v_bias = vector((groups, value), ("kv_heads", None), 0.0, config)
        if config.output_bias:
            self.o_bias = vector((dim,), (None,), 0.0, config)
        if config.qk_norm:
            self.q_norm = RMSNorm(size, config)
            self.k_norm = RMSNorm(size, config)
        if spec.has_sinks:
            self.sinks = vector((heads,), ("heads",), 0.0, config)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        rotary = config.rotary_fraction * config.head_dim
        if rotary != round(rotary) or rotary % 2:
            raise UserError(
                f"model.rotary_fraction={config.rotary_fraction}: rotates {rotary:g} of model.head_dim="
                f"{config.head_dim} dimensions; they come in pairs, use a fraction that gives an even number"
            )
        for name, groups in _kv_heads(config).items():
            if config.num_heads % groups:
                raise UserError(f"{name}={groups}: does not divide model.num_heads={config.num_heads}")

    @classmethod
    def sharded_sizes(cls, config: ModelConfig) -> list[tuple[str, str, int]]:
        return [("kv_heads", name, groups) for name, groups in _kv_heads(config).items()]

    @classmethod
    def multiplied_dims(cls, config: ModelConfig) -> int:
        return config.head_dim + cls.value_dim(config)

    @classmethod
    def cache_size(cls, config: ModelConfig, spec: AttentionSpec) -> int:
        """Returns the number of elements of all keys and values of a token."""
        return spec.num_kv_heads * (config.head_dim + cls.value_dim(config))

    @classmethod
    def value_dim(cls, config: ModelConfig) -> int:
        return config.value_head_dim or config.head_dim

    def input_weights(self) -> Sequence[str]:
        return "q", "k", "v"

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        q_BTHQ, k_BTGQ, v_BTGV = self._project(x_BTD, positions_BT)
        heads, groups = ("batch", "length", "heads", None), ("batch", "length", "kv_heads", None)
        sinks_H = self.sinks[...] if self.spec.has_sinks else None
        attention = local(self._attend, (heads, groups, groups, ("batch", None), ("heads",)), heads)
        return self._output(attention(q_BTHQ, k_BTGQ, v_BTGV, segments_BT, sinks_H))

    def empty_cache(self, num_rows: int, num_positions: int, num_new: int, dtype: DTypeLike) -> HeadCache:
        shape = (num_rows, num_slots(self.spec.window, num_positions, num_new), self.spec.num_kv_heads)
        value = self.value_dim(self.config)
        return HeadCache(jnp.zeros((*shape, self.config.head_dim), dtype), jnp.zeros((*shape, value), dtype))

    def decode(
        self,
        x_BTD: jax.Array | Deferred,
        slots: Slots,
        cache: HeadCache,
        start: int = 0,
        residual_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, HeadCache]:
        q_BTHQ, k_BTGQ, v_BTGV = self._project(x_BTD, slots.positions_BT)
        window, last_BT = self.spec.window, slots.positions_BT[:, start:]
        cache, (k_BSGQ, v_BSGV), key_BS = read_and_write(cache, HeadCache(k_BTGQ, v_BTGV), slots, window)
        sinks_H = self.sinks[...] if self.spec.has_sinks else None
        scale = self.config.head_dim**-0.5
        out_BTHV = attend_cached(q_BTHQ[:, start:], k_BSGQ, v_BSGV, last_BT, key_BS, window, scale, sinks_H)
        return self._output(out_BTHV, residual_BTD), cache

    def _project(self, x_BTD: jax.Array | Deferred, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Returns queries [B, T, H, Q], keys [B, T, G, Q], both normed and rotated, and values [B, T, G, V]."""
        config, dtype = self.config, x_BTD.dtype
        q_BTHQ, k_BTGQ, v_BTGV = (linear(x_BTD, weight) for weight in (self.q, self.k, self.v))
        if config.qkv_bias:
            q_BTHQ = q_BTHQ + cast(self.q_bias, dtype)
            k_BTGQ = k_BTGQ + cast(self.k_bias, dtype)
            v_BTGV = v_BTGV + cast(self.v_bias, dtype)
        if config.qk_norm:
            q_BTHQ, k_BTGQ = self.q_norm(q_BTHQ), self.k_norm(k_BTGQ)
        if config.value_scale != 1:
            v_BTGV = v_BTGV * config.value_scale
        return self._rotate(q_BTHQ, positions_BT), self._rotate(k_BTGQ, positions_BT), v_BTGV

    def _attend(self, q_BTHQ, k_BTGQ, v_BTGV, segments_BS, sinks_H):
        """Attention of one device's queries over whole rows; keys and values are gathered over the context axis."""
        mask = Mask(segments_BS, first_position(q_BTHQ.shape[1]), self.spec.window)
        scale, kernel = self.config.head_dim**-0.5, self.config.attention_kernel
        return attend(q_BTHQ, whole_length(k_BTGQ), whole_length(v_BTGV), mask, scale, sinks_H, kernel)

    def _output(self, out_BTHV: jax.Array, residual_BTD: jax.Array | None = None) -> jax.Array:
        out_BTD = linear(out_BTHV, self.o, residual=residual_BTD)
        return out_BTD + cast(self.o_bias, out_BTD.dtype) if self.config.output_bias else out_BTD

    def _rotate(self, x_BTHQ: jax.Array, positions_BT: jax.Array) -> jax.Array:
        rotary = round(self.config.rotary_fraction * self.config.head_dim)
        rotated = rope.rotate(x_BTHQ[..., :rotary], positions_BT, self.spec.rope)
        return jnp.concatenate([rotated, x_BTHQ[..., rotary:]], axis=-1)


def _kv_heads(config: ModelConfig) -> dict[str, int]:
    """Returns the number of key/value heads by the config field that sets it."""
    found = {"model.num_kv_heads": config.num_kv_heads}
    if config.local.window and config.local.num_kv_heads:
        found["model.local.num_kv_heads"] = config.local.num_kv_heads
    return found
