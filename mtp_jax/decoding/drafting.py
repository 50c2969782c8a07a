"""Sampling of drafts from the hidden states that an MTP kind computes (`Kind.draft`).

Shape letters: B rows, n drafts sampled at once, K drafts per step, D model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Architecture
from mtp_jax.decoding.inference_model import Network
from mtp_jax.decoding.samplers import Sampler, draw, filtered, is_greedy
from mtp_jax.mtp import Caches, MainModel, Text, kind_of


class Drafts(NamedTuple):
    """tokens_BK: int32. logits_BKV: float32, filtered, from which they were sampled. caches: with the new entries."""

    tokens_BK: jax.Array
    logits_BKV: jax.Array
    caches: Caches


def draft(
    architecture: Architecture,
    network: Network,
    sampler: Sampler,
    num_speculative_tokens: int,
    text: Text,
    caches: Caches,
    keys_BK: jax.Array,
) -> Drafts:
    """Returns drafts of the tokens after position `text.last_B`.

    Args:
      num_speculative_tokens: K >= 1.
      text: tokens and hidden states so far.
      caches: caches of the MTP kind.
      keys_BK: random keys, one per draft.
    """
    proposer = _Proposer(network, sampler, keys_BK)
    main = MainModel(text.hidden_BWD, text.hidden_BWD, network.final_norm, network.embed)
    caches = kind_of(architecture).draft(network.mtp, main, text, num_speculative_tokens, caches, proposer)
    return Drafts(jnp.stack(proposer.tokens, axis=1), jnp.concatenate(proposer.logits, axis=1), caches)


def window_size(num_speculative_tokens: int) -> int:
    """Returns the number of positions that each step runs through the depths.

    A step accepts a <= K drafts and adds one token, so up to K + 1 positions are new. The entries of depth k before
    them were computed from accepted drafts, except the last k <= K, which read the token after those drafts.
    """
    return num_speculative_tokens + 1 if num_speculative_tokens else 0


class _Proposer:
    """Samples drafts from hidden states one after another, and stores the tokens and logits."""

    def __init__(self, network: Network, sampler: Sampler, keys_BK: jax.Array):
        self._network, self._sampler, self._keys_BK = network, sampler, keys_BK
        self.tokens: list[jax.Array] = []  # int32[B] each
        self.logits: list[jax.Array] = []  # float32[B, n, V] each

    def __call__(self, hidden_BnD: jax.Array) -> jax.Array:
        """Returns the next n drafts int32[B, n], sampled from normed hidden states."""
        logits_BnV = filtered(self._sampler, self._network.logits(hidden_BnD))
        self.logits.append(logits_BnV)
        first, num = len(self.tokens), logits_BnV.shape[1]
        self.tokens += [self._draw(logits_BnV[:, j], self._keys_BK[:, first + j]) for j in range(num)]
        return jnp.stack(self.tokens[first:], axis=1)

    def _draw(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        if is_greedy(self._sampler):
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return draw(logits_BV, keys_B)
