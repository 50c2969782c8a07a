"""Declarations of weights: shape, initializer, logical axes and contracted dims in one place."""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig


@dataclass(frozen=True)
class ParamInfo:
    """Metadata of a weight for sharding and the optimizer, independent of the module that holds it.

    axes: one logical axis name (or None) per dim; a stacked weight's first is "layers".
    in_dims, out_dims: negative numbers of the dims that the matmul contracts and produces; both empty for vectors
      (norm scales, biases) and for the embedding table, which is indexed and not multiplied.
    precision: of matmuls with the weight (model.matmul_precision).
    is_linear: whether `layers.linear` alone reads the weight, so that the order of its dims may change.
    """

    axes: tuple[str | None, ...]
    in_dims: tuple[int, ...] = ()
    out_dims: tuple[int, ...] = ()
    precision: str = "default"
    is_linear: bool = False

    @property
    def is_matrix(self) -> bool:
        return bool(self.in_dims)

    def stacked(self) -> "ParamInfo":
        """Returns the declaration of a stack of such weights along a new leading dim."""
        return replace(self, axes=("layers", *self.axes))

    def unstacked(self) -> "ParamInfo":
        """Returns the declaration of one weight of a stack."""
        assert self.axes[0] == "layers", self.axes
        return replace(self, axes=self.axes[1:])

    def outputs_first(self) -> "ParamInfo":
        """Returns the declaration of the weight with its contracted dims moved behind the dims that it produces."""
        moved = *self.out_dims, *self.in_dims
        axes = *self.axes[: -len(moved)], *(self.axes[dim] for dim in moved)
        ins = len(self.in_dims)
        return replace(self, axes=axes, in_dims=tuple(range(-ins, 0)), out_dims=tuple(range(-len(moved), -ins)))


class RouterBias(nnx.Variable):
    """Load-balancing bias of a router, updated by `layers.router.moved_bias` and never by a gradient."""


def matrix(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    in_dims: int,
    config: ModelConfig,
    is_linear: bool = True,
) -> nnx.Param:
    """Returns a weight drawn from N(0, init_std^2) in float32, cast to config.param_dtype.

    Args:
      shape, axes: sizes and logical axes of an optional leading "experts" dim, then of `in_dims` contracted dims, then
        of the output dims.
      in_dims: number of contracted dims.
      is_linear: whether `layers.linear` alone reads the weight; never true of expert weights.
    """
    first = 1 if axes[0] == "experts" else 0
    rank = len(shape)
    sums = tuple(range(first - rank, first - rank + in_dims))
    makes = tuple(range(first - rank + in_dims, 0))
    value = config.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
    info = ParamInfo(axes, sums, makes, config.matmul_precision, is_linear and not first)
    return nnx.Param(value.astype(config.param_dtype), info=info)


def scaled(weight: nnx.Variable, scale_D: jax.Array) -> nnx.Variable:
    """Returns the weight whose product with x equals that of the given one with x * scale_D, in float32.

    Args:
      weight: with one contracted dim of size D; stacked if the scale is stacked.
    """
    (dim,) = weight.get_metadata()["info"].in_dims
    scale = scale_D.reshape(*scale_D.shape, *(1,) * (-dim - 1)).astype(jnp.float32)
    return weight.replace(weight[...].astype(jnp.float32) * scale)


def vector(shape: tuple[int, ...], axes: tuple[str | None, ...], value: float, config: ModelConfig) -> nnx.Param:
    """Returns a norm scale or a bias with every element initialized to `value`."""
    return nnx.Param(jnp.full(shape, value, config.param_dtype), info=ParamInfo(axes))
