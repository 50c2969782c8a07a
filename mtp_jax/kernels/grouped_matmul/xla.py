"""Grouped matmul by `jax.lax.ragged_dot`: native on TPUs since jax 0.11, dense on CPUs and GPUs.

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels.grouped_matmul.gradient import Kernels, differentiable_fp8

RAGGED_DOT = "grouped_matmul_ragged_dot"  # checkpoint name of the output


def run(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, is_fp8: bool = False) -> jax.Array:
    """See `grouped_matmul`; differentiated by jax, unless the operands are rounded to 8 bits."""
    y_NF = differentiable_fp8(PRODUCTS, x_ND, w_EDF, sizes_E) if is_fp8 else jax.lax.ragged_dot(x_ND, w_EDF, sizes_E)
    return checkpoint_name(y_NF, RAGGED_DOT)


def _rows(y_NF: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    return jax.lax.ragged_dot(y_NF, jnp.swapaxes(w_EDF, 1, 2), sizes_E)


def _matrices(x_ND: jax.Array, y_NF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    shape = jax.ShapeDtypeStruct((len(sizes_E), x_ND.shape[1], y_NF.shape[1]), x_ND.dtype)
    return jax.linear_transpose(lambda w_EDF: jax.lax.ragged_dot(x_ND, w_EDF, sizes_E), shape)(y_NF)[0]


PRODUCTS = Kernels(jax.lax.ragged_dot, _rows, _matrices)
