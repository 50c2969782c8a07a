"""Kernels of latent attention for GPUs, in Pallas for Triton.

1. `_prepare` absorbs the up-projection of keys into the queries, rotates, norms and writes the cache entries.
2. `_attend` averages the latents of a part of the slots by the softmax of the part, for all heads (2205.14135).
3. `_combine` joins the parts and multiplies by the up-projection of values.

Every program works for one token, so that several tokens of a row take hardly longer than one.

Shape letters: as in `kernels.latent_attention`; r = R / 2 pairs, M heads and padding, P parts of the slots.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.triton_call import triton_call

SLOTS = 32  # slots that a program of `_attend` reads at once
MOST_PARTS = 16
RANKS = 64  # rows of kv_b that a program of `_prepare` multiplies
VALUES = 32  # value dims of a program of `_combine`
MASKED = -1e30  # as in kernels.attention.xla


def decode(entries, kv_b_CHX, norm_C, eps, cache_BSW, nope, scale, is_interleaved) -> tuple[jax.Array, jax.Array]:
    """See `kernels.latent_attention.decode`."""
    num_rows, num_new = entries.positions_BT.shape
    num_slots, width = cache_BSW.shape[1:]
    rank, num_heads = kv_b_CHX.shape[:2]
    value = kv_b_CHX.shape[2] - nope
    dtype = entries.q_BTF.dtype
    num_queries = max(16, pl.next_power_of_2(num_heads))
    num_tokens = num_rows * num_new
    num_parts = min(MOST_PARTS, pl.next_power_of_2(pl.cdiv(num_slots, SLOTS)))
    ranks, values = min(RANKS, rank), min(VALUES, value)

    q_BTMW, cache_BSW = triton_call(
        functools.partial(_prepare, nope=nope, eps=eps, is_interleaved=is_interleaved, ranks=ranks),
        entries.q_BTF,
        entries.kv_BTF,
        kv_b_CHX,
        norm_C,
        entries.cos_BTr,
        entries.sin_BTr,
        entries.slots_BT,
        cache_BSW,
        grid=(num_tokens, num_heads + 1, rank // ranks),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows, num_new, num_queries, width), dtype),
            jax.ShapeDtypeStruct(cache_BSW.shape, cache_BSW.dtype),
        ),
        name="latent_prepare",
        input_output_aliases={7: 1},
    )
    stats = jax.ShapeDtypeStruct((num_rows, num_new, num_parts, num_queries), jnp.float32)
    parts_BTPMC, peak_BTPM, sum_BTPM = triton_call(
        functools.partial(_attend, rank=rank, scale=scale),
        q_BTMW,
        cache_BSW,
        entries.positions_BT,
        grid=(num_tokens, num_parts),
        out_shape=(jax.ShapeDtypeStruct((*stats.shape, rank), jnp.float32), stats, stats),
        name="latent_attend",
    )
    (out_BTHV,) = triton_call(
        functools.partial(_combine, nope=nope, values=values),
        parts_BTPMC,
        peak_BTPM,
        sum_BTPM,
        kv_b_CHX,
        grid=(num_tokens, num_heads, value // values),
        out_shape=(jax.ShapeDtypeStruct((num_rows, num_new, num_heads, value), dtype),),
        name="latent_combine",
    )
    return out_BTHV, cache_BSW


def _prepare(
    q_BTF,
    kv_BTF,
    kv_b_CHX,
    norm_C,
    cos_BTr,
    sin_BTr,
    slots_BT,
    _,
    q_BTMW,
    cache_BSW,
    *,
    nope,
    eps,
    is_interleaved,
    ranks,
):
    """Program (token, head, block of ranks): queries of one head; head H: the cache entry."""
    row, t = divmod(pl.program_id(0), q_BTF.shape[1])
    head, block = pl.program_id(1), pl.program_id(2)
    (rank, num_heads), num_slots = kv_b_CHX.shape[:2], cache_BSW.shape[1]
    num_pairs = cos_BTr.shape[2]
    first_q, first_kv = head * (nope + 2 * num_pairs), kv_BTF.shape[2] - cache_BSW.shape[2]
    pair_r = jnp.arange(num_pairs)
    first_r, second_r = (2 * pair_r, 2 * pair_r + 1) if is_interleaved else (pair_r, pair_r + num_pairs)

    def rotated(a_r, b_r):
        a_r, b_r = a_r.astype(jnp.float32), b_r.astype(jnp.float32)
        cos_r, sin_r = cos_BTr[row, t, :], sin_BTr[row, t, :]
        return a_r * cos_r - b_r * sin_r, b_r * cos_r + a_r * sin_r

    @pl.when(head < num_heads)
    def absorb():
        up_cN = kv_b_CHX[pl.ds(block * ranks, ranks), head, pl.ds(0, nope)].astype(jnp.float32)
        q_N = q_BTF[row, t, pl.ds(first_q, nope)].astype(jnp.float32)
        q_BTMW[row, t, head, pl.ds(block * ranks, ranks)] = jnp.sum(up_cN * q_N[None], axis=1).astype(q_BTMW.dtype)

    @pl.when((head < num_heads) & (block == 0))
    def rotate_queries():
        pairs = rotated(*(q_BTF[row, t, first_q + nope + at_r] for at_r in (first_r, second_r)))
        for at_r, x_r in zip((first_r, second_r), pairs, strict=True):
            q_BTMW[row, t, head, rank + at_r] = x_r.astype(q_BTMW.dtype)

    slot = slots_BT[row, t]

    @pl.when((head == num_heads) & (block == 0) & (slot < num_slots))
    def write_entry():
        latent_C = kv_BTF[row, t, pl.ds(first_kv, rank)].astype(jnp.float32)
        latent_C = latent_C * jax.lax.rsqrt(jnp.sum(latent_C * latent_C) / rank + eps)
        latent_C = latent_C * norm_C[...].astype(jnp.float32)
        cache_BSW[row, slot, pl.ds(0, rank)] = latent_C.astype(cache_BSW.dtype)
        pairs = rotated(*(kv_BTF[row, t, first_kv + rank + at_r] for at_r in (first_r, second_r)))
        for at_r, x_r in zip((first_r, second_r), pairs, strict=True):
            cache_BSW[row, slot, rank + at_r] = x_r.astype(cache_BSW.dtype)


def _attend(q_BTMW, cache_BSW, positions_BT, parts_BTPMC, peak_BTPM, sum_BTPM, *, rank, scale):
    """Program (token, part): softmax and average over the slots of one part, with the part's peak and sum."""
    row, t = divmod(pl.program_id(0), q_BTMW.shape[1])
    part = pl.program_id(1)
    num_slots, width = cache_BSW.shape[1:]
    num_queries, num_parts = q_BTMW.shape[2], parts_BTPMC.shape[2]
    per_part = pl.cdiv(pl.cdiv(num_slots, SLOTS), num_parts) * SLOTS
    latents, rotaries = pl.ds(0, rank), pl.ds(rank, width - rank)
    q_MC, q_MR = q_BTMW[row, t, :, latents], q_BTMW[row, t, :, rotaries]
    first = part * per_part
    end = jnp.minimum(jnp.minimum(first + per_part, num_slots), positions_BT[row, t] + 1)

    def block(n, carry):
        peak_M, sum_M, out_MC = carry
        slot_S = first + n * SLOTS + jnp.arange(SLOTS)
        rows = pl.ds(first + n * SLOTS, SLOTS)
        is_visible_S = slot_S < end
        c_SC = plgpu.load(cache_BSW.at[row, rows, latents], mask=is_visible_S[:, None], other=0.0)
        r_SR = plgpu.load(cache_BSW.at[row, rows, rotaries], mask=is_visible_S[:, None], other=0.0)
        scores_MS = _dot(q_MC, c_SC.T) + _dot(q_MR, r_SR.T)
        scores_MS = jnp.where(is_visible_S[None], scores_MS * scale, MASKED)
        new_M = jnp.maximum(peak_M, scores_MS.max(axis=1))
        probs_MS = jnp.where(is_visible_S[None], jnp.exp(scores_MS - new_M[:, None]), 0.0)
        kept_M = jnp.exp(peak_M - new_M)
        out_MC = out_MC * kept_M[:, None] + _dot(probs_MS.astype(c_SC.dtype), c_SC)
        return new_M, sum_M * kept_M + probs_MS.sum(axis=1), out_MC

    zero_M = jnp.zeros(num_queries, jnp.float32)
    start = zero_M + MASKED, zero_M, jnp.zeros((num_queries, rank), jnp.float32)
    num_blocks = pl.cdiv(jnp.maximum(end - first, 0), SLOTS)
    peak_BTPM[row, t, part, :], sum_BTPM[row, t, part, :], parts_BTPMC[row, t, part, :, :] = jax.lax.fori_loop(
        0, num_blocks, block, start
    )


def _combine(parts_BTPMC, peak_BTPM, sum_BTPM, kv_b_CHX, out_BTHV, *, nope, values):
    """Program (token, head, block of values): output of one head."""
    row, t = divmod(pl.program_id(0), out_BTHV.shape[1])
    head, block = pl.program_id(1), pl.program_id(2)
    up_Cv = kv_b_CHX[:, head, pl.ds(nope + block * values, values)].astype(jnp.float32)
    peak_P = peak_BTPM[row, t, :, head]
    weight_P = jnp.exp(peak_P - peak_P.max(axis=0))
    total = jnp.sum(weight_P * sum_BTPM[row, t, :, head])
    latent_C = jnp.sum(parts_BTPMC[row, t, :, head, :] * weight_P[:, None], axis=0) / total
    latent_C = latent_C.astype(out_BTHV.dtype).astype(jnp.float32)  # as a product of two matrices rounds it
    out_v = jnp.sum(up_Cv * latent_C[:, None], axis=0)
    out_BTHV[row, t, head, pl.ds(block * values, values)] = out_v.astype(out_BTHV.dtype)


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
