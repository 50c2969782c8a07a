"""Attention by XLA, on every device, in blocks of queries that bound the memory of the scores.

Shape letters: as in the package.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

ATTENTION = "attention"  # checkpoint name of its output
# A device's queries are attended in equal blocks of at most this many, each recomputed in the backward pass; of fewer
# where a block's float32 scores would take more than these bytes (128 heads, 4 rows of 4096: 8 MiB per query).
QUERY_BLOCK = 512
SCORE_BYTES = 1 << 30


def attend(q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first, scale) -> jax.Array:
    """As `kernels.attention.attend`."""
    length, index_S = q_BTHQ.shape[1], jnp.arange(k_BSGQ.shape[1])
    last_BT = jnp.broadcast_to(first + jnp.arange(length), (q_BTHQ.shape[0], length))
    if segments_BS is None:
        return attend_cached(q_BTHQ, k_BSGQ, v_BSGV, last_BT, scale)
    segments_BT = jax.lax.dynamic_slice_in_dim(segments_BS, first, length, axis=1)

    def sees(last_BT, segments_BT):
        causal_BTS = index_S <= last_BT[..., None]
        return causal_BTS & (segments_BT[:, :, None] == segments_BS[:, None, :])

    return _attend(q_BTHQ, k_BSGQ, v_BSGV, scale, sees, last_BT, segments_BT)


def attend_cached(
    q_BTHQ: jax.Array, k_BSGQ: jax.Array, v_BSGV: jax.Array, last_BT: jax.Array, scale: float
) -> jax.Array:
    """softmax(scale * q k^T + mask) v over the entries of a cache, where a query sees slots 0 .. last of its own.

    Returns:
      [B, T, H, V] in the dtype of v.
    """
    index_S = jnp.arange(k_BSGQ.shape[1])
    return _attend(q_BTHQ, k_BSGQ, v_BSGV, scale, lambda last_BT: index_S <= last_BT[..., None], last_BT)


def _attend(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    scale: float,
    sees: Callable[..., jax.Array],
    *places_BT: jax.Array,
) -> jax.Array:
    """Attention in blocks of queries; `sees` of a block's places gives the keys it sees, bool[B, T, S]."""
    length, num_heads, num_groups = q_BTHQ.shape[1], q_BTHQ.shape[2], k_BSGQ.shape[2]
    q_BTGMQ = q_BTHQ.reshape(*q_BTHQ.shape[:2], num_groups, num_heads // num_groups, q_BTHQ.shape[-1])

    def block(q_BTGMQ, *places_BT):
        scores_BGMTS = jnp.einsum("btgmq,bsgq->bgmts", q_BTGMQ, k_BSGQ, preferred_element_type=jnp.float32) * scale
        mask_BTS = sees(*places_BT)
        probs = jax.nn.softmax(jnp.where(mask_BTS[:, None, None], scores_BGMTS, -jnp.inf), axis=-1)
        return jnp.einsum("bgmts,bsgv->btgmv", probs.astype(v_BSGV.dtype), v_BSGV)

    num_blocks = _num_blocks(q_BTHQ.shape[0], length, num_heads, k_BSGQ.shape[1])
    if num_blocks == 1:
        out = block(q_BTGMQ, *places_BT)
    else:

        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, length // num_blocks, *x.shape[2:]), 1, 0)

        cut = tuple(split(x) for x in (q_BTGMQ, *places_BT))
        out = jax.lax.map(lambda args: jax.checkpoint(block)(*args), cut)
        out = jnp.moveaxis(out, 0, 1).reshape(*q_BTGMQ.shape[:-1], v_BSGV.shape[-1])
    return checkpoint_name(out.reshape(*q_BTHQ.shape[:3], v_BSGV.shape[-1]), ATTENTION)


def _num_blocks(num_rows: int, length: int, num_heads: int, num_keys: int) -> int:
    """The fewest equal blocks of a row's queries that keep to both limits."""
    most = max(1, min(QUERY_BLOCK, SCORE_BYTES // (4 * num_rows * num_heads * num_keys)))
    return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= most)
