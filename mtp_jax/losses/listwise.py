"""Listwise ranking loss: cross-entropy between a distribution over a few words and the softmax of the logits."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import Logits, Loss


@dataclass(frozen=True)
class ListNet(Loss):
    """-sum_w p_w log q_w (ListNet, Cao et al. 2007), in nats.

    p is given as pairs (words, probs), so that no [T, V] array of scores is needed; probs sum to 1 at each position.
    Words of probability 0 are ignored.
    """

    def value(self, chunk: Logits) -> jax.Array:
        assert chunk.words is not None and chunk.probs is not None, "a list is needed (Term.words_KBTW, probs_KBTW)"
        logit_W = jnp.take_along_axis(chunk.logits, chunk.words, axis=-1)
        return chunk.log_z * chunk.probs.sum(axis=-1) - (chunk.probs * logit_W).sum(axis=-1)
