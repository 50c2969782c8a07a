"""Products of a few rows and weights whose contracted dim is last in memory, in one GPU kernel.

    y_nf = added_nf + combine(sum_k z_nk W_fk, sum_k z_nk U_fk, ...),   z = x or x / sqrt(mean(x^2) + eps)

Shape letters: N rows, K contracted dim, F outputs.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from mtp_jax.kernels.device import device
from mtp_jax.kernels.few_rows import several, single

MOST_ROWS = 8
LEAST_CONTRACTED = 64


def products(
    x_NK: jax.Array,
    weights: Sequence[jax.Array],
    eps: float | None = None,
    combine: Callable[..., jax.Array] | None = None,
    added_NF: jax.Array | None = None,
) -> jax.Array:
    """Returns the combined products of rows and weights, [N, F], in the dtype of x; has no gradient.

    Sums and the norm are in float32; each product and their combination are rounded to the dtype of x.

    Args:
      weights: [F, K] each, in the dtype of x.
      eps: epsilon of an RMSNorm (1910.07467) of the rows without scale, before the products; None: no norm.
      combine: elementwise function of the products, in float32; may be omitted for a single weight.
      added_NF: array added to the result.
    """
    run = single.products if x_NK.shape[0] == 1 else several.products
    return run(x_NK, weights, eps, combine or (lambda y: y), added_NF)


def unsupported_reason(num_rows: int, contracted: int, dtype: jnp.dtype) -> str:
    """Returns why the kernels do not support the operands or the device; empty if they do."""
    if reason := device().lacks_hopper():
        return reason
    if num_rows > MOST_ROWS:
        return f"it is for {MOST_ROWS} rows, and these are {num_rows}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it is for bfloat16 and float32, and this is {dtype}"
    if pl.next_power_of_2(contracted) < LEAST_CONTRACTED:
        return f"it is for sums of at least {LEAST_CONTRACTED} products, and these are of {contracted}"
    return ""
