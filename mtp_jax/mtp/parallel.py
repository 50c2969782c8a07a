"""Parallel heads (Gloeckle et al. 2024, 2404.19737): h_k = Block_k(z) on one trunk output z, one unembedding.

Shape letters: B rows, T positions, D model, N extra depths.
"""

import jax
from flax import nnx

from mtp_jax.config import Config
from mtp_jax.layers.block import Block, scan_over, stacked
from mtp_jax.mtp.strategy import Extra, MainModel


class ParallelHeads(nnx.Module):
    """One block a depth. The head of depth 0 is the main model's last block, so z is that block's input, and a trained
    next-token model takes extra heads without touching its own weights. All heads share the main final norm."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        model = config.model
        self.config = model
        is_moe = bool(model.num_experts) and model.num_layers > model.num_dense_layers  # as the blocks it takes over
        self.block = stacked(lambda r: Block(model, r, is_moe), config.depth, rngs)

    def __call__(
        self, main: MainModel, inputs_NBT: jax.Array, segments_NBT: jax.Array | None, positions_BT: jax.Array
    ) -> Extra:
        """Depth k sees z alone; its segments only mark the positions that count."""
        del inputs_NBT

        def body(block, branch_BTD, segments_BT):
            h_BTD, stats = block(branch_BTD, positions_BT, segments_BT)
            return branch_BTD, (main.final_norm(h_BTD), stats)

        _, (hidden_NBTD, stats) = scan_over(self.block, body, main.branch, segments_NBT, self.config)
        return Extra(hidden_NBTD, stats)
