"""Product of two to eight rows on tensor cores, in Pallas for Triton.

Tensor cores multiply at least 64 rows of W by 8 of x. To use all multiprocessors nevertheless, the
contracted dim is split in Q chunks, and every chunk of W is multiplied by every chunk of x. The products of equal
chunks are summed, the others dropped:

    sum_k x_nk W_fk = sum_q (sum_c x_n,qc W_f,qc)

Shape letters: N rows, M rows and padding, K contracted dim, F outputs, O outputs per program, Q chunks, C numbers of a
chunk per step, R = O Q rows of a block of weights, S = Q M columns of a block of x.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.triton_call import triton_call

WARPS = 4
BLOCK_ROWS = 64  # R
PROGRAMS = 128  # at least, if there are enough chunks
MOST_CHUNK = 64  # C
STEPS = 8  # at least, if C is at least 16
STAGES = 6


def products(x_NK, weights, eps, combine, added_NF) -> jax.Array:
    """See `kernels.few_rows.products`."""
    (num_rows, contracted), num_outputs = x_NK.shape, weights[0].shape[0]
    chunks, chunk = blocks(num_rows, contracted, num_outputs)
    arrays = [x_NK, *weights, *([] if added_NF is None else [added_NF])]
    kernel = functools.partial(
        _kernel,
        num_weights=len(weights),
        eps=eps,
        combine=combine,
        is_added=added_NF is not None,
        chunks=chunks,
        chunk=chunk,
    )
    (out_NF,) = triton_call(
        kernel,
        *arrays,
        grid=(pl.cdiv(num_outputs, BLOCK_ROWS // chunks),),
        out_shape=(jax.ShapeDtypeStruct((num_rows, num_outputs), x_NK.dtype),),
        name="few_rows_several",
        num_warps=WARPS,
        num_stages=STAGES,
    )
    return out_NF


def blocks(num_rows: int, contracted: int, num_outputs: int) -> tuple[int, int]:
    """Returns Q and C."""
    chunks = max(1, 16 // pl.next_power_of_2(num_rows))
    while chunks < 16 and num_outputs * chunks < BLOCK_ROWS * PROGRAMS:
        chunks *= 2
    chunks = min(chunks, max(1, pl.next_power_of_2(contracted) // 16))
    return chunks, min(MOST_CHUNK, max(16, pl.next_power_of_2(contracted) // chunks // STEPS))


def _kernel(x_NK, *refs, num_weights, eps, combine, is_added, chunks, chunk):
    """Program (block of outputs,)."""
    weights, y_NF = refs[:num_weights], refs[-1]
    (num_rows, contracted), num_outputs = x_NK.shape, y_NF.shape[1]
    outputs, padded = BLOCK_ROWS // chunks, pl.next_power_of_2(num_rows)
    row_R, column_S, within_C = jnp.arange(BLOCK_ROWS), jnp.arange(chunks * padded), jnp.arange(chunk)
    first = pl.program_id(0) * outputs
    output_R, chunk_R = first + row_R // chunks, row_R % chunks
    row_S, chunk_S = column_S % padded, column_S // padded

    def step(at, carry):
        sums, squares_S = carry
        at_RC = (at * chunks + chunk_R[:, None]) * chunk + within_C[None]
        at_CS = (at * chunks + chunk_S[None]) * chunk + within_C[:, None]
        output_RC = jnp.broadcast_to(output_R[:, None], at_RC.shape)
        row_CS = jnp.broadcast_to(row_S[None], at_CS.shape)
        tiles = [_load(w_FK, output_RC, at_RC) for w_FK in weights]
        x_CS = _load(x_NK, row_CS, at_CS)
        if eps is not None:
            squares_S += jnp.sum(jnp.square(x_CS.astype(jnp.float32)), axis=0)
        return tuple(sum_RS + _dot(w_RC, x_CS) for sum_RS, w_RC in zip(sums, tiles, strict=True)), squares_S

    zero_RS = jnp.zeros((BLOCK_ROWS, chunks * padded), jnp.float32)
    carry = (zero_RS,) * num_weights, jnp.zeros(chunks * padded, jnp.float32)
    sums, squares_S = jax.lax.fori_loop(0, pl.cdiv(contracted, chunks * chunk), step, carry)

    def total(sum_RS):
        """Returns the sums over pairs of equal chunks, [O, M]."""
        sum_RS = jnp.where(chunk_R[:, None] == chunk_S[None], sum_RS, 0.0)
        sum_OS = jnp.sum(sum_RS.reshape(outputs, chunks, chunks * padded), axis=1)
        return jnp.sum(sum_OS.reshape(outputs, chunks, padded), axis=1)

    found = [total(sum_RS) for sum_RS in sums]
    if eps is not None:
        factor_M = jax.lax.rsqrt(jnp.sum(squares_S.reshape(chunks, padded), axis=0) / contracted + eps)
        found = [y_OM * factor_M[None] for y_OM in found]
    y_OM = combine(*(y_OM.astype(y_NF.dtype).astype(jnp.float32) for y_OM in found)).astype(y_NF.dtype)
    row_OM = jnp.broadcast_to(jnp.arange(padded)[None], (outputs, padded))
    output_OM = jnp.broadcast_to(first + jnp.arange(outputs)[:, None], (outputs, padded))
    if is_added:
        y_OM = y_OM.astype(jnp.float32) + _load(refs[-2], row_OM, output_OM).astype(jnp.float32)
    mask_OM = (row_OM < num_rows) & (output_OM < num_outputs)
    plgpu.store(y_NF.at[row_OM, output_OM], y_OM.astype(y_NF.dtype), mask=mask_OM)


def _load(ref, row: jax.Array, column: jax.Array) -> jax.Array:
    """Returns the elements at indices, 0 for those outside the array."""
    return plgpu.load(ref.at[row, column], mask=(row < ref.shape[0]) & (column < ref.shape[1]), other=0.0)


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
