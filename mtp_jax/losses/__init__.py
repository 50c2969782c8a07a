"""Losses as data: terms in, one chunked pass over their logits, sums and gradients out.

A `Term` holds hidden states, a head, targets, weights and a loss; `evaluate` applies the head chunk by chunk, so that
neither the number of depths nor the length of a row adds to the peak of memory. To add a loss, subclass `Loss` in a new
file and list it here.
"""

from mtp_jax.losses.cross_entropy import CrossEntropy
from mtp_jax.losses.depths import DepthSums, agreement, depth_sums, expected_tokens_per_pass, token_terms
from mtp_jax.losses.divergence import KLDivergence
from mtp_jax.losses.driver import evaluate, token_scores
from mtp_jax.losses.listwise import ListNet
from mtp_jax.losses.mixture import Mixture
from mtp_jax.losses.term import HiddenTerm, Logits, Loss, Term, TermSums, weight_sum
from mtp_jax.losses.total_variation import EndToEndTotalVariation, TotalVariation

__all__ = [
    "CrossEntropy",
    "DepthSums",
    "EndToEndTotalVariation",
    "HiddenTerm",
    "KLDivergence",
    "ListNet",
    "Logits",
    "Loss",
    "Mixture",
    "Term",
    "TermSums",
    "TotalVariation",
    "agreement",
    "depth_sums",
    "evaluate",
    "expected_tokens_per_pass",
    "token_scores",
    "token_terms",
    "weight_sum",
]
