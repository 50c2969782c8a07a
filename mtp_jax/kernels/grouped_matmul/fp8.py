"""Grouped matmul with operands rounded to 8 bits, on the backends of the compute dtype.

No backend multiplies 8-bit operands by group yet. Rounded operands are exact in bfloat16, so a product in the compute
dtype has the same result as one in 8 bits, at the speed of the compute dtype.

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import functools
from collections.abc import Callable

import jax

from mtp_jax.kernels.fp8 import GRADIENT_DTYPE, rounded, with_one_scale

Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(product: Product, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """See `grouped_matmul`; rounds the operands of all three products as `kernels.fp8.dot`, w with a scale per group.

    Args:
      product: a backend's grouped matmul.
    """
    return _forward(product, x_ND, w_EDF, sizes_E)[0]


def _forward(product, x_ND, w_EDF, sizes_E):
    x8, w8 = rounded(x_ND, (1,)), rounded(w_EDF, (1, 2))
    return product(x8.dequantized(x_ND.dtype), w8.dequantized(x_ND.dtype), sizes_E), (x8, w8, sizes_E)


def _backward(product, residuals, g_NF):
    x8, w8, sizes_E = residuals
    x_ND, w_EDF = x8.dequantized(g_NF.dtype), w8.dequantized(g_NF.dtype)
    g8 = rounded(g_NF, (1,), GRADIENT_DTYPE)
    (dx_ND,) = jax.vjp(lambda x_ND: product(x_ND, w_EDF, sizes_E), x_ND)[1](g8.dequantized(g_NF.dtype))
    shifted = with_one_scale(g8, x8.scale)
    x_ND, g_NF = x8.values.astype(g_NF.dtype), shifted.dequantized(g_NF.dtype)
    (dw_EDF,) = jax.vjp(lambda w_EDF: product(x_ND, w_EDF, sizes_E), w_EDF)[1](g_NF)
    return dx_ND, dw_EDF, None


run.defvjp(_forward, _backward)
