"""Argmax and log-sum-exp of the logits of tokens in one pass: a Triton kernel on Hopper GPUs, else a reduction of XLA.

    z = log sum_v exp(logits_v)

The reduction takes two exponentials per logit, since two partial sums are joined at every step. In the kernel a lane
takes one per logit and one more per PIECES logits.

Shape letters: N tokens, V vocabulary, L lanes: partial results of a program.
"""

import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.device import device
from mtp_jax.kernels.triton_call import triton_call

NUM_WARPS = 4
LANES = 1024  # eight per thread, 16 bytes of bfloat16
PIECES = 4  # of LANES logits each, that are read before the first is used


def argmax_and_log_z(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the index of the first largest logit, int32[...], and z, float32[...]; it has no gradient.

    z is NaN where a logit is.

    Args:
      logits: [..., V], bfloat16 or float32; not all of a token are -inf.
    """
    if device().lacks_hopper():
        return by_reduction(logits.astype(jnp.float32))
    picks_N, z_N = by_kernel(logits.reshape(math.prod(logits.shape[:-1]), logits.shape[-1]))
    return picks_N.reshape(logits.shape[:-1]), z_N.reshape(logits.shape[:-1])


def by_reduction(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the results of `argmax_and_log_z` for float32 logits, computed by one reduction of three arrays."""

    def join(one, two):
        """Joins the largest logit, its index and the sum of exponentials relative to it, of two parts."""
        (peak, index, total), (peak2, index2, total2) = one, two
        is_first = (peak > peak2) | ((peak == peak2) & (index < index2))
        highest = jnp.maximum(peak, peak2)
        total = total * jnp.exp(peak - highest) + total2 * jnp.exp(peak2 - highest)
        return highest, jnp.where(is_first, index, index2), total

    index = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
    nothing = jnp.finfo(logits.dtype).min, jnp.int32(0), jnp.zeros((), logits.dtype)
    parts = logits, index, jnp.ones_like(logits)
    peak, picks, total = jax.lax.reduce(parts, nothing, join, (logits.ndim - 1,))
    return picks, peak + jnp.log(total)


def by_kernel(logits_NV: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the results of `argmax_and_log_z` for [N, V], computed by the kernel."""
    (num_rows, vocab), step = logits_NV.shape, LANES * PIECES

    def kernel(logits_ref, picks_ref, log_z_ref):
        row, lane_L = pl.program_id(0), jnp.arange(LANES)

        def add(at, carry):
            peak_L, index_L, total_L = carry
            places = [at * step + piece * LANES + lane_L for piece in range(PIECES)]
            tiles = [
                plgpu.load(logits_ref.at[row, place_L], mask=place_L < vocab, other=-jnp.inf).astype(jnp.float32)
                for place_L in places
            ]
            before_L = peak_L
            for place_L, tile_L in zip(places, tiles, strict=True):
                index_L = jnp.where(tile_L > peak_L, place_L, index_L)
                peak_L = jnp.maximum(peak_L, tile_L)
            total_L *= _exp(before_L - peak_L)
            for tile_L in tiles:
                total_L += _exp(tile_L - peak_L)
            return peak_L, index_L, total_L

        zero_L = jnp.zeros(LANES, jnp.float32)
        carry = zero_L + jnp.finfo(jnp.float32).min, lane_L * 0, zero_L
        peak_L, index_L, total_L = jax.lax.fori_loop(0, pl.cdiv(vocab, step), add, carry)
        peak = jnp.max(peak_L)
        picks_ref[row] = jnp.min(jnp.where(peak_L == peak, index_L, vocab)).astype(jnp.int32)
        log_z_ref[row] = peak + jnp.log(jnp.sum(total_L * _exp(peak_L - peak)))

    picks_N, log_z_N = triton_call(
        kernel,
        logits_NV,
        grid=(num_rows,),
        out_shape=[jax.ShapeDtypeStruct((num_rows,), dtype) for dtype in (jnp.int32, jnp.float32)],
        name="argmax_and_log_z",
        num_warps=NUM_WARPS,
        num_stages=1,
    )
    return picks_N, log_z_N


def _exp(x: jax.Array) -> jax.Array:
    """Returns exp(x) for x <= 0, in 3 instructions instead of the 9 of `jnp.exp`."""
    return jnp.exp2(x * math.log2(math.e))
