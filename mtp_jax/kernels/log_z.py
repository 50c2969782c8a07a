"""Argmax and log-sum-exp of the logits of tokens in one pass: a Triton kernel on Hopper GPUs, else a reduction of XLA.

    z = log sum_v exp(logits_v)

A second kernel writes the gradient of the cross-entropy over the logits as well.

The reduction takes two exponentials per logit, since two partial sums are joined at every step. In the kernel a lane
takes one per logit and one more per PIECES logits.

Shape letters: N tokens, V vocabulary, L lanes: partial results of a program.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.device import device
from mtp_jax.kernels.triton_call import triton_call

NUM_WARPS = 4
LANES = 1024  # eight per thread, 16 bytes of bfloat16
PIECES = 4  # of LANES logits each, that are read before the first is used
# Of `softmax_gradient`: so many threads that one program fills a multiprocessor.
WIDE_WARPS, WIDE_LANES, WIDE_PIECES = 32, 4096, 5


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
    num_rows, vocab = logits_NV.shape

    def kernel(logits_ref, picks_ref, log_z_ref):
        row = pl.program_id(0)
        picks_ref[row], log_z_ref[row] = _of_row(logits_ref, row, vocab, LANES, PIECES)

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


class SoftmaxGradient(NamedTuple):
    """Results of `softmax_gradient`: `argmax_and_log_z`, logits of the targets, and gradients of the logits.

    gradient: [N, V], in the dtype of the logits. largest: float32[N], the largest absolute value of each of its rows.
    """

    picks: jax.Array
    log_z: jax.Array
    target_logit: jax.Array
    gradient: jax.Array
    largest: jax.Array


def softmax_gradient(
    logits_NV: jax.Array,
    targets_N: jax.Array,
    cotangent_N: jax.Array,
    factor: Callable[[jax.Array], jax.Array | float],
) -> SoftmaxGradient:
    """Returns (softmax * factor(z) - one_hot(target)) * cotangent, and what `argmax_and_log_z` returns, by one kernel.

    The gradient is written over the logits. A program reads its row twice, and the rows of all programs at work (27 MB
    on an H200 with 102,400 words) fit in the L2 cache. Timings are in docs/log.md, 2026-12-01.

    Args:
      logits_NV: bfloat16.
      targets_N: int.
      cotangent_N: float32.
      factor: function of z, traced in the kernel.
    """
    num_rows, vocab = logits_NV.shape

    def kernel(logits_ref, targets_ref, cotangent_ref, picks_ref, log_z_ref, target_ref, out_ref, largest_ref, barrier):
        row, lane_L = pl.program_id(0), jnp.arange(WIDE_LANES)
        target, cotangent = targets_ref[row], cotangent_ref[row]
        target_ref[row] = logits_ref[row, target].astype(jnp.float32)
        pick, log_z = _of_row(logits_ref, row, vocab, WIDE_LANES, WIDE_PIECES, "evict_last")
        picks_ref[row], log_z_ref[row] = pick, log_z
        scale = factor(log_z) * cotangent
        barrier()  # the logit of the target has been read

        def overwrite(at, largest_L):
            places = [(at * WIDE_PIECES + piece) * WIDE_LANES + lane_L for piece in range(WIDE_PIECES)]
            tiles = [_logits_at(logits_ref, row, place_L, vocab, "evict_first") for place_L in places]
            for place_L, tile_L in zip(places, tiles, strict=True):
                gradient_L = _exp(tile_L - log_z) * scale - jnp.where(place_L == target, cotangent, 0.0)
                gradient_L = gradient_L.astype(out_ref.dtype)
                largest_L = jnp.maximum(largest_L, jnp.abs(gradient_L).astype(jnp.float32))
                is_inside_L = place_L < vocab
                plgpu.store(out_ref.at[row, place_L], gradient_L, mask=is_inside_L, eviction_policy="evict_first")
            return largest_L

        steps = pl.cdiv(vocab, WIDE_LANES * WIDE_PIECES)
        largest_ref[row] = jnp.max(jax.lax.fori_loop(0, steps, overwrite, jnp.zeros(WIDE_LANES, jnp.float32)))

    per_row = [jax.ShapeDtypeStruct((num_rows,), dtype) for dtype in (jnp.int32, *[jnp.float32] * 3)]
    whole = jax.ShapeDtypeStruct(logits_NV.shape, logits_NV.dtype)
    found = triton_call(
        kernel,
        logits_NV,
        targets_N.astype(jnp.int32),
        cotangent_N,
        grid=(num_rows,),
        out_shape=[*per_row[:3], whole, per_row[3]],
        input_output_aliases={0: 3},
        name="softmax_gradient",
        num_warps=WIDE_WARPS,
        num_stages=1,
        has_barrier=True,
    )
    return SoftmaxGradient(*found)


def _of_row(
    logits_ref, row, vocab: int, lanes: int, pieces: int, eviction_policy: str | None = None
) -> tuple[jax.Array, jax.Array]:
    """Returns argmax and log-sum-exp of a row inside a kernel."""
    lane_L = jnp.arange(lanes)

    def add(at, carry):
        peak_L, index_L, total_L = carry
        places = [(at * pieces + piece) * lanes + lane_L for piece in range(pieces)]
        tiles = [_logits_at(logits_ref, row, place_L, vocab, eviction_policy) for place_L in places]
        before_L = peak_L
        for place_L, tile_L in zip(places, tiles, strict=True):
            index_L = jnp.where(tile_L > peak_L, place_L, index_L)
            peak_L = jnp.maximum(peak_L, tile_L)
        total_L *= _exp(before_L - peak_L)
        for tile_L in tiles:
            total_L += _exp(tile_L - peak_L)
        return peak_L, index_L, total_L

    zero_L = jnp.zeros(lanes, jnp.float32)
    carry = zero_L + jnp.finfo(jnp.float32).min, lane_L * 0, zero_L
    peak_L, index_L, total_L = jax.lax.fori_loop(0, pl.cdiv(vocab, lanes * pieces), add, carry)
    peak = jnp.max(peak_L)
    pick = jnp.min(jnp.where(peak_L == peak, index_L, vocab)).astype(jnp.int32)
    return pick, peak + jnp.log(jnp.sum(total_L * _exp(peak_L - peak)))


def _logits_at(logits_ref, row, place_L: jax.Array, vocab: int, eviction_policy: str | None) -> jax.Array:
    """Returns logits of a row in float32; -inf for places after the last one."""
    found = plgpu.load(
        logits_ref.at[row, place_L], mask=place_L < vocab, other=-jnp.inf, eviction_policy=eviction_policy
    )
    return found.astype(jnp.float32)


def _exp(x: jax.Array) -> jax.Array:
    """Returns exp(x) for x <= 0, in 3 instructions instead of the 9 of `jnp.exp`."""
    return jnp.exp2(x * math.log2(math.e))
