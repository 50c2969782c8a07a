"""The decoder (main model): embedding, scanned blocks, final norm, unembedding.

Shape letters: B rows, T positions, D model, V vocabulary, L mixture-of-experts layers, E experts.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.block import Block
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import ParamInfo, matrix
from mtp_jax.layers.router import RouterStats
from mtp_jax.layers.stack import scan_over, stacked
from mtp_jax.sharding import constrain


class DecoderOutput(NamedTuple):
    """hidden: the last block's output, before the final norm. branch: that block's input, where the parallel heads of
    2404.19737 start (z). Both [B, T, D]. stats: of the mixture-of-experts layers, stacked, or None."""

    hidden: jax.Array
    branch: jax.Array
    stats: RouterStats | None


class TransformerDecoder(nnx.Module):
    """`num_layers` blocks: the leading dense ones of a mixture of experts in `dense_blocks`, the rest in `blocks`.

    Each group is one module with stacked weights, scanned. An empty group is absent.
    """

    def __init__(self, model: ModelConfig, num_layers: int, rngs: nnx.Rngs):
        assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
        self.config = model
        num_dense = min(model.num_dense_layers, num_layers) if model.num_experts else 0
        num_rest = num_layers - num_dense
        table = model.init_std * jax.random.normal(rngs.params(), (model.vocab_size, model.embed_dim), jnp.float32)
        self.embed = nnx.Param(table.astype(model.param_dtype), info=ParamInfo(("vocab", "embed")))
        if num_dense:
            self.dense_blocks = stacked(lambda r: Block(model, r, is_moe=False), num_dense, rngs)
        if num_rest:
            self.blocks = stacked(lambda r: Block(model, r, is_moe=bool(model.num_experts)), num_rest, rngs)
        self.final_norm = RMSNorm(model.embed_dim, model)
        if not model.tie_embeddings:
            self.unembed = matrix(rngs, (model.embed_dim, model.vocab_size), ("embed", "vocab"), 1, model)

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        """Embeddings [B, T, D] of int[B, T], in the compute dtype."""
        h_BTD = jnp.take(self.embed[...], tokens_BT, axis=0).astype(self.config.compute_dtype)
        return constrain(h_BTD, "batch", "length", None)

    def output_head(self) -> jax.Array:
        """The unembedding [D, V] that all depths share."""
        return self.embed[...].T if self.config.tie_embeddings else self.unembed[...]

    @property
    def groups(self) -> list[nnx.Module]:
        """The groups of stacked blocks, first to last."""
        return [getattr(self, name) for name in ("dense_blocks", "blocks") if hasattr(self, name)]

    def __call__(self, h_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> DecoderOutput:
        """Runs every block on embeddings [B, T, D]; for the other arguments see `Block`."""

        def body(block, carry, _):
            hidden_BTD, _ = carry
            out_BTD, stats = block(hidden_BTD, positions_BT, segments_BT)
            return (out_BTD, hidden_BTD), stats

        carry, stats = (h_BTD, h_BTD), None
        for group in self.groups:
            carry, stats = scan_over(group, body, carry, None, self.config)
        return DecoderOutput(*carry, stats)
