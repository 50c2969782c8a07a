"""Products of a few rows and weights whose contracted dim is last in memory, in one GPU kernel.

    y_nf = added_nf + combine(sum_k z_nk W_fk, sum_k z_nk U_fk, ...),   z = x or its RMSNorm (1910.07467)

Every warp reads whole rows of the weights, once for all rows of x, and norms x for itself, which takes less time than a
separate kernel.

Shape letters: N rows, K contracted dim, F outputs, O outputs per program, P numbers of the contracted dim per load.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.device import device
from mtp_jax.kernels.triton_call import triton_call

MOST_ROWS = 8  # kernels are unrolled over the rows
MOST_NORMED = 8192  # K of normed rows, which every warp reads
WARPS = 4
PIECE = 256  # P: 16 bytes of bfloat16 for each thread of a warp
UNROLLED = 8  # pieces that are read before the first is used


class Norm(NamedTuple):
    """RMSNorm: scale_K and epsilon."""

    scale_K: jax.Array
    eps: float


def products(
    x_NK: jax.Array,
    weights: Sequence[jax.Array],
    norm: Norm | None = None,
    combine: Callable[..., jax.Array] | None = None,
    added_NF: jax.Array | None = None,
    dtype: jax.typing.DTypeLike | None = None,
) -> jax.Array:
    """Returns the combined products of rows and weights, [N, F]; has no gradient.

    Sums are in float32. The normed rows are rounded to the dtype of x, each product and their combination to `dtype`.

    Args:
      weights: [F, K] each, in the dtype of x.
      norm: norm of the rows before the products, computed in float32.
      combine: elementwise function of the products, in float32; may be omitted for a single weight.
      added_NF: array added to the result.
      dtype: of the result; that of x by default.
    """
    num_rows, num_outputs = x_NK.shape[0], weights[0].shape[0]
    outputs = outputs_per_program(num_rows, num_outputs)
    arrays = [x_NK, *weights]
    arrays += [] if norm is None else [norm.scale_K]
    arrays += [] if added_NF is None else [added_NF]
    kernel = functools.partial(
        _kernel,
        num_weights=len(weights),
        eps=None if norm is None else norm.eps,
        combine=combine or (lambda y: y),
        is_added=added_NF is not None,
        outputs=outputs,
    )
    (out_NF,) = triton_call(
        kernel,
        *arrays,
        grid=(pl.cdiv(num_outputs, outputs),),
        out_shape=(jax.ShapeDtypeStruct((num_rows, num_outputs), dtype or x_NK.dtype),),
        name="few_rows",
        num_warps=WARPS,
        has_barrier=True,
    )
    return out_NF


def outputs_per_program(num_rows: int, num_outputs: int) -> int:
    """Returns O: one output per warp, or two where there are enough outputs and registers."""
    return 2 * WARPS if 1 < num_rows <= 4 and num_outputs >= 4096 else WARPS


def unsupported_reason(num_rows: int, contracted: int, dtype: jnp.dtype, is_normed: bool) -> str:
    """Returns why the kernel does not support the operands or the device; empty if it does."""
    if reason := device().lacks_hopper():
        return reason
    if num_rows > MOST_ROWS:
        return f"it is for {MOST_ROWS} rows, and these are {num_rows}"
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it is for bfloat16 and float32, and this is {dtype}"
    if is_normed and contracted > MOST_NORMED:
        return f"it norms {MOST_NORMED} dims, and these are {contracted}"
    return ""


def _kernel(x_NK, *refs, num_weights, eps, combine, is_added, outputs, barrier):
    """Program (block of outputs,)."""
    weights, rest, y_NF = refs[:num_weights], list(refs[num_weights:-1]), refs[-1]
    scale_K = x_NK if eps is None else rest.pop(0)
    added_NF = rest.pop(0) if is_added else y_NF
    (num_rows, contracted), num_outputs = x_NK.shape, y_NF.shape[1]
    piece = min(PIECE, pl.next_power_of_2(contracted))
    num_pieces = pl.cdiv(contracted, piece)
    unrolled = min(UNROLLED, num_pieces)
    output_O = pl.program_id(0) * outputs + jnp.arange(outputs)
    is_output_O = output_O < num_outputs if num_outputs % outputs else None
    shape = outputs, piece
    output_OP = jnp.broadcast_to(output_O[:, None], shape)

    def at(p):
        """Returns indices [O, P] of a piece, equal in every row, and the mask of those inside the array.

        Loads of the same shape as a weight's have the same layout, so that no values move between threads.
        """
        at_OP = jnp.broadcast_to((p * piece + jnp.arange(piece))[None], shape)
        is_ragged = contracted % (piece * unrolled)
        return at_OP, at_OP < contracted if is_ragged else None

    def load(ref, mask):
        other = None if mask is None else 0.0
        return plgpu.load(ref, mask=mask, other=other)

    num_groups = pl.cdiv(num_pieces, unrolled)
    zero_OP = jnp.zeros(shape, jnp.float32)

    def fold(function, carry):
        """Folds a function of `unrolled` pieces over the contracted dim."""
        if num_groups == 1:
            return function(range(unrolled), carry)

        def group(index, carry):
            return function([index * unrolled + p for p in range(unrolled)], carry)

        return jax.lax.fori_loop(0, num_groups, group, carry)

    def load_weights(numbers):
        tiles = [
            [load(w_FK.at[output_OP, at_OP], _both(mask, is_output_O, shape)) for w_FK in weights]
            for at_OP, mask in map(at, numbers)
        ]
        barrier()  # otherwise the assembler moves each load to where its values are used
        return tiles

    def add_squares(numbers, sums):
        for at_OP, mask in map(at, numbers):
            rows = [load(x_NK.at[n, at_OP], mask).astype(jnp.float32) for n in range(num_rows)]
            sums = tuple(sum_OP + x_OP * x_OP for sum_OP, x_OP in zip(sums, rows, strict=True))
        return sums

    # Weights are requested from memory before anything waits for the norm.
    first_tiles = load_weights(range(unrolled)) if num_groups == 1 else None
    if eps is not None:
        squares = fold(add_squares, (zero_OP,) * num_rows)
        factors = [jax.lax.rsqrt(jnp.sum(sum_OP, axis=1) / contracted + eps)[:, None] for sum_OP in squares]

    def add_products(numbers, sums):
        sums = list(sums)
        tiles = load_weights(numbers) if first_tiles is None else first_tiles
        for (at_OP, mask), tile in zip(map(at, numbers), tiles, strict=True):
            if eps is not None:
                scale_OP = load(scale_K.at[at_OP], mask).astype(jnp.float32)
            for n in range(num_rows):
                x_OP = load(x_NK.at[n, at_OP], mask).astype(jnp.float32)
                if eps is not None:
                    x_OP = (x_OP * factors[n] * scale_OP).astype(x_NK.dtype).astype(jnp.float32)
                for i, w_OP in enumerate(tile):
                    sums[n * num_weights + i] += w_OP.astype(jnp.float32) * x_OP
        return tuple(sums)

    sums = fold(add_products, (zero_OP,) * (num_rows * num_weights))
    for n in range(num_rows):
        found = [jnp.sum(sum_OP, axis=1).astype(y_NF.dtype) for sum_OP in sums[n * num_weights : (n + 1) * num_weights]]
        y_O = combine(*(y_O.astype(jnp.float32) for y_O in found)).astype(y_NF.dtype)
        if is_added:
            y_O = y_O.astype(jnp.float32) + load(added_NF.at[n, output_O], is_output_O).astype(jnp.float32)
        plgpu.store(y_NF.at[n, output_O], y_O.astype(y_NF.dtype), mask=is_output_O)


def _both(mask_OP: jax.Array | None, is_output_O: jax.Array | None, shape: tuple[int, int]) -> jax.Array | None:
    """Returns the elements of a tile [O, P] that are inside a weight; None: all."""
    if is_output_O is None:
        return mask_OP
    is_output_OP = jnp.broadcast_to(is_output_O[:, None], shape)
    return is_output_OP if mask_OP is None else is_output_OP & mask_OP
