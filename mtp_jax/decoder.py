"""The decoder (main model): embedding, scanned blocks, final norm, unembedding.

Shape letters: B rows, T positions, D model, V vocabulary.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.layers.block import Block
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import ParamInfo, matrix
from mtp_jax.layers.router import RouterStats
from mtp_jax.layers.spec import layer_groups
from mtp_jax.layers.stack import scan_over_periods, stacked, unstacked
from mtp_jax.sharding import constrain


class DecoderOutput(NamedTuple):
    """Outputs of the decoder's blocks.

    hidden: [B, T, D], output of the last block, before the final norm.
    branch: [B, T, D], input of that block: the penultimate hidden state, z of the parallel heads of 2404.19737.
    stats: router statistics of each stacked module with experts, by its name.
    """

    hidden: jax.Array
    branch: jax.Array
    stats: dict[str, RouterStats]


class TransformerDecoder(nnx.Module):
    """Embedding, `num_layers` scanned blocks, final norm and unembedding.

    Blocks are stacked modules in the groups, and with the names, of `layer_groups`. The leading dim of their weights
    runs over the repetitions of the group.
    """

    def __init__(self, model: ModelConfig, num_layers: int, rngs: nnx.Rngs):
        assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
        self.config = model
        table = model.init_std * jax.random.normal(rngs.params(), (model.vocab_size, model.embed_dim), jnp.float32)
        self.embed = nnx.Param(table.astype(model.param_dtype), info=ParamInfo(("vocab", "embed")))
        self.groups = tuple(layer_groups(model, num_layers))
        for group in self.groups:
            for spec, name in zip(group.specs, group.names, strict=True):
                setattr(self, name, stacked(functools.partial(Block, model, spec), group.count, rngs))
        self.final_norm = RMSNorm(model.embed_dim, model)
        if not model.tie_embeddings:
            self.unembed = matrix(rngs, (model.embed_dim, model.vocab_size), ("embed", "vocab"), 1, model)

    def embed_tokens(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the embeddings [B, T, D] of int[B, T], in the compute dtype."""
        h_BTD = jnp.take(self.embed[...], tokens_BT, axis=0).astype(self.config.compute_dtype)
        return constrain(h_BTD, "batch", "length", None)

    def output_head(self) -> jax.Array:
        """Returns the unembedding [D, V] that all depths share."""
        return self.embed[...].T if self.config.tie_embeddings else self.unembed[...]

    def layers(self) -> list[Block]:
        """Returns the unstacked blocks in order."""
        out = []
        for group in self.groups:
            periods = zip(*(unstacked(getattr(self, name)) for name in group.names), strict=True)
            out += [block for period in periods for block in period]
        return out

    def __call__(self, h_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> DecoderOutput:
        """Runs all blocks on embeddings [B, T, D]; for the other arguments see `Block`."""

        def body(block, carry, _):
            hidden_BTD, _ = carry
            out_BTD, stats = block(hidden_BTD, positions_BT, segments_BT)
            return (out_BTD, hidden_BTD), stats

        carry, stats = (h_BTD, h_BTD), dict[str, RouterStats]()
        for group in self.groups:
            modules = [getattr(self, name) for name in group.names]
            carry, found = scan_over_periods(modules, body, carry, None, self.config)
            stats |= {name: one for name, one in zip(group.names, found, strict=True) if one is not None}
        return DecoderOutput(*carry, stats)
