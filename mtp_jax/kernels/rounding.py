"""Rounding of activations to 8 bits in both orders of their dims by one Triton kernel, on Hopper GPUs.

XLA's fusion that writes an array and its transpose computes every element twice and stores single bytes: 23
instructions per element where this kernel has 10, with accesses of 16 bytes.

Shape letters: N tokens, K columns, B and C rows and columns of a block.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.typing import DTypeLike

from mtp_jax.kernels.device import device
from mtp_jax.kernels.triton_call import triton_call

# With these, every access has 16 bytes and a block is transposed by ldmatrix, as with 64 by 64 and 2 warps or 128 by
# 128 and 4; with 64 by 64 and 4 warps, or 128 by 128 and 8, it is transposed byte by byte (PTX, jax 0.11.2).
BLOCK_ROWS, BLOCK_COLUMNS, NUM_WARPS = 128, 64, 4


def rounded_in_both_orders(
    x_NK: jax.Array, inverse_N: jax.Array, factor_N: jax.Array | None, dtype: DTypeLike
) -> tuple[jax.Array, jax.Array]:
    """Returns x * inverse rounded, [N, K], and its rows times their factors, rounded again, as columns [K, N].

    Args:
      factor_N: None: the second result is the transpose of the first.
    """
    (num_rows, num_columns), blocks = x_NK.shape, (BLOCK_ROWS, BLOCK_COLUMNS)
    per_row = [inverse_N] if factor_N is None else [inverse_N, factor_N]

    def kernel(x_ref, *refs):
        *scale_refs, out_ref, turned_ref = refs
        values_BC = (x_ref[...].astype(jnp.float32) * scale_refs[0][...][:, None]).astype(dtype)
        out_ref[...] = values_BC
        for factor_ref in scale_refs[1:]:
            values_BC = (values_BC.astype(jnp.float32) * factor_ref[...][:, None]).astype(dtype)
        turned_ref[...] = values_BC.T

    block, row = pl.BlockSpec(blocks, lambda i, j: (i, j)), pl.BlockSpec(blocks[:1], lambda i, j: (i,))
    out_NK, turned_KN = triton_call(
        kernel,
        x_NK,
        *per_row,
        grid=(num_rows // BLOCK_ROWS, num_columns // BLOCK_COLUMNS),
        in_specs=[block, *(row for _ in per_row)],
        out_specs=[block, pl.BlockSpec(blocks[::-1], lambda i, j: (j, i))],
        out_shape=[jax.ShapeDtypeStruct(shape, dtype) for shape in (x_NK.shape, x_NK.shape[::-1])],
        name="rounded_in_both_orders",
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return out_NK, turned_KN


def unsupported_reason(num_rows: int, num_columns: int) -> str:
    """Returns why the kernel does not round an array of this shape; empty if it does."""
    if num_rows % BLOCK_ROWS or num_columns % BLOCK_COLUMNS:
        return f"it takes multiples of {BLOCK_ROWS} rows and {BLOCK_COLUMNS} columns"
    return device().lacks_hopper()
