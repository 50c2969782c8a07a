"""Multi-head latent attention (DeepSeek-V2, 2405.04434, eqs. 9-19).

Shape letters: B rows, T positions (one device's queries, S its keys: those of whole rows), D model, H heads,
N nope dim, R rotary dim, V value dim, C key/value latent.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers import rope
from mtp_jax.layers.attention import attend
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

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
        """[B, T, D] -> [B, T, D]; see `attend` for who sees whom."""
        q_BTHQ = self.queries(x_BTD, positions_BT)
        latent_BTC, rotary_BTR = self.latents(x_BTD, positions_BT)
        # Each device expands the latents of whole rows to keys and values of its own heads.
        attention = local(
            self._attend,
            (
                *(("batch", "length", "heads", None), ("batch", "length", None), ("batch", "length", None)),
                *((None, "heads", None), ("batch", None)),
            ),
            ("batch", "length", "heads", None),
        )
        kv_b_CHW = self.kv_b[...].astype(x_BTD.dtype)
        out_BTHV = attention(q_BTHQ, latent_BTC, rotary_BTR, kv_b_CHW, segments_BT)
        return jnp.einsum("bthv,hvd->btd", out_BTHV, self.o[...].astype(x_BTD.dtype))

    def _attend(self, q_BTHQ, latent_BTC, rotary_BTR, kv_b_CHW, segments_BS):
        """One device's queries over whole rows.

        The latent is what crosses the context axis, and its gradient what comes back: C + R numbers a token, where keys
        and values are H (N + R + V). Left to the compiler the gradients of keys and values would cross.
        """
        nope, first = self.config.qk_nope_head_dim, first_position(q_BTHQ.shape[1])
        latent_BSC, rotary_BSR = whole_length(latent_BTC), whole_length(rotary_BTR)
        kv_BSHW = jnp.einsum("bsc,chw->bshw", latent_BSC, kv_b_CHW)
        k_nope_BSHN, v_BSHV = kv_BSHW[..., :nope], kv_BSHW[..., nope:]
        rotary_BSHR = jnp.broadcast_to(rotary_BSR[:, :, None], (*k_nope_BSHN.shape[:3], rotary_BSR.shape[-1]))
        k_BSHQ = jnp.concatenate([k_nope_BSHN, rotary_BSHR], axis=-1)
        return attend(q_BTHQ, k_BSHQ, v_BSHV, segments_BS, rope.mla_softmax_scale(self.config), first)

    def queries(self, x_BTD: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """[B, T, H, N + R], the last R dims rotated."""
        dtype, nope = x_BTD.dtype, self.config.qk_nope_head_dim
        if self.config.q_lora_rank:
            compressed_BTC = self.q_a_norm(x_BTD @ self.q_a[...].astype(dtype))
            q_BTHQ = jnp.einsum("btc,chq->bthq", compressed_BTC, self.q_b[...].astype(dtype))
        else:
            q_BTHQ = jnp.einsum("btd,dhq->bthq", x_BTD, self.q[...].astype(dtype))
        rotated_BTHR = rope.rotate(q_BTHQ[..., nope:], positions_BT, self.config)
        return constrain(jnp.concatenate([q_BTHQ[..., :nope], rotated_BTHR], -1), "batch", "length", "heads", None)

    def latents(self, x_BTD: jax.Array, positions_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        """What a cache would hold: the normalised latent [B, T, C] and the rotated shared key [B, T, R]."""
        kv_BTW = x_BTD @ self.kv_a[...].astype(x_BTD.dtype)
        rank = self.config.kv_lora_rank
        rotary_BTR = rope.rotate(kv_BTW[:, :, None, rank:], positions_BT, self.config)[:, :, 0]
        return self.kv_a_norm(kv_BTW[..., :rank]), rotary_BTR
