"""Interface of the attention variants.

A variant is a module class in its own file of this package, listed in `ATTENTIONS` (docs/extending.md).

Shape letters: B rows, T positions, S slots of a cache, D model.
"""

from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.norm import Deferred
from mtp_jax.layers.spec import AttentionSpec
from mtp_jax.typing import Cache


class Attention(nnx.Module):
    """Causal self-attention of one layer, within documents."""

    def __init__(self, config: ModelConfig, spec: AttentionSpec, rngs: nnx.Rngs):
        del rngs
        self.config, self.spec = config, spec

    # Computed from the config alone.

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raises UserError, with field, value and remedy, if the fields of this variant contradict each other."""
        raise NotImplementedError

    @classmethod
    def sharded_sizes(cls, config: ModelConfig) -> list[tuple[str, str, int]]:
        """Returns (logical axis, field, value) of every size that the axis's number of shards must divide."""
        raise NotImplementedError

    @classmethod
    def multiplied_dims(cls, config: ModelConfig) -> int:
        """Returns multiplications per head and query-key pair: query dims for the score, value dims for the average."""
        raise NotImplementedError

    @classmethod
    def cache_size(cls, config: ModelConfig, spec: AttentionSpec) -> int:
        """Returns the numbers per token in a layer's cache; training gathers the same over the context axis."""
        raise NotImplementedError

    @classmethod
    def value_dim(cls, config: ModelConfig) -> int:
        """Returns the value dim of one head."""
        raise NotImplementedError

    def input_weights(self) -> Sequence[str]:
        """Returns the names of the weights that multiply the layer's input, if nothing else reads it.

        The scale of the norm before the layer can then be multiplied into them. Empty: it cannot.
        """
        return ()

    def joined(self) -> "Attention":
        """Returns the layer with the weights that multiply the same input joined, for inference on one device."""
        return self

    # The layer.

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; `kernels.attention.Mask` defines which keys a query sees."""
        raise NotImplementedError

    def empty_cache(self, num_rows: int, num_positions: int, num_new: int, dtype: DTypeLike) -> Cache:
        """Returns a cache for rows of `num_positions` tokens, `num_new` per decode step; see `cache.num_slots`."""
        raise NotImplementedError

    def decode(
        self,
        x_BTD: jax.Array | Deferred,
        slots: Slots,
        cache: Any,
        start: int = 0,
        residual_BTD: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Runs new tokens against a cache and adds their entries to it.

        Args:
          residual_BTD: [B, T - start, D], to be added to the outputs.

        Returns:
          outputs [B, T - start, D] of the tokens from `start` on, and the cache with the entries of all T.
        """
        raise NotImplementedError
