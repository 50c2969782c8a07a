"""Shared parts of the three attention kernels: block assignment, ranges, masks, tiles and the pipeline.

Shape letters: B rows, T queries, S keys.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from mtp_jax.kernels.attention.mask import Mask

NUM_WARPGROUPS = 2  # compute warpgroups
ROWS = 64  # rows of a block per warpgroup, as many as one wgmma takes
BLOCK = NUM_WARPGROUPS * ROWS  # sequence lengths are multiples of it
SWIZZLE = 128  # bytes: 64 bfloat16 elements
COLUMNS = SWIZZLE // 2
TRANSFORMS = (plgpu.TilingTransform((8, COLUMNS)), plgpu.SwizzleTransform(SWIZZLE))
PARAMS = plgpu.CompilerParams(approx_math=True)
LOG2E = math.log2(math.e)
MASKED = -1e30  # masked score; finite, so that the sum of a row without keys so far is finite and scaled to 0 later
AXES = ("heads", "blocks", "rows")
TILE, ROW, COLUMN = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


class Tiles(NamedTuple):
    """Tile sizes of each kernel: keys or queries per pipeline step, and number of such blocks in flight."""

    forward: tuple[int, int] = (128, 2)
    queries: tuple[int, int] = (64, 2)
    keys: tuple[int, int] = (64, 2)


class Ranges(NamedTuple):
    """Ranges of visible keys and of seeing queries, int32.

    start_BT: first key that each query sees. end_BS: one past the last query, of the whole row, that sees each key.
    Both are non-decreasing along a row. first_1: position of the first query; keys begin at position 0.
    """

    start_BT: jax.Array
    end_BS: jax.Array
    first_1: jax.Array


def ranges(mask: Mask, num_rows: int, num_keys: int, num_queries: int) -> Ranges:
    """Returns the ranges of a mask whose documents are runs of equal ids."""
    index_S = jnp.arange(num_keys, dtype=jnp.int32)
    if mask.segments_BS is None:
        start_BS, end_BS = (jnp.full((num_rows, num_keys), x, jnp.int32) for x in (0, num_keys))
    else:
        changes_BS = mask.segments_BS[:, 1:] != mask.segments_BS[:, :-1]
        begins_BS = jnp.pad(changes_BS, ((0, 0), (1, 0)), constant_values=True)
        start_BS = lax.cummax(jnp.where(begins_BS, index_S, 0), axis=1)
        next_BS = jnp.where(jnp.roll(begins_BS, -1, axis=1), index_S + 1, num_keys)
        end_BS = lax.cummin(next_BS, axis=1, reverse=True)
    if mask.window:
        start_BS = jnp.maximum(start_BS, index_S - mask.window + 1)
        end_BS = jnp.minimum(end_BS, index_S + mask.window)
    start_BT = lax.dynamic_slice_in_dim(start_BS, mask.first, num_queries, axis=1)
    return Ranges(start_BT, end_BS, jnp.asarray(mask.first, jnp.int32).reshape(1))


class Place:
    """Part of the result that this warpgroup computes: positions `own` of a row, from `begin` on."""

    def __init__(self, of_ref: Any, key_ref: Any, num_blocks: int, is_reversed: bool = False):
        self.row, self.head, self.warpgroup = (lax.axis_index(name) for name in ("rows", "heads", "warpgroup"))
        block = lax.axis_index("blocks")
        self.block = num_blocks - 1 - block if is_reversed else block  # the longest ranges first
        self.begin = self.block * BLOCK + self.warpgroup * ROWS
        self.own = pl.ds(self.begin, ROWS)
        self.key_head = lax.div(self.head, jnp.int32(of_ref.shape[2] // key_ref.shape[2]))


class Seen:
    """Range of keys that this warpgroup's queries see, in blocks of `block` keys: low <= block index < high."""

    def __init__(self, start_ref: Any, first_ref: Any, place: Place, block: int):
        first = first_ref[0]
        self.place, self.block, self.query = place, block, first + place.begin
        self.latest = start_ref[place.row, place.begin + ROWS - 1]  # start of the last query
        self.low = lax.div(start_ref[place.row, place.block * BLOCK], jnp.int32(block))
        self.high = pl.cdiv(first + (place.block + 1) * BLOCK, jnp.int32(block))

    def masked(self, scores: jax.Array, index: jax.Array, start: jax.Array) -> jax.Array:
        """Returns scores with block `index` of these keys, masked for keys after a query or before its start."""
        key = (self.low + index) * self.block

        def masked():
            query_at = self.query + plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=TILE)
            key_at = key + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
            return jnp.where((key_at <= query_at) & (key_at >= across(start, scores.shape)), scores, MASKED)

        return lax.cond((key + self.block > self.query) | (key < self.latest), masked, lambda: scores)


class Seeing:
    """Range of queries that see this warpgroup's keys, in blocks of `block` queries: low <= block index < high.

    A block of keys that no local query sees still has one block of queries, which is fully masked.
    """

    def __init__(self, end_ref: Any, first_ref: Any, place: Place, block: int, num_queries: int):
        self.block, self.key, self.first = block, place.begin, first_ref[0]
        self.earliest = end_ref[place.row, place.begin]  # end of the first key
        last = end_ref[place.row, place.block * BLOCK + BLOCK - 1]
        before = lax.div(jnp.maximum(place.block * BLOCK - self.first, 0), jnp.int32(block))
        self.low = jnp.clip(before, 0, num_queries // block - 1)
        self.high = jnp.clip(pl.cdiv(last - self.first, jnp.int32(block)), self.low + 1, num_queries // block)

    def masked(self, scores: jax.Array, index: jax.Array, end: jax.Array) -> jax.Array:
        """Returns scores with block `index` of these queries, masked for queries before a key or from its end on."""
        query = self.first + (self.low + index) * self.block

        def masked():
            key_at = self.key + plgpu.broadcasted_iota(jnp.int32, scores.shape, 0, layout=TILE)
            query_at = query + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=TILE)
            return jnp.where((key_at <= query_at) & (query_at < across(end, scores.shape)), scores, MASKED)

        return lax.cond((self.key + ROWS > query) | (query + self.block > self.earliest), masked, lambda: scores)


def across(x_M: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one number per row of a tile over its columns."""
    return lax.broadcast_in_dim(x_M, shape, [0])


def down(x_N: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Broadcasts one number per column of a tile over its rows."""
    return lax.broadcast_in_dim(x_N, shape, [1])


def load(ref: Any, layout: Any, is_shared: bool = False) -> jax.Array:
    """Loads a vector into registers in the given layout; is_shared: from shared memory."""
    index = ((),) if jax.__version_info__ < (0, 11) else ()  # jax 0.10 requires an index, later versions take none
    return plgpu.load(ref, *index, layout=layout, optimized=is_shared)


def smem(shape: tuple[int, ...], dtype: Any) -> Any:
    return plgpu.SMEM(shape, dtype, transforms=TRANSFORMS)


def spec(block: tuple[int | None, ...], place: Callable[..., Any]) -> plgpu.BlockSpec:
    return plgpu.BlockSpec(block, place, transforms=TRANSFORMS)


def pipeline(step: Any, compute: Any, grid: tuple[Any, ...], stages: int, specs: list[Any]) -> Any:
    """Returns a pipeline: the last warpgroup loads blocks, the others run `compute`, and in it `step` per block."""
    return plgpu.emit_pipeline_warp_specialized(
        step,
        grid=grid,
        max_concurrent_steps=stages,
        num_compute_wgs=NUM_WARPGROUPS,
        memory_registers=40,
        wg_axis="warpgroup",
        manual_consumed_barriers=True,
        compute_context=compute,
        in_specs=specs,
    )


def over_keys(step: Any, compute: Any, keys: Seen, stages: int, k_ref: Any, v_ref: Any) -> None:
    """Runs `pipeline` over the blocks of keys and values that a block of queries sees."""
    specs = [spec((keys.block, ref.shape[-1]), lambda i: (keys.low + i, 0)) for ref in (k_ref, v_ref)]
    run = pipeline(step, compute, (keys.high - keys.low,), stages, specs)
    run(*(ref.at[keys.place.row, :, keys.place.key_head] for ref in (k_ref, v_ref)))


def kernel(body: Callable[..., None], out: Any, grid: tuple[int, ...], scratch: tuple[Any, ...]) -> Any:
    return plgpu.kernel(
        body,
        out_type=out,
        scratch_types=scratch,
        grid=grid,
        grid_names=AXES,
        num_threads=NUM_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=PARAMS,
    )
