"""Kernels of latent attention for GPUs, in Pallas for Triton.

1. `_prepare` absorbs the up-projection of keys into the queries, rotates, norms and writes the cache entries.
2. `_attend` averages the latents of a part of the slots by the softmax of the part, for all heads (2205.14135).
3. `_combine` joins the parts and multiplies by the up-projection of values.

For a few tokens every program works for one of them, so that several take hardly longer than one. For more, `_prepare`
and `_combine` multiply a tile of tokens by the weights that they read.

Shape letters: as in `kernels.latent_attention`; N = B * T tokens, t tokens of a program, r = R / 2 pairs, M heads and
padding, P parts of the slots.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.triton_call import triton_call

FEW = 16  # tokens that have programs of their own
TOKENS = 16  # of a tile
SLOTS = 32  # slots that a program of `_attend` reads at once
MOST_PARTS = 16
PROGRAMS = 128  # of `_attend`, at least, for more than a few tokens with enough slots
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
    tile, num_parts = blocks(num_tokens, num_slots)
    ranks, values = min(RANKS, rank), min(VALUES, value)
    q_NF, kv_NF, cos_Nr, sin_Nr, positions_N, slots_N = (x.reshape(num_tokens, *x.shape[2:]) for x in entries)

    q_NMW, cache_BSW = triton_call(
        functools.partial(
            _prepare, num_new=num_new, nope=nope, eps=eps, is_interleaved=is_interleaved, tile=tile, ranks=ranks
        ),
        q_NF,
        kv_NF,
        kv_b_CHX,
        norm_C,
        cos_Nr,
        sin_Nr,
        slots_N,
        cache_BSW,
        grid=(pl.cdiv(num_tokens, tile), num_heads + 1, rank // ranks),
        out_shape=(
            jax.ShapeDtypeStruct((num_tokens, num_queries, width), dtype),
            jax.ShapeDtypeStruct(cache_BSW.shape, cache_BSW.dtype),
        ),
        name="latent_prepare",
        input_output_aliases={7: 1},
    )
    stats = jax.ShapeDtypeStruct((num_tokens, num_parts, num_queries), jnp.float32)
    parts_NPMC, peak_NPM, sum_NPM = triton_call(
        functools.partial(_attend, num_new=num_new, rank=rank, scale=scale),
        q_NMW,
        cache_BSW,
        positions_N,
        grid=(num_tokens, num_parts),
        out_shape=(jax.ShapeDtypeStruct((*stats.shape, rank), jnp.float32), stats, stats),
        name="latent_attend",
    )
    (out_NHV,) = triton_call(
        functools.partial(_combine, nope=nope, tile=tile, values=values),
        parts_NPMC,
        peak_NPM,
        sum_NPM,
        kv_b_CHX,
        grid=(pl.cdiv(num_tokens, tile), num_heads, value // values),
        out_shape=(jax.ShapeDtypeStruct((num_tokens, num_heads, value), dtype),),
        name="latent_combine",
    )
    return out_NHV.reshape(num_rows, num_new, num_heads, value), cache_BSW


def blocks(num_tokens: int, num_slots: int) -> tuple[int, int]:
    """Returns the tokens of a program of `_prepare` and `_combine`, and P."""
    most_parts = min(MOST_PARTS, pl.next_power_of_2(pl.cdiv(num_slots, SLOTS)))
    if num_tokens <= FEW:
        return 1, most_parts
    num_parts = 1
    while num_parts < most_parts and num_parts * num_tokens < PROGRAMS:
        num_parts *= 2
    return TOKENS, num_parts


def _prepare(
    q_NF,
    kv_NF,
    kv_b_CHX,
    norm_C,
    cos_Nr,
    sin_Nr,
    slots_N,
    _,
    q_NMW,
    cache_BSW,
    *,
    num_new,
    nope,
    eps,
    is_interleaved,
    tile,
    ranks,
):
    """Program (tile, head, block of ranks): queries of one head; head H: the cache entries."""
    head, block = pl.program_id(1), pl.program_id(2)
    num_tokens, (rank, num_heads), num_slots = slots_N.shape[0], kv_b_CHX.shape[:2], cache_BSW.shape[1]
    tokens = pl.ds(pl.program_id(0) * tile, tile)
    token_t = pl.program_id(0) * tile + jnp.arange(tile)
    is_token_t = token_t < num_tokens
    num_pairs = cos_Nr.shape[1]
    first_q, first_kv = head * (nope + 2 * num_pairs), kv_NF.shape[1] - cache_BSW.shape[2]
    pair_r = jnp.arange(num_pairs)
    first_r, second_r = (2 * pair_r, 2 * pair_r + 1) if is_interleaved else (pair_r, pair_r + num_pairs)
    shape_tr = tile, num_pairs
    token_tr = jnp.broadcast_to(token_t[:, None], shape_tr)

    def load(ref, *at):
        mask_t = is_token_t if len(at) == 1 else is_token_t[:, None]
        return plgpu.load(ref.at[at], mask=mask_t, other=0).astype(jnp.float32)

    def rotated(ref, first):
        """Returns the columns of both numbers of each pair, [t, r], and the numbers after rotation."""
        at_tr = [jnp.broadcast_to(at_r[None], shape_tr) for at_r in (first_r, second_r)]
        a_tr, b_tr = (load(ref, token_tr, first + pairs_tr) for pairs_tr in at_tr)
        cos_tr, sin_tr = load(cos_Nr, tokens, slice(None)), load(sin_Nr, tokens, slice(None))
        return zip(at_tr, (a_tr * cos_tr - b_tr * sin_tr, b_tr * cos_tr + a_tr * sin_tr), strict=True)

    @pl.when(head < num_heads)
    def absorb():
        up_cN = kv_b_CHX[pl.ds(block * ranks, ranks), head, pl.ds(0, nope)]
        q_tN = load(q_NF, tokens, pl.ds(first_q, nope))
        out_tc = _product(q_tN.astype(up_cN.dtype), up_cN.T)
        at = q_NMW.at[tokens, head, pl.ds(block * ranks, ranks)]
        plgpu.store(at, out_tc.astype(q_NMW.dtype), mask=is_token_t[:, None])

    @pl.when((head < num_heads) & (block == 0))
    def rotate_queries():
        for at_tr, x_tr in rotated(q_NF, first_q + nope):
            plgpu.store(q_NMW.at[token_tr, head, rank + at_tr], x_tr.astype(q_NMW.dtype), mask=is_token_t[:, None])

    @pl.when((head == num_heads) & (block == 0))
    def write_entries():
        slot_t = plgpu.load(slots_N.at[tokens], mask=is_token_t, other=num_slots)
        is_written_t = is_token_t & (slot_t < num_slots)
        latent_tC = load(kv_NF, tokens, pl.ds(first_kv, rank))
        mean_t = jnp.sum(latent_tC * latent_tC, axis=1) / rank
        latent_tC = latent_tC * jax.lax.rsqrt(mean_t + eps)[:, None] * norm_C[...].astype(jnp.float32)[None]

        def write(at_tw, x_tw):
            row_tw = jnp.broadcast_to((token_t // num_new)[:, None], at_tw.shape)
            slot_tw = jnp.broadcast_to(slot_t[:, None], at_tw.shape)
            mask_tw = jnp.broadcast_to(is_written_t[:, None], at_tw.shape)
            plgpu.store(cache_BSW.at[row_tw, slot_tw, at_tw], x_tw.astype(cache_BSW.dtype), mask=mask_tw)

        write(jnp.broadcast_to(jnp.arange(rank)[None], latent_tC.shape), latent_tC)
        for at_tr, x_tr in rotated(kv_NF, first_kv + rank):
            write(rank + at_tr, x_tr)


def _attend(q_NMW, cache_BSW, positions_N, parts_NPMC, peak_NPM, sum_NPM, *, num_new, rank, scale):
    """Program (token, part): softmax and average over the slots of one part, with the part's peak and sum."""
    token, part = pl.program_id(0), pl.program_id(1)
    row = token // num_new
    num_slots, width = cache_BSW.shape[1:]
    num_queries, num_parts = q_NMW.shape[1], parts_NPMC.shape[1]
    per_part = pl.cdiv(pl.cdiv(num_slots, SLOTS), num_parts) * SLOTS
    latents, rotaries = pl.ds(0, rank), pl.ds(rank, width - rank)
    q_MC, q_MR = q_NMW[token, :, latents], q_NMW[token, :, rotaries]
    first = part * per_part
    end = jnp.minimum(jnp.minimum(first + per_part, num_slots), positions_N[token] + 1)

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
    peak_NPM[token, part, :], sum_NPM[token, part, :], parts_NPMC[token, part, :, :] = jax.lax.fori_loop(
        0, num_blocks, block, start
    )


def _combine(parts_NPMC, peak_NPM, sum_NPM, kv_b_CHX, out_NHV, *, nope, tile, values):
    """Program (tile, head, block of values): output of one head."""
    tokens = pl.ds(pl.program_id(0) * tile, tile)
    is_token_t = pl.program_id(0) * tile + jnp.arange(tile) < out_NHV.shape[0]
    head, block = pl.program_id(1), pl.program_id(2)
    num_parts, rank = parts_NPMC.shape[1], parts_NPMC.shape[3]
    up_Cv = kv_b_CHX[:, head, pl.ds(nope + block * values, values)]
    mask_tp = is_token_t[:, None]
    highest_t = plgpu.load(peak_NPM.at[tokens, :, head], mask=mask_tp, other=0.0).max(axis=1)

    def joined(parts):
        """Returns the sums over parts of latents and of weights, relative to the highest peak."""
        peak_tp = plgpu.load(peak_NPM.at[tokens, parts, head], mask=mask_tp, other=0.0)
        sum_tp = plgpu.load(sum_NPM.at[tokens, parts, head], mask=mask_tp, other=1.0)
        parts_tpC = plgpu.load(parts_NPMC.at[tokens, parts, head, :], mask=mask_tp[:, :, None], other=0.0)
        weight_tp = jnp.exp(peak_tp - highest_t[:, None])
        return jnp.sum(parts_tpC * weight_tp[:, :, None], axis=1), jnp.sum(sum_tp * weight_tp, axis=1)

    if tile == 1:
        latent_tC, total_t = joined(slice(None))
    else:  # the parts of a tile do not fit into the registers of a program
        start = jnp.zeros((tile, rank), jnp.float32), jnp.zeros(tile, jnp.float32)
        add = lambda part, sums: tuple(map(jnp.add, sums, joined(pl.ds(part, 1))))  # noqa: E731
        latent_tC, total_t = jax.lax.fori_loop(0, num_parts, add, start)
    latent_tC = latent_tC / total_t[:, None]
    out_tv = _product(latent_tC.astype(out_NHV.dtype).astype(up_Cv.dtype), up_Cv)
    at = out_NHV.at[tokens, head, pl.ds(block * values, values)]
    plgpu.store(at, out_tv.astype(out_NHV.dtype), mask=is_token_t[:, None])


def _product(x_tk: jax.Array, w_kn: jax.Array) -> jax.Array:
    """Returns x w in float32, on tensor cores if there are enough tokens for them."""
    if x_tk.shape[0] > 1:
        return _dot(x_tk, w_kn)
    return jnp.sum(x_tk.astype(jnp.float32).T * w_kn.astype(jnp.float32), axis=0)[None]


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)
