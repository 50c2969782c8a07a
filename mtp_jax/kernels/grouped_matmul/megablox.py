"""Grouped matmul on TPUs by jax's megablox kernels, which multiply a tile of rows only with the matrices of its groups.

For jax before 0.11, whose compiler has no such kernel for the gradient of the matrices (docs/log.md).

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import functools
import math

import jax
import jax.numpy as jnp

from mtp_jax.kernels.grouped_matmul.gradient import Kernels, by_kernels

LANES = 128
# Maximum rows and columns of a tile: MaxText's defaults (configs/base.yml, wi_tile_* and wo_tile_*). Two tiles of each
# operand, two of the result and a float32 accumulator take 12 of the 16 MiB of vector memory of a kernel.
ROWS, COLUMNS = 512, 1024


def run(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, is_fp8: bool = False) -> jax.Array:
    """See `grouped_matmul`."""
    return by_kernels(kernels(), x_ND, w_EDF, sizes_E, is_fp8, row_multiple=LANES)


@functools.cache
def kernels() -> Kernels:
    """Returns jax's Pallas kernels; vmap runs them in sequence."""
    # Lambdas, because sequential_vmap would trace the default arguments of a function as arrays.
    three = (lambda x, w, sizes: product(x, w, sizes), lambda y, w, sizes: product(y, w, sizes, True))
    return Kernels(*map(jax.custom_batching.sequential_vmap, (*three, lambda x, y, sizes: matrices(x, y, sizes))))


def product(
    x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, is_transposed: bool = False, interpret: bool = False
) -> jax.Array:
    """Returns x[n] @ w[e] for the rows of each group, [N, F] in the dtype of x.

    Args:
      x_ND: N is a multiple of 128, here and in `matrices`. sizes_E: int32, in total N.
      is_transposed: multiply by w[e]^T, with w [E, F, D].
      interpret: run the kernels in interpret mode, on any device.
    """
    from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm

    (num_rows, dim), width = x_ND.shape, w_EDF.shape[1 if is_transposed else 2]
    tiles = _tiles(num_rows, dim, width, x_ND.dtype.itemsize)
    return gmm(x_ND, w_EDF, sizes_E, x_ND.dtype, tiles, transpose_rhs=is_transposed, interpret=interpret)


def matrices(x_ND: jax.Array, y_NF: jax.Array, sizes_E: jax.Array, interpret: bool = False) -> jax.Array:
    """Returns x^T y over the rows of each group, [E, D, F] in the dtype of x; zeros for groups without rows."""
    from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm

    (num_rows, dim), width = x_ND.shape, y_NF.shape[1]
    tiles = _tiles(num_rows, dim, width, x_ND.dtype.itemsize)
    return tgmm(x_ND.T, y_NF, sizes_E, x_ND.dtype, tiles, interpret=interpret)


def unsupported_reason(x_ND: jax.Array, w_EDF: jax.Array) -> str:
    """Returns why megablox does not support the operands; empty if it does."""
    dtypes = {x_ND.dtype, w_EDF.dtype}
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"the kernels compute in bfloat16 or float32, and this is {x_ND.dtype} by {w_EDF.dtype}"
    if x_ND.shape[0] < LANES:
        return f"the kernels take at least {LANES} rows, and these are {x_ND.shape[0]}"
    return ""


def _tiles(num_rows: int, dim: int, width: int, itemsize: int) -> tuple[int, int, int]:
    """Returns tile sizes: rows that divide num_rows, and equal shares of dim and width; the last may be partial."""
    rows = next(rows for rows in range(ROWS, 0, -LANES) if num_rows % rows == 0)
    most = COLUMNS * 2 // itemsize

    def share(size: int) -> int:
        return size if size <= most else LANES * math.ceil(size / math.ceil(size / most) / LANES)

    return rows, share(dim), share(width)
