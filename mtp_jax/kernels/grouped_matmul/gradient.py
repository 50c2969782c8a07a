"""Differentiable grouped matmul from three kernels: the product and both of its gradients.

The operands may be rounded to 8 bits (`kernels.fp8`). Rounded operands are exact in bfloat16, so kernels that do not
multiply 8-bit operands get them in the compute dtype: the same result, at the speed of the compute dtype.

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.fp8 import GRADIENT_DTYPE, both_orders, ordered, rounded, scaled


class Kernels(NamedTuple):
    """Kernels of the three products of a grouped matmul.

    forward: (x [N, D], w [E, D, F], sizes [E]) -> [N, F]. rows: (y [N, F], w, sizes) -> [N, D], the product with the
    transposed matrices. matrices: (x, y, sizes) -> [E, D, F], x^T y of each group.
    rows_8bit, matrices_8bit: rows and matrices with 8-bit operands and results in bfloat16, or None. Every operand has
    its contracted dim last: matrices_8bit takes (x [D, N], y [F, N], sizes).
    """

    forward: Callable[..., jax.Array]
    rows: Callable[..., jax.Array]
    matrices: Callable[..., jax.Array]
    rows_8bit: Callable[..., jax.Array] | None = None
    matrices_8bit: Callable[..., jax.Array] | None = None


def by_kernels(
    kernels: Kernels, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, is_fp8: bool, row_multiple: int = 1
) -> jax.Array:
    """See `grouped_matmul`; uses kernels that write only the rows inside the groups.

    Args:
      is_fp8: round the operands of all three products to 8 bits.
      row_multiple: the number of rows is padded to a multiple of this.
    """
    num_rows = x_ND.shape[0]
    if num_rows % row_multiple:
        x_ND = jnp.pad(x_ND, ((0, -num_rows % row_multiple), (0, 0)))
    # Rows outside the groups are zero and give zeros in any group, so the last group is extended by them.
    is_last_E = jnp.arange(len(sizes_E)) == len(sizes_E) - 1
    sizes_E = jnp.where(is_last_E, sizes_E + x_ND.shape[0] - sizes_E.sum(), sizes_E)
    run = differentiable_fp8 if is_fp8 else differentiable
    return checkpoint_name(run(kernels, x_ND, w_EDF, sizes_E)[:num_rows], KERNEL)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(kernels: Kernels, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Returns the grouped matmul, computed and differentiated by `kernels`; every row is in a group."""
    return kernels.forward(x_ND, w_EDF, sizes_E)


def _forward(kernels, x_ND, w_EDF, sizes_E):
    return kernels.forward(x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)


def _backward(kernels, residuals, grad_NF):
    x_ND, w_EDF, sizes_E = residuals
    return kernels.rows(grad_NF, w_EDF, sizes_E), kernels.matrices(x_ND, grad_NF, sizes_E), None


differentiable.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable_fp8(kernels: Kernels, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """`differentiable` with operands rounded as by `kernels.fp8.dot` in all three products; w has a scale per group."""
    return _forward_fp8(kernels, x_ND, w_EDF, sizes_E)[0]


class Residuals(NamedTuple):
    """Arrays kept for the backward pass: 8-bit values of x and w, the scale of each row of x and that of its group."""

    x_DN: jax.Array
    w_EDF: jax.Array
    x_scale_N1: jax.Array
    w_scale_N1: jax.Array
    sizes_E: jax.Array


def _forward_fp8(kernels, x_ND, w_EDF, sizes_E):
    x8, w8 = rounded(x_ND, (1,)), rounded(w_EDF, (1, 2))
    w_scale_N1 = _of_groups(w8.scale[:, 0, 0], sizes_E, x_ND.shape[0])
    values_ND, turned = both_orders(x_ND, x8, 1)
    y_NF = _rows_8bit(kernels, values_ND, ordered(w8.values, (0, 2, 1)), sizes_E, x_ND.dtype)
    kept = turned.values, ordered(w8.values, (0, 1, 2))
    return scaled(y_NF, x8.scale, w_scale_N1), Residuals(*kept, x8.scale, w_scale_N1, sizes_E)


def _backward_fp8(kernels, kept, grad_NF):
    dtype = grad_NF.dtype
    grad8 = rounded(grad_NF, (1,), GRADIENT_DTYPE)
    values_NF, shifted = both_orders(grad_NF, grad8, 1, kept.x_scale_N1)
    dx_ND = _rows_8bit(kernels, values_NF, kept.w_EDF, kept.sizes_E, dtype)
    dw_EDF = _matrices_8bit(kernels, kept.x_DN, shifted.values, kept.sizes_E, dtype)
    return scaled(dx_ND, grad8.scale, kept.w_scale_N1), scaled(dw_EDF, shifted.scale), None


differentiable_fp8.defvjp(_forward_fp8, _backward_fp8)


def _rows_8bit(kernels, y_NF, w_EDF, sizes_E, dtype):
    if kernels.rows_8bit is None:
        return kernels.rows(y_NF.astype(dtype), w_EDF.astype(dtype), sizes_E)
    return kernels.rows_8bit(y_NF, w_EDF, sizes_E).astype(dtype)


def _matrices_8bit(kernels, x_DN, y_FN, sizes_E, dtype):
    if kernels.matrices_8bit is None:
        return kernels.matrices(x_DN.astype(dtype).T, y_FN.astype(dtype).T, sizes_E)
    return kernels.matrices_8bit(x_DN, y_FN, sizes_E).astype(dtype)


def _of_groups(values_E: jax.Array, sizes_E: jax.Array, num_rows: int) -> jax.Array:
    """Returns the value of the group of each row, [N, 1]; zero for rows outside the groups."""
    ends_E, row_N1 = jnp.cumsum(sizes_E), jnp.arange(num_rows)[:, None]
    is_in_NE = (row_N1 >= ends_E - sizes_E) & (row_N1 < ends_E)
    return jnp.where(is_in_NE, values_E, 0).sum(1, keepdims=True)
