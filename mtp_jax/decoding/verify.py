"""Verification of drafts by speculative sampling, which preserves the distribution of the main model.

Speculative sampling (2211.17192, algorithm 1; 2302.01318): draft x ~ q is accepted with probability
min(1, p(x) / q(x)). After a rejection the token is sampled from max(p - q, 0), normalized. If all drafts are accepted,
one more token is sampled from p. With a greedy sampler a draft is accepted iff it is the argmax of the main model.

Shape letters: B rows, K drafts, T = K + 1 tokens verified, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.decoding.samplers import Sampler, draw, filtered, is_greedy


class Verdict(NamedTuple):
    """num_accepted_B: int32, number of leading drafts accepted. next_B: int32, the token after them."""

    num_accepted_B: jax.Array
    next_B: jax.Array


def verify(
    sampler: Sampler,
    logits_BTV: jax.Array,
    drafts_BK: jax.Array,
    draft_logits_BKV: jax.Array | None,
    keys_B: jax.Array,
    num_drafts_B: jax.Array | None = None,
) -> Verdict:
    """Verifies the drafts of each row.

    Args:
      sampler: sampler of the text.
      logits_BTV: float32, logits of the main model; [:, k] after the first k drafts.
      drafts_BK: int, sampled from softmax(draft_logits).
      draft_logits_BKV: float32, already `filtered`. Not read by a greedy sampler; None without drafts.
      keys_B: random keys, one per row.
      num_drafts_B: int32, number of drafts of each row to verify; the rest is discarded, and [:, k] of logits is not
        read for k above it. It must not depend on the token sampled as the first draft that is discarded, or the
        distribution would change. None: all.
    """
    num_speculative_tokens = drafts_BK.shape[1]
    is_verified_BK = jnp.ones(drafts_BK.shape, bool)
    if num_drafts_B is not None:
        is_verified_BK = jnp.arange(num_speculative_tokens) < num_drafts_B[:, None]
    if is_greedy(sampler):
        choice_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        num_B = _leading((choice_BT[:, :num_speculative_tokens] == drafts_BK) & is_verified_BK)
        return Verdict(num_B, _at(choice_BT, num_B))
    logits_BTV = filtered(sampler, logits_BTV)
    accept_keys, draw_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
    if draft_logits_BKV is None:
        return Verdict(jnp.zeros(len(drafts_BK), jnp.int32), draw(logits_BTV[:, 0], draw_keys))
    p_BTV, q_BKV = jax.nn.softmax(logits_BTV), jax.nn.softmax(draft_logits_BKV)
    p_BK = jnp.take_along_axis(p_BTV[:, :num_speculative_tokens], drafts_BK[..., None], axis=-1)[..., 0]
    q_BK = jnp.take_along_axis(q_BKV, drafts_BK[..., None], axis=-1)[..., 0]
    u_BK = jax.vmap(lambda key: jax.random.uniform(key, (num_speculative_tokens,)))(accept_keys)
    num_B = _leading((u_BK * q_BK < p_BK) & is_verified_BK)
    # If all verified drafts are accepted nothing is subtracted: q is zero after the last one.
    q_BKV = jnp.where(is_verified_BK[..., None], q_BKV, 0.0)
    left_BTV = jnp.maximum(p_BTV - jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0))), 0)
    left_BV, p_BV = _at(left_BTV, num_B), _at(p_BTV, num_B)
    # After a rejection p < q somewhere, so p > q elsewhere; the sum can be 0 only by rounding.
    left_BV = jnp.where(left_BV.sum(-1, keepdims=True) > 0, left_BV, p_BV)
    return Verdict(num_B, draw(jnp.log(left_BV), draw_keys))


def _leading(kept_BK: jax.Array) -> jax.Array:
    """Returns the number of leading True values; int32[B]."""
    return jnp.cumprod(kept_BK.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)


def _at(x_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, i: x[i])(x_BT, index_B)
