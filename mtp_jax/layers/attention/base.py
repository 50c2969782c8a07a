"""The interface of an attention variant: all that the rest asks of attention without knowing its kind.

A variant is a module class in a file of this package, listed in `ATTENTIONS` (docs/extending.md).

Shape letters: B rows, T positions, S slots of a cache, D model.
"""

from typing import Any

import jax
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.config import ModelConfig
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.spec import AttentionSpec
from mtp_jax.typing import Cache


class Attention(nnx.Module):
    """Causal self-attention of one layer within documents."""

    def __init__(self, config: ModelConfig, spec: AttentionSpec, rngs: nnx.Rngs):
        del rngs
        self.config, self.spec = config, spec

    # Known from the config alone.

    @classmethod
    def check(cls, config: ModelConfig) -> None:
        """Raises UserError where the fields of this variant do not fit each other, naming field, value and remedy."""
        raise NotImplementedError

    @classmethod
    def sharded_sizes(cls, config: ModelConfig) -> list[tuple[str, str, int]]:
        """(logical axis, field, value) of every size that the mesh axes of that logical axis must divide."""
        raise NotImplementedError

    @classmethod
    def multiplied_dims(cls, config: ModelConfig) -> int:
        """Multiplications per head and pair of query and key: query dims for the score, value dims for the average."""
        raise NotImplementedError

    @classmethod
    def cache_size(cls, config: ModelConfig, spec: AttentionSpec) -> int:
        """Numbers per token in a layer's cache; also what crosses the context axis in training."""
        raise NotImplementedError

    @classmethod
    def value_dim(cls, config: ModelConfig) -> int:
        """Value dims of one head."""
        raise NotImplementedError

    # The layer.

    def __call__(self, x_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        """[B, T, D] -> [B, T, D]; see `kernels.attention.Mask` for which positions see which."""
        raise NotImplementedError

    def empty_cache(self, num_rows: int, num_positions: int, num_new: int, dtype: DTypeLike) -> Cache:
        """Cache for rows of up to `num_positions` tokens, read `num_new` at a time; see `cache.num_slots`."""
        raise NotImplementedError

    def decode(self, x_BTD: jax.Array, slots: Slots, cache: Any, start: int = 0) -> tuple[jax.Array, Any]:
        """New tokens [B, T, D] -> [B, T - start, D], without the first, and the cache with the entries of all."""
        raise NotImplementedError
