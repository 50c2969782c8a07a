"""The only place where activations are multiplied by weights.

A weight is an `nnx.Param` made by `layers.param.matrix`, whose declaration states which dims are contracted. Weights
passed to `shard_map` or to a kernel as plain arrays are converted by `cast` first.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.kernels import few_rows, fp8
from mtp_jax.kernels.grouped_matmul import grouped_matmuls
from mtp_jax.layers.norm import Deferred, normed
from mtp_jax.sharding import is_on_one_device


def cast(weight: nnx.Variable, dtype: DTypeLike) -> jax.Array:
    """Returns the value of a weight in the compute dtype."""
    return weight[...].astype(dtype)


def linear(
    x: jax.Array | Deferred,
    weight: nnx.Variable,
    precision: str | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Product of `x` and a weight cast to the dtype of x, added to `residual` if given; the result has that dtype.

    The precision is model.matmul_precision unless `precision` is given.

    Args:
      x: [..., contracted dims], the last ones in the order of the weight's: [B, T, D] by [D, F] gives [B, T, F], by
        [D, H, Q] gives [B, T, H, Q]; [B, T, H, V] by [H, V, D] gives [B, T, D]. An "experts" dim of the weight is an
        output dim like any other: [B, T, D] by [E, D, F] gives [B, T, E, F].
      precision: as in `jax.lax.dot_general`; overrides the configured one.
      residual: array of the shape of the product.
    """
    in_dims = weight.get_metadata()["info"].in_dims
    if _is_few_rows(x, [weight], precision):
        return _few_rows(x, [weight], residual=residual)
    product = _contract(normed(x), weight, in_dims, precision)
    return product if residual is None else residual + product


def combined(x: jax.Array | Deferred, weights: Sequence[nnx.Variable], combine: Callable[..., jax.Array]) -> jax.Array:
    """Returns an elementwise function of the products (`linear`) of `x` and several weights of one shape."""
    if _is_few_rows(x, weights, None):
        return _few_rows(x, weights, combine)
    return combine(*(linear(x, weight) for weight in weights))


def linear_local(x: jax.Array, weight: jax.Array, precision: str) -> jax.Array:
    """`linear` inside shard_map: product of x [..., D] and a weight [D, ...] passed as a plain array in the dtype of x.

    Args:
      precision: model.matmul_precision.
    """
    return _product(x, weight, (0,), precision)


def linear_columns(x: jax.Array, weight: nnx.Variable, columns_F: jax.Array) -> jax.Array:
    """Product of `x` [..., D] and some of the V outputs of a weight of D and V, int[F] -> [..., F], dtype of x."""
    info = weight.get_metadata()["info"]
    columns = jnp.take(weight[...], columns_F, axis=info.out_dims[0]).astype(x.dtype)
    return jax.lax.dot_general(x, columns, (((x.ndim - 1,), (2 + info.in_dims[0],)), ((), ())))


def sum_over_experts(x_BTEF: jax.Array, weight: nnx.Variable) -> jax.Array:
    """Product of each expert's activations and its matrix [E, F, D], summed over experts: [B, T, D], dtype of x."""
    info = weight.get_metadata()["info"]
    return _contract(x_BTEF, weight, (info.in_dims[0] - 1, *info.in_dims), None)


def gated_biases(gates_BTE: jax.Array, bias: nnx.Variable) -> jax.Array:
    """Sum over experts of each gate and the expert's bias [E, D]: [B, T, D], dtype of the gates."""
    return gates_BTE @ cast(bias, gates_BTE.dtype)


def grouped(
    x_ND: jax.Array, weights: Sequence[jax.Array], sizes_E: jax.Array, kernel: str, precision: str
) -> list[jax.Array]:
    """Grouped matmuls of rows sorted by expert with several weights of one shape: [N, F] each.

    Args:
      weights: [E, D, F] each, already in the dtype of x.
      sizes_E: int32, number of rows per expert.
      kernel: as in `kernels.grouped_matmul.grouped_matmul`.
      precision: model.matmul_precision; "fp8" rounds the operands, other values have no effect.

    Raises:
      UserError: the requested kernel does not support the operands.
    """
    return grouped_matmuls(x_ND, weights, sizes_E, kernel, is_fp8=precision == "fp8")


def outputs_first(weight: nnx.Variable) -> nnx.Variable:
    """Returns the weight with its contracted dims moved behind the others, as `linear` also takes it."""
    info, value = weight.get_metadata()["info"], weight[...]
    moved = *info.out_dims, *info.in_dims
    order = *range(value.ndim - len(moved)), *(value.ndim + dim for dim in moved)
    return weight.replace(value.transpose(order), info=info.outputs_first())


def join(weights: Sequence[nnx.Variable]) -> nnx.Variable:
    """Returns one weight [sum of outputs, D] of several weights [outputs..., D] that multiply the same input.

    Stacked weights give a stacked weight.
    """
    infos = [weight.get_metadata()["info"] for weight in weights]
    assert all(info.in_dims == (-1,) for info in infos)
    stack = weights[0].shape[: weights[0].ndim - 1 - len(infos[0].out_dims)]
    values = [weight[...].reshape(*stack, -1, weight.shape[-1]) for weight in weights]
    axes = *infos[0].axes[: len(stack)], None, infos[0].axes[-1]
    return weights[0].replace(jnp.concatenate(values, axis=-2), info=replace(infos[0], axes=axes, out_dims=(-2,)))


def _contract(x: jax.Array, weight: nnx.Variable, in_dims: tuple[int, ...], precision: str | None) -> jax.Array:
    value = cast(weight, x.dtype)
    in_dims = tuple(value.ndim + dim for dim in in_dims)
    return _product(x, value, in_dims, precision or weight.get_metadata()["info"].precision)


def _is_few_rows(x: jax.Array | Deferred, weights: Sequence[nnx.Variable], precision: str | None) -> bool:
    """Returns whether `kernels.few_rows` multiplies `x` by the weights."""
    info = weights[0].get_metadata()["info"]
    is_plain = info.is_linear and info.in_dims[-1:] == (-1,) and (precision or info.precision) == "default"
    has_scale = isinstance(x, Deferred) and x.scale_D is not None
    if has_scale or not is_plain or not is_on_one_device():  # rows may be sharded otherwise
        return False
    contracted = math.prod(weights[0].shape[dim] for dim in info.in_dims)
    return not few_rows.unsupported_reason(math.prod(x.shape) // contracted, contracted, x.dtype)


def _few_rows(
    x: jax.Array | Deferred,
    weights: Sequence[nnx.Variable],
    combine: Callable[..., jax.Array] | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    array, eps = (x.x, x.eps) if isinstance(x, Deferred) else (x, None)
    ins = len(weights[0].get_metadata()["info"].in_dims)
    outputs = weights[0].shape[: weights[0].ndim - ins]
    matrices = [cast(weight, x.dtype).reshape(math.prod(outputs), -1) for weight in weights]
    num_outputs, contracted = matrices[0].shape
    added_NF = None if residual is None else residual.reshape(-1, num_outputs)
    out_NF = few_rows.products(array.reshape(-1, contracted), matrices, eps, combine, added_NF)
    return out_NF.reshape(*x.shape[: len(x.shape) - ins], *outputs)


def _product(x: jax.Array, weight: jax.Array, in_dims: tuple[int, ...], precision: str) -> jax.Array:
    """Product of x [..., contracted dims] and a weight whose dims `in_dims` are contracted."""
    if precision == "fp8":
        return fp8.dot(x, weight, in_dims)
    last = tuple(range(x.ndim - len(in_dims), x.ndim))
    named = None if precision == "default" else precision
    return jax.lax.dot_general(x, weight, ((last, in_dims), ((), ())), named, preferred_element_type=x.dtype)
