"""Markov head of parallel drafts (DSpark, 2607.05147): each draft's logits are corrected by the token before it.

    logits_k = Head(h_k) + W_out W_in[x_{i+k}],   W_in [V, R], W_out [R, V]

Parallel heads draft several tokens from one hidden state, so that draft k does not depend on the draft before it; this
correction of rank R restores the dependence on that token alone. x_{i+k} is the token before the predicted one: a token
of the text in training, the draft k - 1 in decoding.

In training the correction is one matmul with the output head: hidden states have R more features, W_in[x_{i+k}], and
the head R more rows, W_out. W_out starts at 0, so that new weights change no logits.

Not verified against the paper's code: the initialization, and that W_in is not the model's embedding table.

Shape letters: B rows, T positions, N extra depths, D model, R rank, V vocabulary, V' tokens that may be drafted.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.linear import linear, linear_columns
from mtp_jax.layers.param import ParamInfo, matrix
from mtp_jax.sharding import constrain


class MarkovHead(nnx.Module):
    """W_in and W_out."""

    def __init__(self, model: ModelConfig, rank: int, rngs: nnx.Rngs):
        assert model.vocab_size is not None
        self.compute_dtype = model.compute_dtype
        table = jax.random.normal(rngs.params(), (model.vocab_size, rank), jnp.float32)
        self.w_in = nnx.Param(table.astype(model.param_dtype), info=ParamInfo(("vocab", None)))
        self.w_out = matrix(rngs, (rank, model.vocab_size), (None, "vocab"), 1, model)
        self.w_out[...] = jnp.zeros_like(self.w_out[...])

    def features(self, tokens: jax.Array) -> jax.Array:
        """Returns W_in of tokens, int[...] -> [..., R]."""
        return jnp.take(self.w_in[...], tokens, axis=0).astype(self.compute_dtype)

    def correction(self, tokens_B: jax.Array, vocabulary: jax.Array | None) -> jax.Array:
        """Returns W_out W_in[token], int32[B] -> float32[B, V']; for the tokens of `vocabulary`, or all."""
        features_BR = self.features(tokens_B)
        if vocabulary is None:
            return linear(features_BR, self.w_out).astype(jnp.float32)
        return linear_columns(features_BR, self.w_out, vocabulary).astype(jnp.float32)

    def rows(self, head_DV: jax.Array) -> jax.Array:
        """Returns the output head followed by W_out, [D + R, V]."""
        return constrain(jnp.concatenate([head_DV, self.w_out[...].astype(head_DV.dtype)]), None, "vocab")
