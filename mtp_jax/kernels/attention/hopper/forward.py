"""Forward pass: online softmax over blocks of keys; the two warpgroups alternate on the tensor cores.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mtp_jax.kernels.attention.hopper import blocks


def forward(
    q_BTHQ: jax.Array, k_BSGQ: jax.Array, v_BSGV: jax.Array, seen: blocks.Ranges, scale: float, tiles: blocks.Tiles
) -> tuple[jax.Array, jax.Array]:
    """Returns the output [B, T, H, V] and log2 of the denominator of the softmax, float32[B, H, T]."""
    num_rows, length, heads, query_dim = q_BTHQ.shape
    value_dim, dtype, (block, stages) = v_BSGV.shape[3], q_BTHQ.dtype, tiles.forward

    def attention_forward(
        start_ref, first_ref, q_ref, k_ref, v_ref, out_ref, total_ref, shared, total_smem2, loaded, turn
    ):
        place = blocks.Place(q_ref, k_ref, length // blocks.BLOCK, is_reversed=True)
        q_smem, out_smem = (ref.at[place.warpgroup] for ref in shared)
        total_smem, queries = total_smem2.at[place.warpgroup], place.own
        keys = blocks.Seen(start_ref, first_ref, place, block)

        def take_turns():
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def compute(run):
            plgpu.copy_gmem_to_smem(q_ref.at[place.row, queries, place.head], q_smem, loaded.at[place.warpgroup])
            start = blocks.load(start_ref.at[place.row, queries], blocks.ROW)
            plgpu.barrier_wait(loaded.at[place.warpgroup])
            pl.when(place.warpgroup == 1)(take_turns)
            total, greatest, out = run(
                (
                    plgpu.layout_cast(jnp.zeros((blocks.ROWS,), jnp.float32), blocks.ROW),
                    plgpu.layout_cast(jnp.full((blocks.ROWS,), blocks.MASKED, jnp.float32), blocks.ROW),
                    plgpu.layout_cast(jnp.zeros((blocks.ROWS, value_dim), jnp.float32), blocks.TILE),
                    start,
                )
            )[:3]
            pl.when(place.warpgroup == 0)(take_turns)
            out *= blocks.across(1.0 / total, out.shape)
            columns = [pl.ds(begin, blocks.COLUMNS) for begin in range(0, value_dim, blocks.COLUMNS)]
            for i, own in enumerate(columns):
                out_smem[i] = out[:, own.start : own.start + blocks.COLUMNS].astype(dtype)
            total_smem[...] = greatest + jnp.log(total) * blocks.LOG2E
            plgpu.commit_smem()
            for i, own in enumerate(columns):
                plgpu.copy_smem_to_gmem(out_smem.at[i], out_ref.at[place.row, queries, place.head, own])
            plgpu.copy_smem_to_gmem(total_smem, total_ref.at[place.row, place.head, queries])
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        def step(index, k_smem, v_smem, k_done, v_done, carry):
            total, greatest, out, start = carry

            def product(scores):
                plgpu.wgmma(scores, q_smem, k_smem.T)
                take_turns()
                return scores[...]

            scores = pl.run_scoped(product, plgpu.ACC((blocks.ROWS, block), jnp.float32)) * (scale * blocks.LOG2E)
            plgpu.barrier_arrive(k_done)
            scores = keys.masked(scores, index[0], start)
            new = jnp.maximum(greatest, scores.max(axis=1))
            shrink = jnp.exp2(greatest - new)
            probs = jnp.exp2(scores - blocks.across(new, scores.shape))
            out *= blocks.across(shrink, out.shape)
            probs_16 = probs.astype(dtype)
            take_turns()
            total = total * shrink + probs.sum(axis=1)
            out = pl.run_state(lambda sums: plgpu.wgmma(sums, probs_16, v_smem))(plgpu.ACC.init(out))
            plgpu.barrier_arrive(v_done)
            return total, new, out, start

        blocks.over_keys(step, compute, keys, stages, k_ref, v_ref)

    return blocks.kernel(
        attention_forward,
        (
            jax.ShapeDtypeStruct((num_rows, length, heads, value_dim), dtype),
            jax.ShapeDtypeStruct((num_rows, heads, length), jnp.float32),
        ),
        (heads, length // blocks.BLOCK, num_rows),
        (
            # The output reuses the memory of the queries; equal bytes per warpgroup, so neither overwrites the other's.
            plgpu.RefUnion(
                blocks.smem((blocks.NUM_WARPGROUPS, blocks.ROWS, query_dim), dtype),
                blocks.smem((blocks.NUM_WARPGROUPS, query_dim // blocks.COLUMNS, blocks.ROWS, blocks.COLUMNS), dtype),
            ),
            plgpu.SMEM((blocks.NUM_WARPGROUPS, blocks.ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=blocks.NUM_WARPGROUPS),
            plgpu.Barrier(num_arrivals=blocks.NUM_WARPGROUPS),
        ),
    )(seen.start_BT, seen.first_1, q_BTHQ, k_BSGQ, v_BSGV)
