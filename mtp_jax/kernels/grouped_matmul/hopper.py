"""Grouped matmul on Hopper GPUs by the Pallas kernels of `hopper_kernels`.

On GPUs XLA compiles `ragged_dot` to a matmul of every row with every matrix, and its gradient likewise: 98,304 x 2048 x
2816 in 64 groups takes 99.6 ms on an H200, where the lower bound is 1.5 ms, and the gradient runs out of memory.
"""

import functools

import jax
import jax.numpy as jnp

from mtp_jax.kernels.grouped_matmul.gradient import Kernels, by_kernels

BLOCK = 128  # minimum number of rows; numbers of columns are multiples, and in 8 bits the number of rows too


def run(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, is_fp8: bool = False) -> jax.Array:
    """See `grouped_matmul`."""
    return by_kernels(kernels(), x_ND, w_EDF, sizes_E, is_fp8, row_multiple=BLOCK if is_fp8 else 1)


def unsupported_reason(x_ND: jax.Array, w_EDF: jax.Array) -> str:
    """Returns why the kernels do not support the operands; empty if they do."""
    dims = (*x_ND.shape[1:], w_EDF.shape[2])
    if x_ND.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return f"the kernels compute in bfloat16, and this is {x_ND.dtype} by {w_EDF.dtype}"
    if any(dim % BLOCK for dim in dims) or x_ND.shape[0] < BLOCK:
        return f"the kernels take at least {BLOCK} rows of multiples of {BLOCK} columns, and these are {dims} columns"
    return ""


@functools.cache
def kernels() -> Kernels:
    """Returns the Pallas kernels; vmap runs them in sequence.

    The tiles in bfloat16 are the fastest ones on one H200 (docs/log.md). 8-bit blocks of the same number of bytes have
    twice as many columns to sum over.

    The kernels are imported on use, since they require a jax with CUDA.
    """
    from mtp_jax.kernels.grouped_matmul import hopper_kernels
    from mtp_jax.kernels.grouped_matmul.hopper_kernels import Tiles

    forward = functools.partial(hopper_kernels.product, tiles=Tiles(turns=11), is_transposed=False)
    rows = functools.partial(hopper_kernels.product, tiles=Tiles(turns=8), is_transposed=True)
    matrices = functools.partial(hopper_kernels.matrices, tiles=Tiles(turns=8))
    tiles_8bit = Tiles(block_k=128, turns=8)
    rows_8bit = functools.partial(hopper_kernels.product, tiles=tiles_8bit, is_transposed=True)
    matrices_8bit = functools.partial(hopper_kernels.matrices_8bit, tiles=tiles_8bit)
    every = forward, rows, matrices, rows_8bit, matrices_8bit
    return Kernels(*map(jax.custom_batching.sequential_vmap, every))
