"""Backward pass: the probabilities are recomputed, once for queries and once for keys and values.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mtp_jax.kernels.attention.hopper import blocks


def gradient_of_queries(seen, q_BTHQ, k_BSGQ, v_BSGV, grad_BTHV, total_BHT, delta_BHT, scale, tiles):
    """Returns the gradient of the queries, computed per block of queries."""
    num_rows, length, heads, _ = q_BTHQ.shape
    dtype, (block, stages) = q_BTHQ.dtype, tiles

    def attention_queries(
        start_ref, first_ref, q_ref, k_ref, v_ref, grad_ref, total_ref, delta_ref, out_ref, q_smem2, grad_smem2, loaded
    ):
        place = blocks.Place(q_ref, k_ref, length // blocks.BLOCK, is_reversed=True)
        q_smem, grad_smem, queries = q_smem2.at[place.warpgroup], grad_smem2.at[place.warpgroup], place.own
        keys = blocks.Seen(start_ref, first_ref, place, block)

        def compute(run):
            own = (place.row, queries, place.head)
            plgpu.copy_gmem_to_smem(q_ref.at[own], q_smem, loaded.at[place.warpgroup])
            plgpu.copy_gmem_to_smem(grad_ref.at[own], grad_smem, loaded.at[place.warpgroup])
            start = blocks.load(start_ref.at[place.row, queries], blocks.ROW)
            total, delta = (
                blocks.load(ref.at[place.row, place.head, queries], blocks.ROW) for ref in (total_ref, delta_ref)
            )
            plgpu.barrier_wait(loaded.at[place.warpgroup])
            zero = plgpu.layout_cast(jnp.zeros(q_smem.shape, jnp.float32), blocks.TILE)
            q_smem[...] = (run((zero, start, total, delta))[0] * scale).astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_smem, out_ref.at[own])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def step(index, k_smem, v_smem, k_done, v_done, carry):
            sums, start, total, delta = carry

            def products(scores, grads):
                plgpu.wgmma(scores, q_smem, k_smem.T)
                plgpu.wgmma(grads, grad_smem, v_smem.T)
                return scores[...], grads[...]

            scores, grads = pl.run_scoped(products, *[plgpu.ACC((blocks.ROWS, block), jnp.float32)] * 2)
            plgpu.barrier_arrive(v_done)
            scores = keys.masked(scores * (scale * blocks.LOG2E), index[0], start)
            probs = jnp.exp2(scores - blocks.across(total, scores.shape))
            grads = (probs * (grads - blocks.across(delta, scores.shape))).astype(dtype)
            sums = pl.run_state(lambda sums: plgpu.wgmma(sums, grads, k_smem))(plgpu.ACC.init(sums))
            plgpu.barrier_arrive(k_done)
            return sums, start, total, delta

        blocks.over_keys(step, compute, keys, stages, k_ref, v_ref)

    return blocks.kernel(
        attention_queries,
        jax.ShapeDtypeStruct(q_BTHQ.shape, dtype),
        (heads, length // blocks.BLOCK, num_rows),
        (
            blocks.smem((blocks.NUM_WARPGROUPS, blocks.ROWS, q_BTHQ.shape[3]), dtype),
            blocks.smem((blocks.NUM_WARPGROUPS, blocks.ROWS, v_BSGV.shape[3]), dtype),
            plgpu.Barrier(num_barriers=blocks.NUM_WARPGROUPS, num_arrivals=2),
        ),
    )(seen.start_BT, seen.first_1, q_BTHQ, k_BSGQ, v_BSGV, grad_BTHV, total_BHT, delta_BHT)


def gradient_of_keys(seen, q_BTHQ, k_BSGQ, v_BSGV, grad_BTHV, total_BHT, delta_BHT, scale, tiles):
    """Returns the gradients of keys and values, per block of keys and summed over the query heads of a group."""
    num_rows, num_keys, groups, _ = k_BSGQ.shape
    heads_per_group = q_BTHQ.shape[2] // groups
    num_queries, dtype, (block, stages) = q_BTHQ.shape[1], q_BTHQ.dtype, tiles

    def attention_keys(
        end_ref,
        first_ref,
        q_ref,
        k_ref,
        v_ref,
        grad_ref,
        total_ref,
        delta_ref,
        dk_ref,
        dv_ref,
        k_smem2,
        v_smem2,
        loaded,
    ):
        place = blocks.Place(k_ref, k_ref, num_keys // blocks.BLOCK)
        k_smem, v_smem, keys = k_smem2.at[place.warpgroup], v_smem2.at[place.warpgroup], place.own
        queries = blocks.Seeing(end_ref, first_ref, place, block, num_queries)

        def compute(run):
            own = (place.row, keys, place.head)
            plgpu.copy_gmem_to_smem(k_ref.at[own], k_smem, loaded.at[place.warpgroup])
            plgpu.copy_gmem_to_smem(v_ref.at[own], v_smem, loaded.at[place.warpgroup])
            end = blocks.load(end_ref.at[place.row, keys], blocks.ROW)
            plgpu.barrier_wait(loaded.at[place.warpgroup])
            zeros = (plgpu.layout_cast(jnp.zeros(ref.shape, jnp.float32), blocks.TILE) for ref in (k_smem, v_smem))
            dk, dv, _ = run((*zeros, end))
            k_smem[...] = (dk * scale).astype(dtype)
            v_smem[...] = dv.astype(dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(k_smem, dk_ref.at[own], commit_group=False)
            plgpu.copy_smem_to_gmem(v_smem, dv_ref.at[own])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def step(index, q_smem, grad_smem, total_smem, delta_smem, q_done, grad_done, total_done, delta_done, carry):
            dk, dv, end = carry

            def product(scores):
                plgpu.wgmma(scores, k_smem, q_smem.T)
                return scores[...]

            scores = pl.run_scoped(product, plgpu.ACC((blocks.ROWS, block), jnp.float32)) * (scale * blocks.LOG2E)
            scores = queries.masked(scores, index[0], end)
            probs = jnp.exp2(scores - blocks.down(blocks.load(total_smem, blocks.COLUMN, True), scores.shape))
            plgpu.barrier_arrive(total_done)

            def products(refs):
                sums, grads = refs
                plgpu.wgmma(sums, probs.astype(dtype), grad_smem)
                plgpu.wgmma(grads, v_smem, grad_smem.T)

            zero = plgpu.layout_cast(jnp.zeros(scores.shape, jnp.float32), blocks.TILE)
            dv, grads = pl.run_state(products)((plgpu.ACC.init(dv), plgpu.ACC.init(zero)))
            plgpu.barrier_arrive(grad_done)
            grads = (probs * (grads - blocks.down(blocks.load(delta_smem, blocks.COLUMN, True), scores.shape))).astype(
                dtype
            )
            plgpu.barrier_arrive(delta_done)
            dk = pl.run_state(lambda sums: plgpu.wgmma(sums, grads, q_smem))(plgpu.ACC.init(dk))
            plgpu.barrier_arrive(q_done)
            return dk, dv, end

        def head(m):
            return place.head * heads_per_group + m

        def tile(ref):
            return blocks.spec((block, None, ref.shape[-1]), lambda i, m: (queries.low + i, head(m), 0))

        row = plgpu.BlockSpec((None, block), lambda i, m: (head(m), queries.low + i))
        blocks.pipeline(
            step,
            compute,
            (queries.high - queries.low, heads_per_group),
            stages,
            [tile(q_ref), tile(grad_ref), row, row],
        )(*(ref.at[place.row] for ref in (q_ref, grad_ref, total_ref, delta_ref)))

    return blocks.kernel(
        attention_keys,
        (jax.ShapeDtypeStruct(k_BSGQ.shape, dtype), jax.ShapeDtypeStruct(v_BSGV.shape, dtype)),
        (groups, num_keys // blocks.BLOCK, num_rows),
        (
            blocks.smem((blocks.NUM_WARPGROUPS, blocks.ROWS, k_BSGQ.shape[3]), dtype),
            blocks.smem((blocks.NUM_WARPGROUPS, blocks.ROWS, v_BSGV.shape[3]), dtype),
            plgpu.Barrier(num_barriers=blocks.NUM_WARPGROUPS, num_arrivals=2),
        ),
    )(seen.end_BS, seen.first_1, q_BTHQ, k_BSGQ, v_BSGV, grad_BTHV, total_BHT, delta_BHT)
