"""Multi-head latent attention (DeepSeek-V2, 2405.04434, eqs. 9-19).

Shape letters: B rows, T positions (queries of one device), S keys of whole rows or slots of a cache, D model,
H heads, N nope dim, R rotary dim, V value dim, X = N + V, C key/value latent, W = C + R numbers per token in a cache.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig, UserError
from mtp_jax.kernels import latent_attention
from mtp_jax.kernels.attention import Mask, attend, attend_cached
from mtp_jax.kernels.device import device
from mtp_jax.layers import rope
from mtp_jax.layers.attention.base import Attention
from mtp_jax.layers.cache import Slots, num_slots, read_and_write
from mtp_jax.layers.linear import cast, join, linear, linear_local
from mtp_jax.layers.norm import Deferred, RMSNorm, normed
from mtp_jax.layers.param import matrix, vector
from mtp_jax.layers.spec import AttentionSpec
from mtp_jax.sharding import constrain, first_position, is_on_one_device, local, whole_length


class MultiHeadLatentAttention(Attention):
    """Attention whose keys and values derive from a latent of C dims and a rotary key of R dims shared by all heads."""

    def __init__(self, config: ModelConfig, spec: AttentionSpec, rngs: nnx.Rngs):
        super().__init__(config, spec, rngs)
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
        shape = config.kv_lora_rank, heads, nope + value
        self.kv_b = matrix(rngs, shape, ("embed", "heads", None), 1, config, is_linear=False)
        self.o = matrix(rngs, (heads, value, dim), ("heads", None, "embed"), 2, config)
        if spec.has_sinks:
            self.sinks = vector((heads,), ("heads",), 0.0, config)

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        if config.qk_rope_head_dim % 2:
            raise UserError(
                f"model.qk_rope_head_dim={config.qk_rope_head_dim}: rotary dimensions come in pairs; use an even number"
            )

    @classmethod
    def sharded_sizes(cls, config: ModelConfig) -> list[tuple[str, str, int]]:
        """Returns the ranks of the latents, which are input dims of the up-projections."""
        return [
            ("embed", "model.q_lora_rank", config.q_lora_rank),
            ("embed", "model.kv_lora_rank", config.kv_lora_rank),
        ]

    @classmethod
    def multiplied_dims(cls, config: ModelConfig) -> int:
        return config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim

    @classmethod
    def cache_size(cls, config: ModelConfig, spec: AttentionSpec) -> int:
        """Returns C + R, independent of the number of heads."""
        return config.kv_lora_rank + config.qk_rope_head_dim

    @classmethod
    def value_dim(cls, config: ModelConfig) -> int:
        return config.v_head_dim

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        q_BTHQ, kv_BTW = self._project(x_BTD)
        q_BTHQ, (latent_BTC, rotary_BTR) = self._queries(q_BTHQ, positions_BT), self._latents(kv_BTW, positions_BT)
        # Each device expands the latents of whole rows to the keys and values of its own heads.
        attention = local(
            self._attend,
            (
                ("batch", "length", "heads", None),
                ("batch", "length", None),
                ("batch", "length", None),
                (None, "heads", None),
                ("batch", None),
                ("heads",),
            ),
            ("batch", "length", "heads", None),
        )
        kv_b_CHX = cast(self.kv_b, x_BTD.dtype)
        out_BTHV = attention(q_BTHQ, latent_BTC, rotary_BTR, kv_b_CHX, segments_BT, self._sinks())
        return linear(out_BTHV, self.o)

    def _sinks(self) -> jax.Array | None:
        return self.sinks[...] if self.spec.has_sinks else None

    def _attend(self, q_BTHQ, latent_BTC, rotary_BTR, kv_b_CHX, segments_BS, sinks_H):
        """Attention of one device's queries over whole rows.

        Latents are gathered over the context axis and their gradients scattered back: C + R numbers per token, where
        keys and values have H (N + R + V). Without shard_map, the compiler communicates gradients of keys and values.
        """
        k_BSHQ, v_BSHV = self._expand(whole_length(latent_BTC), whole_length(rotary_BTR), kv_b_CHX)
        mask = Mask(segments_BS, first_position(q_BTHQ.shape[1]), self.spec.window)
        return attend(q_BTHQ, k_BSHQ, v_BSHV, mask, self._scale, sinks_H, self.config.attention_kernel)

    @property
    def _scale(self) -> float:
        return rope.mla_softmax_scale(self.config.qk_nope_head_dim + self.config.qk_rope_head_dim, self.spec.rope)

    def _expand(self, latent_BSC, rotary_BSR, kv_b_CHX):
        """Returns the keys [B, S, H, N + R] and values [B, S, H, V] of every head."""
        nope = self.config.qk_nope_head_dim
        kv_BSHX = linear_local(latent_BSC, kv_b_CHX, self.config.matmul_precision)
        k_nope_BSHN, v_BSHV = kv_BSHX[..., :nope], kv_BSHX[..., nope:]
        rotary_BSHR = jnp.broadcast_to(rotary_BSR[:, :, None], (*k_nope_BSHN.shape[:3], rotary_BSR.shape[-1]))
        return jnp.concatenate([k_nope_BSHN, rotary_BSHR], axis=-1), v_BSHV

    def empty_cache(self, num_rows: int, num_positions: int, num_new: int, dtype: DTypeLike) -> jax.Array:
        """Returns zeros [B, S, C + R] for the latent and the rotary key of each token."""
        slots = num_slots(self.spec.window, num_positions, num_new)
        return jnp.zeros((num_rows, slots, self.cache_size(self.config, self.spec)), dtype)

    def input_weights(self) -> Sequence[str]:
        return "q_a" if self.config.q_lora_rank else "q", "kv_a"

    def joined(self) -> Attention:
        """Returns the layer with one weight, `down`, for the two products with its input."""
        weights = [getattr(self, name) for name in self.input_weights()]
        if not is_on_one_device() or weights[0].get_metadata()["info"].in_dims != (-1,):
            return self
        self.down = join(weights)
        for name in self.input_weights():
            delattr(self, name)
        return self

    def decode(
        self,
        x_BTD: jax.Array | Deferred,
        slots: Slots,
        cache: jax.Array,
        start: int = 0,
        residual_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array]:
        last_BT, kv_b_CHX = slots.positions_BT[:, start:], cast(self.kv_b, x_BTD.dtype)
        nope = self.config.qk_nope_head_dim
        is_plain = not self.spec.window and not self.spec.has_sinks and is_on_one_device()
        if is_plain and not latent_attention.unsupported_reason(slots.positions_BT, kv_b_CHX, cache, nope):
            out_BTHV, cache = latent_attention.decode(
                self._entries(x_BTD, slots),
                kv_b_CHX,
                self.kv_a_norm.scale[...],
                self.kv_a_norm.eps,
                cache,
                nope,
                self._scale,
                self.spec.rope.interleaved,
            )
            return linear(out_BTHV[:, start:], self.o, residual=residual_BTD), cache
        q_BTHQ, kv_BTW = self._project(x_BTD, start)
        q_BTHQ = self._queries(q_BTHQ, last_BT)
        entries_BTW = jnp.concatenate(self._latents(kv_BTW, slots.positions_BT), axis=-1)
        cache, seen_BSW, key_BS = read_and_write(cache, entries_BTW, slots, self.spec.window)
        attention = self._absorbed if self._absorbs(q_BTHQ.shape[1]) else self._expanded
        out_BTHV = attention(q_BTHQ, seen_BSW, kv_b_CHX, last_BT, key_BS)
        return linear(out_BTHV, self.o, residual=residual_BTD), cache

    def _entries(self, x_BTD: jax.Array | Deferred, slots: Slots) -> latent_attention.Entries:
        cos_BTr, sin_BTr = rope.rotation(self.config.qk_rope_head_dim, slots.positions_BT, self.spec.rope)
        if self._is_joined and not self.config.q_lora_rank:
            q_BTF = kv_BTF = linear(x_BTD, self.down)
        else:
            q_BTHQ, kv_BTF = self._project(x_BTD)
            q_BTF = q_BTHQ.reshape(*x_BTD.shape[:2], -1)
        return latent_attention.Entries(q_BTF, kv_BTF, cos_BTr, sin_BTr, slots.positions_BT, slots.slots_BT)

    def _attend_cached(self, q_BTHQ, k_BSGQ, v_BSGV, last_BT, key_BS):
        return attend_cached(q_BTHQ, k_BSGQ, v_BSGV, last_BT, key_BS, self.spec.window, self._scale, self._sinks())

    def _absorbs(self, num_queries: int) -> bool:
        """Returns whether the absorbed form needs no more multiplications per cache entry than the expanded one.

        Absorbed: T H (2 C + R). Expanded: H (C (N + V) + T (N + R + V)).
        """
        config = self.config
        rank, heads = config.kv_lora_rank, config.qk_nope_head_dim + config.v_head_dim
        return num_queries * (2 * rank - heads) <= rank * heads

    def _absorbed(self, q_BTHQ, seen_BSW, kv_b_CHX, last_BT, key_BS):
        """Attention with the up-projections of keys and values absorbed into queries and outputs (section 2.1.2).

        Cache entries are the keys, and their first C numbers the values, of one head that all query heads share.
        """
        nope, rank = self.config.qk_nope_head_dim, self.config.kv_lora_rank
        q_nope_BTHN, key_up_CHN, value_up_CHV = q_BTHQ[..., :nope], kv_b_CHX[..., :nope], kv_b_CHX[..., nope:]
        if device().copies_sliced_weights:  # both products use the whole weight; half of each is zero or unused
            q_nope_BTHN = jnp.pad(q_nope_BTHN, ((0, 0),) * 3 + ((0, self.config.v_head_dim),))
            key_up_CHN = value_up_CHV = kv_b_CHX
        q_BTHC = jnp.einsum("bthn,chn->bthc", q_nope_BTHN, key_up_CHN)
        q_BTHW = jnp.concatenate([q_BTHC, q_BTHQ[..., nope:]], axis=-1)
        seen_BS1W = seen_BSW[:, :, None]
        out_BTHW = self._attend_cached(q_BTHW, seen_BS1W, seen_BS1W, last_BT, key_BS)
        out_BTHV = jnp.einsum("bthc,chv->bthv", out_BTHW[..., :rank], value_up_CHV)
        return out_BTHV[..., -self.config.v_head_dim :]

    def _expanded(self, q_BTHQ, seen_BSW, kv_b_CHX, last_BT, key_BS):
        """Attention over expanded keys and values of every head, as in training."""
        rank = self.config.kv_lora_rank
        k_BSHQ, v_BSHV = self._expand(seen_BSW[..., :rank], seen_BSW[..., rank:], kv_b_CHX)
        return self._attend_cached(q_BTHQ, k_BSHQ, v_BSHV, last_BT, key_BS)

    @property
    def _is_joined(self) -> bool:
        return hasattr(self, "down")

    def _project(self, x_BTD: jax.Array | Deferred, start: int = 0) -> tuple[jax.Array, jax.Array]:
        """Returns queries [B, T - start, H, N + R] of the tokens from `start` on and [B, T, C + R] of all tokens.

        Neither is rotated, and the latter is not normed.
        """
        config = self.config
        if self._is_joined:
            width = self.cache_size(config, self.spec)
            down_BTF = linear(x_BTD, self.down)
            q_BTF, kv_BTW = down_BTF[:, start:, :-width], down_BTF[..., -width:]
            if config.q_lora_rank:
                return linear(self.q_a_norm(q_BTF), self.q_b), kv_BTW
            return q_BTF.reshape(*q_BTF.shape[:2], config.num_heads, -1), kv_BTW
        x_BTD = normed(x_BTD)
        kv_BTW, x_BTD = linear(x_BTD, self.kv_a), x_BTD[:, start:]
        if config.q_lora_rank:
            return linear(self.q_a_norm(linear(x_BTD, self.q_a)), self.q_b), kv_BTW
        return linear(x_BTD, self.q), kv_BTW

    def _queries(self, q_BTHQ: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Returns the queries with the last R dims rotated."""
        nope = self.config.qk_nope_head_dim
        rotated_BTHR = rope.rotate(q_BTHQ[..., nope:], positions_BT, self.spec.rope)
        return constrain(jnp.concatenate([q_BTHQ[..., :nope], rotated_BTHR], -1), "batch", "length", "heads", None)

    def _latents(self, kv_BTW: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Returns the entries of a cache: the normalized latent [B, T, C] and the rotated shared key [B, T, R]."""
        rank = self.config.kv_lora_rank
        rotary_BTR = rope.rotate(kv_BTW[:, :, None, rank:], positions_BT, self.spec.rope)[:, :, 0]
        return self.kv_a_norm(kv_BTW[..., :rank]), rotary_BTR
