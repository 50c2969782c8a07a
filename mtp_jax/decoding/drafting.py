"""Drawing of drafts from the hidden states that an MTP kind proposes (`Kind.draft`).

Shape letters: B rows, n drafts proposed at once, K drafts per step, D model, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Architecture
from mtp_jax.decoding.inference_model import Network
from mtp_jax.decoding.samplers import Sampler, draw, filtered, is_greedy
from mtp_jax.mtp import Caches, MainModel, Text, kind_of


class Drafts(NamedTuple):
    """tokens_BK: int32. logits_BKV: float32, filtered: what they were drawn from. caches: with the new entries."""

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
    """Drafts, at least one, proposed after position `text.last_B`.

    Args:
      keys_BK: random keys, one per draft.
    """
    proposer = _Proposer(network, sampler, keys_BK)
    main = MainModel(text.hidden_BWD, text.hidden_BWD, network.final_norm, network.embed)
    caches = kind_of(architecture).draft(network.mtp, main, text, num_speculative_tokens, caches, proposer)
    return Drafts(jnp.stack(proposer.tokens, axis=1), jnp.concatenate(proposer.logits, axis=1), caches)


def window_size(num_speculative_tokens: int) -> int:
    """Positions that each step runs through the depths.

    A step keeps a <= K drafts and one token more, so K + 1 positions may be new. Depth k's entries before them were
    made from drafts that were kept, but for the last k <= K, which read the token after those.
    """
    return num_speculative_tokens + 1 if num_speculative_tokens else 0


class _Proposer:
    """Draws drafts from hidden states, one after another, and keeps what they were drawn from."""

    def __init__(self, network: Network, sampler: Sampler, keys_BK: jax.Array):
        self._network, self._sampler, self._keys_BK = network, sampler, keys_BK
        self.tokens: list[jax.Array] = []  # int32[B] each
        self.logits: list[jax.Array] = []  # float32[B, n, V] each

    def __call__(self, hidden_BnD: jax.Array) -> jax.Array:
        """int32[B, n], the next n drafts, drawn from normed hidden states."""
        logits_BnV = filtered(self._sampler, self._network.logits(hidden_BnD))
        self.logits.append(logits_BnV)
        first, num = len(self.tokens), logits_BnV.shape[1]
        self.tokens += [self._draw(logits_BnV[:, j], self._keys_BK[:, first + j]) for j in range(num)]
        return jnp.stack(self.tokens[first:], axis=1)

    def _draw(self, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
        if is_greedy(self._sampler):
            return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
        return draw(logits_BV, keys_B)
