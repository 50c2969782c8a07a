"""Which drafts the main model keeps, so that the text is distributed as if it had been written without them.

Speculative sampling (2211.17192, algorithm 1; 2302.01318): draft x ~ q is kept with probability min(1, p(x) / q(x));
where it is not, the token is drawn from max(p - q, 0), normalised. Where all are kept, one more comes from p itself.
With a greedy p a draft is kept iff it is the main model's own choice.

Shape letters: B rows, K drafts, T = K + 1 tokens verified, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.decoding.samplers import Sampler, draw, filtered, is_greedy


class Verdict(NamedTuple):
    """num_accepted_B: int32, how many of the leading drafts are kept. next_B: int32, the token after them."""

    num_accepted_B: jax.Array
    next_B: jax.Array


def verify(
    sampler: Sampler, logits_BTV: jax.Array, drafts_BK: jax.Array, draft_logits_BKV: jax.Array | None, keys_B: jax.Array
) -> Verdict:
    """Judge the drafts of each row.

    Args:
      sampler: what the text is drawn with.
      logits_BTV: float32, the main model's; [:, k] after the first k drafts.
      drafts_BK: int, drawn from softmax(draft_logits).
      draft_logits_BKV: float32, already `filtered`: what the drafts were really drawn from. Not read when greedy, or
        without drafts.
      keys_B: one random key a row.
    """
    num_speculative_tokens = drafts_BK.shape[1]
    if is_greedy(sampler):
        choice_BT = jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32)
        num_B = _leading(choice_BT[:, :num_speculative_tokens] == drafts_BK)
        return Verdict(num_B, _at(choice_BT, num_B))
    logits_BTV = filtered(sampler, logits_BTV)
    accept_keys, draw_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys_B), 1, 0)
    if draft_logits_BKV is None:
        return Verdict(jnp.zeros(len(drafts_BK), jnp.int32), draw(logits_BTV[:, 0], draw_keys))
    p_BTV, q_BKV = jax.nn.softmax(logits_BTV), jax.nn.softmax(draft_logits_BKV)
    p_BK = jnp.take_along_axis(p_BTV[:, :num_speculative_tokens], drafts_BK[..., None], axis=-1)[..., 0]
    q_BK = jnp.take_along_axis(q_BKV, drafts_BK[..., None], axis=-1)[..., 0]
    u_BK = jax.vmap(lambda key: jax.random.uniform(key, (num_speculative_tokens,)))(accept_keys)
    num_B = _leading(u_BK * q_BK < p_BK)
    # Where all drafts are kept nothing is taken off: q is zero after the last.
    left_BTV = jnp.maximum(p_BTV - jnp.pad(q_BKV, ((0, 0), (0, 1), (0, 0))), 0)
    left_BV, p_BV = _at(left_BTV, num_B), _at(p_BTV, num_B)
    # A rejection means p < q somewhere, so p > q elsewhere; only rounding can leave nothing.
    left_BV = jnp.where(left_BV.sum(-1, keepdims=True) > 0, left_BV, p_BV)
    return Verdict(num_B, draw(jnp.log(left_BV), draw_keys))


def _leading(kept_BK: jax.Array) -> jax.Array:
    """How many come before the first False."""
    return jnp.cumprod(kept_BK.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)


def _at(x_BT: jax.Array, index_B: jax.Array) -> jax.Array:
    return jax.vmap(lambda x, i: x[i])(x_BT, index_B)
