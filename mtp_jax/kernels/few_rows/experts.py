"""Products of few rows, each with the matrix of an expert, in one GPU kernel (Pallas for Triton).

    y_af = combine(sum_k x_ak W_{e(a)kf}, sum_k x_ak U_{e(a)kf}, ...)

Only the matrices of the chosen experts are read, where a grouped matmul of few rows reads them all.

Shape letters: A assignments of a row to an expert, N rows, E experts, K contracted dim, F outputs, O outputs per
program, P numbers of the contracted dim per load.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.device import device
from mtp_jax.kernels.triton_call import triton_call

WARPS = 4
OUTPUTS = 64  # O: 128 bytes of bfloat16
PIECE = 32  # P
UNROLLED = 4  # pieces that are read before the first is used


def products(
    x_NK: jax.Array,
    weights: Sequence[jax.Array],
    expert_A: jax.Array,
    combine: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """Returns the combined products of each assignment, [A, F], in the dtype of x; has no gradient.

    Sums are in float32; each product and their combination are rounded to the dtype of x.

    Args:
      x_NK: row n belongs to the assignments n A / N .. (n + 1) A / N - 1.
      weights: [E, K, F] each, in the dtype of x.
      expert_A: int32, the expert of each assignment.
      combine: elementwise function of the products, in float32; may be omitted for a single weight.
    """
    num_outputs, outputs = weights[0].shape[2], min(OUTPUTS, pl.next_power_of_2(weights[0].shape[2]))
    kernel = functools.partial(
        _kernel, combine=combine or (lambda y: y), num_per_row=len(expert_A) // len(x_NK), outputs=outputs
    )
    (y_AF,) = triton_call(
        kernel,
        expert_A,
        x_NK,
        *weights,
        grid=(len(expert_A), pl.cdiv(num_outputs, outputs)),
        out_shape=(jax.ShapeDtypeStruct((len(expert_A), num_outputs), x_NK.dtype),),
        name="few_rows_experts",
        num_warps=WARPS,
        has_barrier=True,
    )
    return y_AF


def unsupported_reason(num_assignments: int, num_experts: int, dtype: jnp.dtype) -> str:
    """Returns why the kernel does not support the operands or the device; empty if it does."""
    if reason := device().lacks_hopper():
        return reason
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"it is for bfloat16 and float32, and this is {dtype}"
    if num_assignments > num_experts:
        return (
            f"it reads a matrix per assignment, and {num_assignments} assignments are more than {num_experts} experts"
        )
    return ""


def _kernel(expert_A, x_NK, *refs, combine, num_per_row, outputs, barrier):
    """Program (assignment, block of outputs)."""
    weights, y_AF = refs[:-1], refs[-1]
    contracted, num_outputs = x_NK.shape[1], y_AF.shape[1]
    piece = min(PIECE, pl.next_power_of_2(contracted))
    unrolled = min(UNROLLED, pl.cdiv(contracted, piece))
    assignment = pl.program_id(0)
    expert, row = expert_A[assignment], assignment // num_per_row
    output_O = pl.program_id(1) * outputs + jnp.arange(outputs)
    is_output_O = output_O < num_outputs
    shape = piece, outputs
    output_PO = jnp.broadcast_to(output_O[None], shape)

    def add(group, sums):
        """Adds the products of the next `unrolled` pieces."""
        places = [(group * unrolled + p) * piece + jnp.arange(piece) for p in range(unrolled)]
        tiles = []
        for at_P in places:
            mask_PO = jnp.broadcast_to((at_P < contracted)[:, None], shape) & is_output_O[None]
            at_PO = jnp.broadcast_to(at_P[:, None], shape)
            tiles.append([plgpu.load(w.at[expert, at_PO, output_PO], mask=mask_PO, other=0.0) for w in weights])
        barrier()  # otherwise the assembler moves each load to where its values are used
        for at_P, tile in zip(places, tiles, strict=True):
            x_P = plgpu.load(x_NK.at[row, at_P], mask=at_P < contracted, other=0.0).astype(jnp.float32)
            sums = tuple(s + w_PO.astype(jnp.float32) * x_P[:, None] for s, w_PO in zip(sums, tile, strict=True))
        return sums

    zero = jnp.zeros(shape, jnp.float32)
    sums = jax.lax.fori_loop(0, pl.cdiv(contracted, piece * unrolled), add, (zero,) * len(weights))
    found = [jnp.sum(sum_PO, axis=0).astype(y_AF.dtype).astype(jnp.float32) for sum_PO in sums]
    plgpu.store(y_AF.at[assignment, output_O], combine(*found).astype(y_AF.dtype), mask=is_output_O)
