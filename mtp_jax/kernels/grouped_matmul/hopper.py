"""Grouped matmul on Hopper GPUs by Pallas kernels of our own (`hopper_kernels`).

XLA compiles `ragged_dot` there to a matmul of every row with every matrix, and its gradient to as much again: 98,304 x
2048 x 2816 in 64 groups takes 99.6 ms on an H200 where 1.5 ms is the floor, and has no memory for the gradient.
"""

import functools

import jax
import jax.numpy as jnp

from mtp_jax.kernels.grouped_matmul.gradient import Kernels, by_kernels

BLOCK = 128  # rows at least; columns are a multiple


def run(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """As `grouped_matmul`."""
    return by_kernels(kernels(), x_ND, w_EDF, sizes_E)


def unsupported_reason(x_ND: jax.Array, w_EDF: jax.Array) -> str:
    """Why the kernels cannot take this product; empty where they can."""
    dims = (*x_ND.shape[1:], w_EDF.shape[2])
    if x_ND.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return f"the kernels compute in bfloat16, and this is {x_ND.dtype} by {w_EDF.dtype}"
    if any(dim % BLOCK for dim in dims) or x_ND.shape[0] < BLOCK:
        return f"the kernels take at least {BLOCK} rows of multiples of {BLOCK} columns, and these are {dims} columns"
    return ""


@functools.cache
def kernels() -> Kernels:
    """The Pallas kernels, with the tiles that were fastest on one H200 (docs/log.md). A batch of products is done one
    after another.

    Imported where they are used: they need what only a jax with CUDA has.
    """
    from mtp_jax.kernels.grouped_matmul import hopper_kernels
    from mtp_jax.kernels.grouped_matmul.hopper_kernels import Tiles

    forward = functools.partial(hopper_kernels.product, tiles=Tiles(turns=11), is_transposed=False)
    rows = functools.partial(hopper_kernels.product, tiles=Tiles(turns=8), is_transposed=True)
    matrices = functools.partial(hopper_kernels.matrices, tiles=Tiles(turns=8))
    return Kernels(*map(jax.custom_batching.sequential_vmap, (forward, rows, matrices)))
