"""What every multi-token prediction strategy is given and returns.

Shape letters: B rows, T positions, D model, N extra depths (config.depth), E experts.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.router import RouterStats


class MainModel(NamedTuple):
    """What a strategy sees of the main model.

    hidden, branch: [B, T, D], the last block's output before the final norm, and that block's input.
    final_norm: the main model's. look_up: int[B, T] -> embeddings [B, T, D], the main model's own table.
    """

    hidden: jax.Array
    branch: jax.Array
    final_norm: RMSNorm
    look_up: Callable[[jax.Array], jax.Array]


class Extra(NamedTuple):
    """hidden: [N, B, T, D], normed: ready for the shared head. stats: of the N blocks, stacked, or None."""

    hidden: jax.Array
    stats: RouterStats | None


class NoMTP(nnx.Module):
    """mtp.kind = none: the next token only."""

    def __init__(self, config: Any, rngs: nnx.Rngs):
        del config, rngs

    def __call__(
        self, main: MainModel, inputs_NBT: jax.Array, segments_NBT: jax.Array | None, positions_BT: jax.Array
    ) -> Extra:
        """No depths: [0, B, T, D]."""
        del inputs_NBT, segments_NBT, positions_BT
        return Extra(jnp.zeros((0, *main.hidden.shape), main.hidden.dtype), None)
