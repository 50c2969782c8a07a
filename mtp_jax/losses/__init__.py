"""Losses as data: `evaluate` maps loss terms to sums and gradients in one chunked pass over their logits.

A `Term` holds hidden states, an output head, targets, weights and a loss. The head is applied chunk by chunk, so the
memory of the logits depends neither on the number of depths nor on the length of a row. To add a loss, subclass `Loss`
in a new file and list it here.
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
