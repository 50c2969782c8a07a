"""Attention in XLA operations for every device, in blocks of queries that bound the memory of the scores.

Shape letters: as in `kernels.attention`.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels.attention.mask import Mask

ATTENTION = "attention"  # checkpoint name of what the backward pass reads of the forward pass: outputs and normalizers
# Limits of a block of a device's queries: number of queries, and bytes of the float32 scores (128 heads, 4 rows of
# 4096: 8 MiB per query). Blocks are of equal size.
QUERY_BLOCK = 512
SCORE_BYTES = 1 << 30
MASKED = -1e30  # masked score; finite, so that a query without visible keys gives no NaN


def attend(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H, scale) -> jax.Array:
    """See `kernels.attention.attend`. A block of queries is multiplied only with the keys inside its window."""
    num_rows, length, num_heads, _ = q_BTHQ.shape
    num_keys, window = k_BSGQ.shape[1], mask.window
    num_blocks = _num_blocks(num_rows, length, num_heads, num_keys)
    span = min(num_keys, length // num_blocks + window - 1) if window else num_keys
    query_BT = jnp.broadcast_to(mask.first + jnp.arange(length), (num_rows, length))
    places_BT = [query_BT]
    if mask.segments_BS is not None:
        places_BT.append(jax.lax.dynamic_slice_in_dim(mask.segments_BS, mask.first, length, axis=1))
    whole = jnp.arange(num_keys)[None], k_BSGQ, v_BSGV, mask.segments_BS

    def block(q_BTGMQ, query_BT, segments_BT=None):
        def near(x):
            begin = jnp.clip(query_BT[0, 0] - window + 1, 0, num_keys - span)
            return x if span == num_keys else jax.lax.dynamic_slice_in_dim(x, begin, span, axis=1)

        key_1N, k_BNGQ, v_BNGV, segments_BN = jax.tree.map(near, whole)
        visible_BTN = _in_window(query_BT, key_1N, window)
        if segments_BT is not None:
            visible_BTN &= segments_BT[:, :, None] == segments_BN[:, None, :]
        return _softmax_average(q_BTGMQ, k_BNGQ, v_BNGV, visible_BTN, scale, sinks_H)

    return _in_blocks(block, num_blocks, q_BTHQ, k_BSGQ.shape[2], v_BSGV.shape[3], places_BT)


def attend_cached(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    query_BT: jax.Array,
    key_BS: jax.Array,
    window: int,
    scale: float,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Returns softmax(scale * q k^T + mask) v over the entries of a cache.

    Args:
      query_BT: int, positions of the queries.
      key_BS: int[1 or B, S], position of the entry in each slot; negative for empty slots.
      window, sinks_H: as in `Mask` and `attend`.

    Returns:
      [B, T, H, V] in the dtype of v; finite but meaningless for a query that sees no entry.
    """

    def block(q_BTGMQ, query_BT):
        visible_BTS = _in_window(query_BT, key_BS, window) & (key_BS >= 0)[:, None]
        return _softmax_average(q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, scale, sinks_H)

    num_blocks = _num_blocks(q_BTHQ.shape[0], q_BTHQ.shape[1], q_BTHQ.shape[2], k_BSGQ.shape[1])
    return _in_blocks(block, num_blocks, q_BTHQ, k_BSGQ.shape[2], v_BSGV.shape[3], [query_BT])


def _in_window(query_BT: jax.Array, key_BS: jax.Array, window: int) -> jax.Array:
    """Returns whether each key is 0 to `window` - 1 positions before each query; bool[B, T, S]. window=0: causal."""
    visible_BTS = key_BS[:, None, :] <= query_BT[:, :, None]
    return visible_BTS & (key_BS[:, None, :] > query_BT[:, :, None] - window) if window else visible_BTS


def _softmax_average(q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, scale, sinks_H) -> jax.Array:
    """Returns the values averaged by the softmax of the visible scores; [B, T, G, M, V]."""
    if sinks_H is not None:
        sinks_H = sinks_H.astype(jnp.float32).reshape(q_BTGMQ.shape[2:4])
    return _average(q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, sinks_H, scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _average(q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, sinks_GM, scale) -> jax.Array:
    """`_softmax_average` with a backward pass that computes the probabilities again, as in FlashAttention (2205.14135).

    With delta = dout . out per query:  ds = p (dout v^T - delta),  dq = scale ds k,  dk = scale ds^T q,  dv = p^T dout
    """
    return _average_forward(q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, sinks_GM, scale)[0]


def _average_forward(q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, sinks_GM, scale):
    scores_BGMTS = _scores(q_BTGMQ, k_BSGQ, visible_BTS, scale)
    peak_BGMT1 = scores_BGMTS.max(axis=-1, keepdims=True)
    if sinks_GM is not None:
        peak_BGMT1 = jnp.maximum(peak_BGMT1, sinks_GM[:, :, None, None])
    weights_BGMTS = jnp.exp(scores_BGMTS - peak_BGMT1)
    total_BGMT1 = weights_BGMTS.sum(axis=-1, keepdims=True)
    if sinks_GM is not None:
        total_BGMT1 += jnp.exp(sinks_GM[:, :, None, None] - peak_BGMT1)
    probs_BGMTS = (weights_BGMTS / total_BGMT1).astype(v_BSGV.dtype)
    out_BTGMV = checkpoint_name(jnp.einsum("bgmts,bsgv->btgmv", probs_BGMTS, v_BSGV), ATTENTION)
    log_z_BGMT1 = checkpoint_name(peak_BGMT1 + jnp.log(total_BGMT1), ATTENTION)
    return out_BTGMV, (q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, sinks_GM, out_BTGMV, log_z_BGMT1)


def _average_backward(scale, residuals, grad_BTGMV):
    q_BTGMQ, k_BSGQ, v_BSGV, visible_BTS, sinks_GM, out_BTGMV, log_z_BGMT1 = residuals
    probs_BGMTS = jnp.exp(_scores(q_BTGMQ, k_BSGQ, visible_BTS, scale) - log_z_BGMT1)
    grad_v = jnp.einsum("bgmts,btgmv->bsgv", probs_BGMTS.astype(grad_BTGMV.dtype), grad_BTGMV)
    grad_probs = jnp.einsum("btgmv,bsgv->bgmts", grad_BTGMV, v_BSGV, preferred_element_type=jnp.float32)
    delta_BGMT1 = jnp.einsum("btgmv,btgmv->bgmt", grad_BTGMV, out_BTGMV, preferred_element_type=jnp.float32)[..., None]
    grad_scores = (scale * probs_BGMTS * (grad_probs - delta_BGMT1)).astype(k_BSGQ.dtype)
    grad_q = jnp.einsum("bgmts,bsgq->btgmq", grad_scores, k_BSGQ)
    grad_k = jnp.einsum("bgmts,btgmq->bsgq", grad_scores, q_BTGMQ)
    grad_sinks = None
    if sinks_GM is not None:
        sink_probs_BGMT1 = jnp.exp(sinks_GM[:, :, None, None] - log_z_BGMT1)
        grad_sinks = -(sink_probs_BGMT1 * delta_BGMT1).sum((0, 3, 4))
    return grad_q, grad_k, grad_v, None, grad_sinks


_average.defvjp(_average_forward, _average_backward)


def _scores(q_BTGMQ, k_BSGQ, visible_BTS, scale) -> jax.Array:
    """Returns the scaled scores, float32[B, G, M, T, S]; MASKED where a key is not visible."""
    scores_BGMTS = jnp.einsum("btgmq,bsgq->bgmts", q_BTGMQ, k_BSGQ, preferred_element_type=jnp.float32) * scale
    return jnp.where(visible_BTS[:, None, None], scores_BGMTS, MASKED)


def _in_blocks(
    block: Callable[..., jax.Array],
    num_blocks: int,
    q_BTHQ: jax.Array,
    num_groups: int,
    value_dim: int,
    places_BT: Sequence[jax.Array],
) -> jax.Array:
    """Runs `block(queries [B, t, G, M, Q], *places)` on equal blocks of queries in sequence; [B, T, H, V]."""
    num_rows, length, num_heads, _ = q_BTHQ.shape
    q_BTGMQ = q_BTHQ.reshape(num_rows, length, num_groups, num_heads // num_groups, -1)
    if num_blocks == 1:
        out = block(q_BTGMQ, *places_BT)
    else:
        saving = functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names(ATTENTION))

        def split(x):
            return jnp.moveaxis(x.reshape(x.shape[0], num_blocks, length // num_blocks, *x.shape[2:]), 1, 0)

        out = jax.lax.map(lambda args: saving(block)(*args), [split(x) for x in (q_BTGMQ, *places_BT)])
        out = jnp.moveaxis(out, 0, 1)
    return out.reshape(num_rows, length, num_heads, value_dim)


def _num_blocks(num_rows: int, length: int, num_heads: int, num_keys: int) -> int:
    """Returns the smallest number of equal blocks of queries within QUERY_BLOCK and SCORE_BYTES."""
    most = max(1, min(QUERY_BLOCK, SCORE_BYTES // (4 * num_rows * num_heads * num_keys)))
    return next(n for n in range(1, length + 1) if length % n == 0 and length // n <= most)
