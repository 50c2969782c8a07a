"""One declaration for one weight: shape, initializer, logical axes and which dims are summed over, together."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig


@dataclass(frozen=True)
class ParamInfo:
    """What placement and optimizer need to know of a weight, whatever module holds it.

    axes: one logical axis name (or None) per dim; those of a stacked weight begin with "layers".
    precision: of products by the weight (model.matmul_precision).
    in_dims, out_dims: negative dim numbers summed over by, and produced by, the matmul; both empty for vectors
      (norm scales, biases) and for the embedding table, which is looked up and not multiplied.
    """

    axes: tuple[str | None, ...]
    in_dims: tuple[int, ...] = ()
    out_dims: tuple[int, ...] = ()
    precision: str = "default"

    @property
    def is_matrix(self) -> bool:
        return bool(self.in_dims)

    def stacked(self) -> "ParamInfo":
        """The declaration of several such weights with a leading dim over them."""
        return replace(self, axes=("layers", *self.axes))

    def unstacked(self) -> "ParamInfo":
        """The declaration of one weight of a stack."""
        assert self.axes[0] == "layers", self.axes
        return replace(self, axes=self.axes[1:])


class RouterBias(nnx.Variable):
    """The load-balancing bias of a router: moved by a rule of its own, never by a gradient."""


def matrix(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], in_dims: int, config: ModelConfig
) -> nnx.Param:
    """A weight of N(0, init_std^2), fp32 or config.param_dtype.

    Args:
      shape, axes: an "experts" axis may lead; then `in_dims` dims that the matmul sums over; the rest is produced.
      in_dims: how many.
      config: `ModelConfig`.
    """
    first = 1 if axes[0] == "experts" else 0
    rank = len(shape)
    sums = tuple(range(first - rank, first - rank + in_dims))
    makes = tuple(range(first - rank + in_dims, 0))
    value = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
    return nnx.Param(value.astype(config.param_dtype), info=ParamInfo(axes, sums, makes, config.matmul_precision))


def vector(shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, config: ModelConfig) -> nnx.Param:
    """A norm scale or a bias, constant at the start."""
    return nnx.Param(jnp.full(shape, value, config.param_dtype), info=ParamInfo(axes))
