"""Kernels of latent attention for GPUs, in Pallas for Triton.

1. `_prepare` absorbs the up-projection of keys into the queries, rotates, norms and writes the cache entries.
2. `_attend` averages the latents of a part of the slots by the softmax of the part, for all heads (2205.14135).
3. `_combine` joins the parts and multiplies by the up-projection of values.

Shape letters: as in `kernels.latent_attention`; r = R / 2 pairs, M queries (T * H and padding), P parts of the slots.
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
    num_queries = max(16, pl.next_power_of_2(num_new * num_heads))
    num_parts = min(MOST_PARTS, pl.next_power_of_2(pl.cdiv(num_slots, SLOTS)))
    ranks, values = min(RANKS, rank), min(VALUES, value)

    q_BMW, cache_BSW = triton_call(
        functools.partial(_prepare, nope=nope, eps=eps, is_interleaved=is_interleaved, ranks=ranks),
        entries.q_BTF,
        entries.kv_BTF,
        kv_b_CHX,
        norm_C,
        entries.cos_BTr,
        entries.sin_BTr,
        entries.slots_BT,
        cache_BSW,
        grid=(num_rows, num_heads + 1, rank // ranks),
        out_shape=(
            jax.ShapeDtypeStruct((num_rows, num_queries, width), dtype),
            jax.ShapeDtypeStruct(cache_BSW.shape, cache_BSW.dtype),
        ),
        name="latent_prepare",
        input_output_aliases={7: 1},
    )
    stats = jax.ShapeDtypeStruct((num_rows, num_parts, num_queries), jnp.float32)
    parts_BPMC, peak_BPM, sum_BPM = triton_call(
        functools.partial(_attend, num_heads=num_heads, rank=rank, scale=scale),
        q_BMW,
        cache_BSW,
        entries.positions_BT,
        grid=(num_rows, num_parts),
        out_shape=(jax.ShapeDtypeStruct((*stats.shape, rank), jnp.float32), stats, stats),
        name="latent_attend",
    )
    (out_BTHV,) = triton_call(
        functools.partial(_combine, nope=nope, values=values),
        parts_BPMC,
        peak_BPM,
        sum_BPM,
        kv_b_CHX,
        grid=(num_rows, num_heads, value // values),
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
    q_BMW,
    cache_BSW,
    *,
    nope,
    eps,
    is_interleaved,
    ranks,
):
    """Program (row, head, block of ranks): queries of one head; head H: the cache entries."""
    row, head, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    num_new, (rank, num_heads), num_slots = q_BTF.shape[1], kv_b_CHX.shape[:2], cache_BSW.shape[1]
    num_pairs = cos_BTr.shape[2]
    first_q, first_kv = head * (nope + 2 * num_pairs), kv_BTF.shape[2] - cache_BSW.shape[2]
    pair_r = jnp.arange(num_pairs)
    first_r, second_r = (2 * pair_r, 2 * pair_r + 1) if is_interleaved else (pair_r, pair_r + num_pairs)

    def rotated(t, a_r, b_r):
        a_r, b_r = a_r.astype(jnp.float32), b_r.astype(jnp.float32)
        cos_r, sin_r = cos_BTr[row, t, :], sin_BTr[row, t, :]
        return a_r * cos_r - b_r * sin_r, b_r * cos_r + a_r * sin_r

    @pl.when(head < num_heads)
    def absorb():
        up_cN = kv_b_CHX[pl.ds(block * ranks, ranks), head, pl.ds(0, nope)].astype(jnp.float32)
        for t in range(num_new):
            q_N = q_BTF[row, t, pl.ds(first_q, nope)].astype(jnp.float32)
            q_c = jnp.sum(up_cN * q_N[None], axis=1)
            q_BMW[row, t * num_heads + head, pl.ds(block * ranks, ranks)] = q_c.astype(q_BMW.dtype)

    @pl.when((head < num_heads) & (block == 0))
    def rotate_queries():
        for t in range(num_new):
            pairs = rotated(t, *(q_BTF[row, t, first_q + nope + at_r] for at_r in (first_r, second_r)))
            for at_r, x_r in zip((first_r, second_r), pairs, strict=True):
                q_BMW[row, t * num_heads + head, rank + at_r] = x_r.astype(q_BMW.dtype)

    @pl.when((head == num_heads) & (block == 0))
    def write_entries():
        for t in range(num_new):
            slot = slots_BT[row, t]

            @pl.when(slot < num_slots)
            def write(t=t, slot=slot):
                latent_C = kv_BTF[row, t, pl.ds(first_kv, rank)].astype(jnp.float32)
                latent_C = latent_C * jax.lax.rsqrt(jnp.sum(latent_C * latent_C) / rank + eps)
                latent_C = latent_C * norm_C[...].astype(jnp.float32)
                cache_BSW[row, slot, pl.ds(0, rank)] = latent_C.astype(cache_BSW.dtype)
                pairs = rotated(t, *(kv_BTF[row, t, first_kv + rank + at_r] for at_r in (first_r, second_r)))
                for at_r, x_r in zip((first_r, second_r), pairs, strict=True):
                    cache_BSW[row, slot, rank + at_r] = x_r.astype(cache_BSW.dtype)


def _attend(q_BMW, cache_BSW, positions_BT, parts_BPMC, peak_BPM, sum_BPM, *, num_heads, rank, scale):
    """Program (row, part): softmax and average over the slots of one part, with the part's peak and sum."""
    row, part = pl.program_id(0), pl.program_id(1)
    num_slots, width = cache_BSW.shape[1:]
    num_queries, num_parts, num_new = q_BMW.shape[1], parts_BPMC.shape[1], positions_BT.shape[1]
    per_part = pl.cdiv(pl.cdiv(num_slots, SLOTS), num_parts) * SLOTS
    latents, rotaries = pl.ds(0, rank), pl.ds(rank, width - rank)
    q_MC, q_MR = q_BMW[row, :, latents], q_BMW[row, :, rotaries]
    token_M = jnp.minimum(jnp.arange(num_queries) // num_heads, num_new - 1)
    position_M = positions_BT[row, token_M]
    first = part * per_part
    last = functools.reduce(jnp.maximum, [positions_BT[row, t] for t in range(num_new)])
    end = jnp.minimum(first + per_part, last + 1)  # later slots are not read

    def block(n, carry):
        peak_M, sum_M, out_MC = carry
        slot_S = first + n * SLOTS + jnp.arange(SLOTS)
        rows = pl.ds(first + n * SLOTS, SLOTS)
        is_slot_S1 = (slot_S < num_slots)[:, None]
        c_SC = plgpu.load(cache_BSW.at[row, rows, latents], mask=is_slot_S1, other=0.0)
        r_SR = plgpu.load(cache_BSW.at[row, rows, rotaries], mask=is_slot_S1, other=0.0)
        scores_MS = _dot(q_MC, c_SC.T) + _dot(q_MR, r_SR.T)
        is_visible_MS = slot_S[None] <= position_M[:, None]
        scores_MS = jnp.where(is_visible_MS, scores_MS * scale, MASKED)
        new_M = jnp.maximum(peak_M, scores_MS.max(axis=1))
        probs_MS = jnp.where(is_visible_MS, jnp.exp(scores_MS - new_M[:, None]), 0.0)
        kept_M = jnp.exp(peak_M - new_M)
        out_MC = out_MC * kept_M[:, None] + _dot(probs_MS.astype(c_SC.dtype), c_SC)
        return new_M, sum_M * kept_M + probs_MS.sum(axis=1), out_MC

    zero_M = jnp.zeros(num_queries, jnp.float32)
    start = zero_M + MASKED, zero_M, jnp.zeros((num_queries, rank), jnp.float32)
    num_blocks = pl.cdiv(jnp.maximum(end - first, 0), SLOTS)
    peak_BPM[row, part, :], sum_BPM[row, part, :], parts_BPMC[row, part, :, :] = jax.lax.fori_loop(
        0, num_blocks, block, start
    )


def _combine(parts_BPMC, peak_BPM, sum_BPM, kv_b_CHX, out_BTHV, *, nope, values):
    """Program (row, head, block of values): outputs of one head."""
    row, head, block = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    num_new, num_heads = out_BTHV.shape[1:3]
    up_Cv = kv_b_CHX[:, head, pl.ds(nope + block * values, values)].astype(jnp.float32)
    for t in range(num_new):
        query = t * num_heads + head
        peak_P = peak_BPM[row, :, query]
        weight_P = jnp.exp(peak_P - peak_P.max(axis=0))
        total = jnp.sum(weight_P * sum_BPM[row, :, query])
        latent_C = jnp.sum(parts_BPMC[row, :, query, :] * weight_P[:, None], axis=0) / total
        latent_C = latent_C.astype(out_BTHV.dtype).astype(jnp.float32)  # as a product of two matrices rounds it
        out_v = jnp.sum(up_Cv * latent_C[:, None], axis=0)
        out_BTHV[row, t, head, pl.ds(block * values, values)] = out_v.astype(out_BTHV.dtype)


def _dot(a, b):
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
