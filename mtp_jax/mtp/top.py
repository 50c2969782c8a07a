"""Token order prediction (TOP, 2508.19228): an auxiliary training loss that ranks upcoming words by their order.

For position i and window W, the score of word v is W - d, where d is the distance to the nearest occurrence of v among
the W tokens after i (the next token has distance 0), and -inf for words that do not occur. The loss is the
cross-entropy between softmax(scores) and the softmax of a second unembedding of the hidden state that the main head
reads (ListNet), added to the next-token loss with weight 1. The second unembedding is not used in decoding, so the
model cannot draft.

The loss follows the authors' repository; results were not compared by running that code. It does not mask between
packed documents: here only tokens of the document of position i have a score. The initialization and the learning rate
of the second unembedding are this project's, because no source for them was found.

softmax(scores) is proportional to exp(-d) for any W, so in float32 words at a distance above 103 have weight 0: larger
windows give the same loss, and the lookahead of rows is limited accordingly.

Shape letters: B rows, N tokens of a row, T positions, K = 1, D model, V vocabulary, W window.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.param import matrix
from mtp_jax.losses import HiddenTerm, ListNet, Term
from mtp_jax.mtp.kind import Kind, Scales
from mtp_jax.targets import PADDING, Rows

FURTHEST = 104  # exp(-104) is 0 in float32


class OrderHead(nnx.Module):
    """Second unembedding [D, V]."""

    def __init__(self, model: ModelConfig, rngs: nnx.Rngs):
        assert model.vocab_size is not None
        self.unembed = matrix(rngs, (model.embed_dim, model.vocab_size), ("embed", "vocab"), 1, model)


class TokenOrder(Kind):
    """MTP kind "top"."""

    name = "top"

    @property
    def window(self) -> int:
        """W, at most the distance beyond which words have weight 0 in float32."""
        return min(self.mtp.top.window, FURTHEST)

    @property
    def lookahead(self) -> int:
        return self.window - 1

    @property
    def head_products(self) -> float:
        """2: the main head and the second unembedding."""
        return 2

    @classmethod
    def reads(cls, key: str) -> bool:
        unread = ("depth", "depth_decay", "normalize", "curriculum", "shared_depths", "parameter_matched")
        return key not in (*unread, "loss", "cross_entropy_share")

    def describe(self) -> str:
        return f"token order prediction, window {self.mtp.top.window}"

    def make_module(self, rngs: nnx.Rngs) -> OrderHead:
        return OrderHead(self.model, rngs)

    def terms(
        self, module: OrderHead, hidden_KBTD: jax.Array, head_DV: jax.Array, rows: Rows, scales: Scales, z_weight: float
    ) -> list[Term | HiddenTerm]:
        words_BTW, probs_BTW = order_targets(rows.tokens_BN, rows.segment_ids_BN, self.window)
        order = Term(
            ListNet(),
            jax.lax.stop_gradient(hidden_KBTD) if self.mtp.detach_decoder else hidden_KBTD,
            module.unembed[...],
            rows.targets_KBT,
            rows.weight_KBT,
            (scales.weight * scales.main)[None],
            name=self.name,
            words_KBTW=words_BTW[None],
            probs_KBTW=probs_BTW[None],
        )
        return [*super().terms(module, hidden_KBTD, head_DV, rows, scales, z_weight), order]


def order_targets(tokens_BN: jax.Array, segment_ids_BN: jax.Array, window: int) -> tuple[jax.Array, jax.Array]:
    """Returns the target distribution of every position, as pairs of words and probabilities.

    Returns:
      words int[B, T, W], T = N - W, and probabilities float32[B, T, W]: the softmax of the scores at the nearest
      occurrence of each word, 0 elsewhere, and all 0 if the next token is in another document.
    """
    length = tokens_BN.shape[1] - window
    at_TW = jnp.arange(length)[:, None] + 1 + jnp.arange(window)
    words_BTW = tokens_BN[:, at_TW]
    here_BT1 = segment_ids_BN[:, :length, None]
    is_ours_BTW = (segment_ids_BN[:, at_TW] == here_BT1) & (here_BT1 != PADDING)
    # A token is the nearest occurrence of its word iff the previous occurrence is at or before i.
    is_nearest_BTW = _previous_occurrence(tokens_BN)[:, at_TW] <= jnp.arange(length)[:, None]
    weight_BTW = jnp.where(is_ours_BTW & is_nearest_BTW, jnp.exp(-jnp.arange(window, dtype=jnp.float32)), 0.0)
    return words_BTW, weight_BTW / jnp.maximum(weight_BTW.sum(-1, keepdims=True), 1e-30)


def _previous_occurrence(tokens_BN: jax.Array) -> jax.Array:
    """Returns the position of the previous occurrence of each token, int[B, N]; -1 if there is none."""

    def row(tokens_N: jax.Array) -> jax.Array:
        order_N = jnp.argsort(tokens_N, stable=True)
        is_same_N = tokens_N[order_N] == jnp.roll(tokens_N[order_N], 1)
        previous_N = jnp.where(is_same_N.at[0].set(False), jnp.roll(order_N, 1), -1)
        return jnp.zeros_like(order_N).at[order_N].set(previous_N)

    return jax.vmap(row)(tokens_BN)
