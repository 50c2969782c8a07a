"""Sampling of drafts from the hidden states that an MTP kind computes (`Kind.draft`).

Shape letters: B rows, n drafts sampled at once, K drafts per step, D model, V vocabulary, V' draft vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Architecture
from mtp_jax.decoding.inference_model import Network
from mtp_jax.decoding.samplers import Sampler, draw, filtered, is_greedy
from mtp_jax.mtp import Caches, MainModel, Text, kind_of


class Drafts(NamedTuple):
    """Drafts of a step.

    tokens_BK: int32. logits_BKV: float32, filtered, from which they were sampled; -inf outside the draft vocabulary.
    confidence_BK: float32, probability of the likeliest token where draft k was sampled, before filtering. It does not
    depend on the sampled token. caches: with the new entries.
    """

    tokens_BK: jax.Array
    logits_BKV: jax.Array
    confidence_BK: jax.Array
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
    kind = kind_of(architecture)
    newest_B = text.tokens_at(text.last_B[:, None])[:, 0]
    proposer = _Proposer(network, sampler, keys_BK, newest_B)
    main = MainModel(text.hidden_BWD, text.hidden_BWD, network.final_norm, network.embed)
    caches = kind.draft(network.mtp, main, text, num_speculative_tokens, caches, proposer)
    return Drafts(
        jnp.concatenate(proposer.tokens, axis=1),
        jnp.concatenate(proposer.logits, axis=1),
        jnp.concatenate(proposer.confidences, axis=1),
        caches,
    )


def window_size(num_speculative_tokens: int) -> int:
    """Returns the number of positions that each step runs through the depths.

    A step accepts a <= K drafts and adds one token, so up to K + 1 positions are new. The entries of depth k before
    them were computed from accepted drafts, except the last k <= K, which read the token after those drafts.
    """
    return num_speculative_tokens + 1 if num_speculative_tokens else 0


class _Proposer:
    """Samples drafts from hidden states, and stores the tokens, logits and confidences."""

    def __init__(self, network: Network, sampler: Sampler, keys_BK: jax.Array, newest_B: jax.Array):
        self._network, self._sampler, self._keys_BK = network, sampler, keys_BK
        self._correction = network.kind.correction(network.mtp, network.draft_vocabulary)
        self._before_B = newest_B  # token before the next draft
        self.tokens: list[jax.Array] = []  # int32[B, n] each
        self.logits: list[jax.Array] = []  # float32[B, n, V] each
        self.confidences: list[jax.Array] = []  # float32[B, n] each

    def __call__(self, hidden_BnD: jax.Array) -> jax.Array:
        """Returns the next n drafts int32[B, n], sampled from normed hidden states."""
        logits_BnV = self._network.draft_logits(hidden_BnD)
        if self._correction is None:
            return self._sample(logits_BnV)
        drafts = []
        for j in range(logits_BnV.shape[1]):  # each depends on the one before
            drafts.append(self._sample(logits_BnV[:, j : j + 1] + self._correction(self._before_B)[:, None]))
        return jnp.concatenate(drafts, axis=1)

    def _sample(self, logits_BnV: jax.Array) -> jax.Array:
        first, num = sum(tokens.shape[1] for tokens in self.tokens), logits_BnV.shape[1]
        self.confidences.append(jnp.exp(logits_BnV.max(-1) - jax.nn.logsumexp(logits_BnV, axis=-1)))
        if is_greedy(self._sampler):
            chosen_Bn = jnp.argmax(logits_BnV, axis=-1).astype(jnp.int32)
        logits_BnV = filtered(self._sampler, logits_BnV)
        if not is_greedy(self._sampler):
            keys_Bn = self._keys_BK[:, first : first + num]
            chosen_Bn = draw(logits_BnV.reshape(-1, logits_BnV.shape[-1]), keys_Bn.reshape(-1)).reshape(-1, num)
        ids_V = self._network.draft_vocabulary
        if ids_V is not None:
            every_BnV = jnp.full((*logits_BnV.shape[:2], self._network.vocab_size), -jnp.inf)
            logits_BnV, chosen_Bn = every_BnV.at[..., ids_V].set(logits_BnV), ids_V[chosen_Bn]
        self.logits.append(logits_BnV)
        self.tokens.append(chosen_Bn)
        self._before_B = chosen_Bn[:, -1]
        return chosen_Bn
