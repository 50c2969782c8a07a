"""Differentiable grouped matmul from three kernels: the product and both of its gradients.

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels import KERNEL


class Kernels(NamedTuple):
    """Kernels of the three products of a grouped matmul.

    forward: (x [N, D], w [E, D, F], sizes [E]) -> [N, F]. rows: (y [N, F], w, sizes) -> [N, D], the product with the
    transposed matrices. matrices: (x, y, sizes) -> [E, D, F], x^T y of each group.
    """

    forward: Callable[..., jax.Array]
    rows: Callable[..., jax.Array]
    matrices: Callable[..., jax.Array]


def by_kernels(
    kernels: Kernels, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, row_multiple: int = 1
) -> jax.Array:
    """See `grouped_matmul`; uses kernels that write only the rows inside the groups.

    Args:
      row_multiple: the number of rows is padded to a multiple of this.
    """
    num_rows = x_ND.shape[0]
    if num_rows % row_multiple:
        x_ND = jnp.pad(x_ND, ((0, -num_rows % row_multiple), (0, 0)))
    # Rows outside the groups are zero and give zeros in any group, so the last group is extended by them.
    is_last_E = jnp.arange(len(sizes_E)) == len(sizes_E) - 1
    sizes_E = jnp.where(is_last_E, sizes_E + x_ND.shape[0] - sizes_E.sum(), sizes_E)
    return checkpoint_name(differentiable(kernels, x_ND, w_EDF, sizes_E)[:num_rows], KERNEL)


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
