"""Sequential modules (DeepSeek-V3, 2412.19437, eqs. 21-25), with the conventions of released checkpoints.

    h_k = Block_k( M_k [ norm_e(Emb(x_{i+k})) ; norm_h(h_{k-1}) ] ),   p_k = softmax(Head(norm_k(h_k)))

Shape letters: B rows, T positions, D model, N extra depths.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import Config, Conventions, conventions
from mtp_jax.layers.block import Block, scan_over, stacked
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.param import matrix
from mtp_jax.mtp.strategy import Extra, MainModel


class SequentialModule(nnx.Module):
    """One depth: two norms, the projection of both halves, a block like the main model's last, the output norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.recomputes_nothing = model.remat == "none"
        self.is_embedding_first = conventions(config.mtp).concat_order == "embedding_first"
        is_moe = bool(model.num_experts) and config.num_main_layers > model.num_dense_layers
        self.embed_norm = RMSNorm(model.embed_dim, model)
        self.hidden_norm = RMSNorm(model.embed_dim, model)
        self.projection = matrix(rngs, (2 * model.embed_dim, model.embed_dim), ("embed", None), 1, model)
        self.block = Block(model, rngs, is_moe)
        if conventions(config.mtp).output_norm == "own":
            self.output_norm = RMSNorm(model.embed_dim, model)

    def __call__(
        self, embedding_BTD: jax.Array, hidden_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ):
        """h_k [B, T, D] before the output norm, and the router's statistics."""
        # What the projection reads is twice as wide as the rest of a block, and made of what is kept anyway.
        join = jax.checkpoint(self._join) if self.recomputes_nothing else self._join
        return self.block(join(embedding_BTD, hidden_BTD), positions_BT, segments_BT)

    def decode(
        self, embedding_BTD: jax.Array, hidden_BTD: jax.Array, slots: Slots, cache: Any, num_wanted: int | None = None
    ) -> tuple[jax.Array, Any]:
        """h_k of new tokens, as `Block.decode`, and this depth's cache with their entries."""
        return self.block.decode(self._join(embedding_BTD, hidden_BTD), slots, cache, num_wanted)

    def _join(self, embedding_BTD: jax.Array, hidden_BTD: jax.Array) -> jax.Array:
        halves = [self.embed_norm(embedding_BTD), self.hidden_norm(hidden_BTD)]
        joined = jnp.concatenate(halves if self.is_embedding_first else halves[::-1], axis=-1)
        return joined @ self.projection[...].astype(joined.dtype)


def first_hidden(ways: Conventions, hidden_BTD: jax.Array, final_norm: RMSNorm) -> jax.Array:
    """h_0, what the chain of depths begins with, from the last block's output."""
    return final_norm(hidden_BTD) if ways.trunk_hidden == "after_norm" else hidden_BTD


def hand_on(
    ways: Conventions, module: SequentialModule, h_BTD: jax.Array, h_0_BTD: jax.Array, final_norm: RMSNorm
) -> tuple[jax.Array, jax.Array]:
    """From a module's output: what the head reads, and what the next depth receives."""
    normed_BTD = (module.output_norm if ways.output_norm == "own" else final_norm)(h_BTD)
    onward_BTD = normed_BTD if ways.recycled_hidden == "after_norm" else h_BTD
    return normed_BTD, h_0_BTD if ways.chain == "trunk" else onward_BTD


class SequentialModules(nnx.Module):
    """Depths 1..N in a chain; with shared_depths one module, applied N times."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config.model
        self.conventions = conventions(config.mtp)
        self.is_shared = config.mtp.shared_depths
        self.module = stacked(lambda r: SequentialModule(config, r), 1 if self.is_shared else config.depth, rngs)

    def __call__(
        self, main: MainModel, inputs_NBT: jax.Array, segments_NBT: jax.Array | None, positions_BT: jax.Array
    ) -> Extra:
        """Depth k reads the token at i + k; positions whose token is of another document are padding to its block."""
        ways = self.conventions
        h_0 = first_hidden(ways, main.hidden, main.final_norm)

        def body(module, previous_BTD, scanned):
            inputs_BT, segments_BT = scanned
            h_BTD, stats = module(main.look_up(inputs_BT), previous_BTD, positions_BT, segments_BT)
            normed_BTD, onward_BTD = hand_on(ways, module, h_BTD, h_0, main.final_norm)
            return onward_BTD, (normed_BTD, stats)

        xs = inputs_NBT, segments_NBT
        _, (hidden_NBTD, stats) = scan_over(self.module, body, h_0, xs, self.config, is_shared=self.is_shared)
        return Extra(hidden_NBTD, stats)
