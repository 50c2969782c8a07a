"""Differentiable grouped matmul from three kernels: the product and both of its gradients.

The operands may be rounded to 8 bits. No kernel multiplies 8-bit operands by group yet. Rounded operands are exact in
bfloat16, so a product in the compute dtype has the same result as one in 8 bits, at the speed of the compute dtype.

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.fp8 import GRADIENT_DTYPE, rounded, with_one_scale


class Kernels(NamedTuple):
    """Kernels of the three products of a grouped matmul.

    forward: (x [N, D], w [E, D, F], sizes [E]) -> [N, F]. rows: (y [N, F], w, sizes) -> [N, D], the product with the
    transposed matrices. matrices: (x, y, sizes) -> [E, D, F], x^T y of each group.
    """

    forward: Callable[..., jax.Array]
    rows: Callable[..., jax.Array]
    matrices: Callable[..., jax.Array]


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


def _forward_fp8(kernels, x_ND, w_EDF, sizes_E):
    x8, w8 = rounded(x_ND, (1,)), rounded(w_EDF, (1, 2))
    y_NF = kernels.forward(x8.dequantized(x_ND.dtype), w8.dequantized(w_EDF.dtype), sizes_E)
    return y_NF, (x8, w8, sizes_E)


def _backward_fp8(kernels, residuals, grad_NF):
    x8, w8, sizes_E = residuals
    dtype = grad_NF.dtype
    grad8 = rounded(grad_NF, (1,), GRADIENT_DTYPE)
    shifted = with_one_scale(grad8, x8.scale)
    dx_ND = kernels.rows(grad8.dequantized(dtype), w8.dequantized(dtype), sizes_E)
    dw_EDF = kernels.matrices(x8.values.astype(dtype), shifted.dequantized(dtype), sizes_E)
    return dx_ND, dw_EDF, None


differentiable_fp8.defvjp(_forward_fp8, _backward_fp8)
