"""Per-depth sums of likelihood, accuracy and agreement, from the terms that predict tokens.

Shape letters: K depths (1 + extra), B rows, T positions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.losses.term import HiddenTerm, Term, TermSums


class DepthSums(NamedTuple):
    """Weighted sums over positions, per depth; float32[K].

    nll: negative log-likelihood, nats. correct: weights where the argmax is the target. num: weights.
    agree: number of positions i whose argmax equals that of the main head at i + k. num_compared: number of positions
    where both predictions count.
    """

    nll: jax.Array
    correct: jax.Array
    num: jax.Array
    agree: jax.Array
    num_compared: jax.Array


def token_terms(terms: Sequence[Term | HiddenTerm]) -> list[Term]:
    """Returns the terms whose leading dim runs over depths of token prediction."""
    return [t for t in terms if isinstance(t, Term) and t.first_depth is not None]


def depth_sums(terms: Sequence[Term | HiddenTerm], sums: Sequence[TermSums]) -> DepthSums:
    """Returns the sums of depths 0 .. K - 1, from the terms with a `first_depth` and their sums from `evaluate`."""
    found = [(t, s) for t, s in zip(terms, sums, strict=True) if isinstance(t, Term) and t.first_depth is not None]
    found.sort(key=lambda pair: pair[0].first_depth or 0)
    nll_K, correct_K, num_K, picks_KBT = (
        jnp.concatenate([getattr(s, name) for _, s in found]) for name in ("nll", "correct", "num", "picks")
    )
    mask_KBT = jnp.concatenate([t.weight_KBT for t, _ in found]) > 0
    return DepthSums(nll_K, correct_K, num_K, *agreement(picks_KBT, mask_KBT))


def agreement(picks_KBT: jax.Array, mask_KBT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Counts positions where the prediction of depth k at i equals that of the main head at i + k.

    The main head has seen the k tokens in between. Positions count if i + k is in the row and the mask holds for both.

    Args:
      picks_KBT: int32, the argmax of each depth.
      mask_KBT: bool, positions that count.

    Returns:
      float32[K] agreements, and float32[K] positions compared (at depth 0 both are the number of positions).
    """
    length = picks_KBT.shape[-1]
    agree, count = [], []
    for k in range(picks_KBT.shape[0]):
        both = mask_KBT[k, :, : length - k] & mask_KBT[0, :, k:]
        same = picks_KBT[k, :, : length - k] == picks_KBT[0, :, k:]
        agree.append((same & both).sum(dtype=jnp.float32))
        count.append(both.sum(dtype=jnp.float32))
    return jnp.stack(agree), jnp.stack(count)


def expected_tokens_per_pass(agreement_rates: Sequence[float]) -> float:
    """Returns 1 + sum_k prod_{j<=k} a_j, tokens per forward pass if the draft of depth k is accepted at rate a_k."""
    expected, product = 1.0, 1.0
    for rate in agreement_rates:
        product *= rate
        expected += product
    return expected
