"""The only place where activations are multiplied by weights.

A weight is an `nnx.Param` made by `layers.param.matrix`: its declaration says which dims are summed. Weights that
`shard_map` or a kernel takes as plain arrays go through `cast` first.
"""

from collections.abc import Sequence

import jax
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.kernels.grouped_matmul import grouped_matmuls


def cast(weight: nnx.Variable, dtype: DTypeLike) -> jax.Array:
    """The value of a weight in the compute dtype."""
    return weight[...].astype(dtype)


def linear(x: jax.Array, weight: nnx.Variable, precision: str | None = None) -> jax.Array:
    """`x` times a weight, cast to the dtype of x; the result has that dtype. model.matmul_precision says how exactly.

    Args:
      x: [..., summed dims], as many as the weight sums and in their order: [B, T, D] by [D, F] gives [B, T, F], by
        [D, H, Q] gives [B, T, H, Q]; [B, T, H, V] by [H, V, D] gives [B, T, D]. An "experts" dim of the weight is
        produced like any other: [B, T, D] by [E, D, F] gives [B, T, E, F].
      precision: as of `jax.lax.dot_general`, in place of the configured one.
    """
    return _contract(x, weight, weight.get_metadata()["info"].in_dims, precision)


def sum_over_experts(x_BTEF: jax.Array, weight: nnx.Variable) -> jax.Array:
    """Every expert's activations by its own matrix [E, F, D], summed over experts: [B, T, D] in the dtype of x."""
    info = weight.get_metadata()["info"]
    return _contract(x_BTEF, weight, (info.in_dims[0] - 1, *info.in_dims), None)


def grouped(x_ND: jax.Array, weights: Sequence[jax.Array], sizes_E: jax.Array, kernel: str) -> list[jax.Array]:
    """Rows sorted by expert, by each of several weights [E, D, F] of one shape, cast already: [N, F] each.

    Args:
      sizes_E: int32, rows of each expert.
      kernel: as of `kernels.grouped_matmul.grouped_matmul`.

    Raises:
      UserError: the kernel asked for does not support the operands.
    """
    return grouped_matmuls(x_ND, weights, sizes_E, kernel)


def _contract(x: jax.Array, weight: nnx.Variable, in_dims: tuple[int, ...], precision: str | None) -> jax.Array:
    value = cast(weight, x.dtype)
    configured = weight.get_metadata()["info"].precision
    precision = precision or (None if configured == "default" else configured)
    last = tuple(range(x.ndim - len(in_dims), x.ndim))
    summed = last, tuple(value.ndim + dim for dim in in_dims)
    return jax.lax.dot_general(x, value, (summed, ((), ())), precision, preferred_element_type=x.dtype)
