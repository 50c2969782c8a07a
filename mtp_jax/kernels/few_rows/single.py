"""Product of a single row, in Pallas for Triton.

Every warp reads whole rows of the weights, and norms x for itself, which takes less time than a separate kernel.

Shape letters: K contracted dim, F outputs, O outputs per program, P numbers of the contracted dim per load.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.triton_call import triton_call

WARPS = 4
OUTPUTS = 4  # O: one per warp
PIECE = 256  # P: 16 bytes of bfloat16 for each thread of a warp
UNROLLED = 16  # pieces that are read before the first is used


def products(x_1K, weights, eps, combine, added_1F) -> jax.Array:
    """See `kernels.few_rows.products`."""
    arrays = [x_1K, *weights, *([] if added_1F is None else [added_1F])]
    num_outputs = weights[0].shape[0]
    (out_1F,) = triton_call(
        functools.partial(_kernel, num_weights=len(weights), eps=eps, combine=combine, is_added=added_1F is not None),
        *arrays,
        grid=(pl.cdiv(num_outputs, OUTPUTS),),
        out_shape=(jax.ShapeDtypeStruct((1, num_outputs), x_1K.dtype),),
        name="few_rows_single",
        num_warps=WARPS,
        has_barrier=True,
    )
    return out_1F


def _kernel(x_1K, *refs, num_weights, eps, combine, is_added, barrier):
    """Program (block of outputs,)."""
    weights, y_1F = refs[:num_weights], refs[-1]
    contracted, num_outputs = x_1K.shape[1], y_1F.shape[1]
    piece = min(PIECE, pl.next_power_of_2(contracted))
    num_pieces = pl.cdiv(contracted, piece)
    unrolled = min(UNROLLED, num_pieces)
    shape = OUTPUTS, piece
    output_O = pl.program_id(0) * OUTPUTS + jnp.arange(OUTPUTS)
    output_OP = jnp.broadcast_to(output_O[:, None], shape)
    is_output_OP = None if num_outputs % OUTPUTS == 0 else output_OP < num_outputs

    def add(first, carry):
        """Adds the products of `unrolled` pieces from `first` on."""
        sums, squares_OP = list(carry[0]), carry[1]
        places, tiles = [], []
        for p in range(unrolled):
            # Equal in every row, so that x has the layout of the weights and no values move between threads.
            at_OP = jnp.broadcast_to(((first + p) * piece + jnp.arange(piece))[None], shape)
            is_inside_OP = at_OP < contracted if contracted % (piece * unrolled) else None
            places.append((at_OP, is_inside_OP))
            tiles.append([_load(w_FK.at[output_OP, at_OP], is_output_OP, is_inside_OP) for w_FK in weights])
        barrier()  # otherwise the assembler moves each load to where its values are used
        for (at_OP, is_inside_OP), tile in zip(places, tiles, strict=True):
            x_OP = _load(x_1K.at[0, at_OP], is_inside_OP)
            if eps is not None:
                squares_OP += x_OP * x_OP
            sums = [sum_OP + w_OP * x_OP for sum_OP, w_OP in zip(sums, tile, strict=True)]
        return tuple(sums), squares_OP

    zero_OP = jnp.zeros(shape, jnp.float32)
    carry = (zero_OP,) * num_weights, zero_OP
    num_groups = pl.cdiv(num_pieces, unrolled)
    if num_groups == 1:
        carry = add(0, carry)
    else:
        carry = jax.lax.fori_loop(0, num_groups, lambda group, carry: add(group * unrolled, carry), carry)
    found = [jnp.sum(sum_OP, axis=1) for sum_OP in carry[0]]
    if eps is not None:
        factor_O = jax.lax.rsqrt(jnp.sum(carry[1], axis=1) / contracted + eps)
        found = [y_O * factor_O for y_O in found]
    y_O = combine(*(y_O.astype(y_1F.dtype).astype(jnp.float32) for y_O in found)).astype(y_1F.dtype)
    is_output_O = None if num_outputs % OUTPUTS == 0 else output_O < num_outputs
    if is_added:
        y_O = y_O.astype(jnp.float32) + _load(refs[-2].at[0, output_O], is_output_O)
    plgpu.store(y_1F.at[0, output_O], y_O.astype(y_1F.dtype), mask=is_output_O)


def _load(ref, *masks: jax.Array | None) -> jax.Array:
    """Returns the elements in float32, 0 where a mask is false."""
    given = [mask for mask in masks if mask is not None]
    if not given:
        return plgpu.load(ref).astype(jnp.float32)
    return plgpu.load(ref, mask=functools.reduce(jnp.logical_and, given), other=0.0).astype(jnp.float32)
