"""Grouped matmul for Hopper GPUs in Pallas: two warpgroups multiply while a third one loads.

A block of the result is computed by one block of threads, which starts the next one without waiting for its stores. Its
two compute warpgroups share the blocks of one operand and split those of the other. Groups are not aligned to blocks: a
block of rows with several groups is computed once per group, and only the rows of that group are stored.

Shape letters: N rows, D columns in, F columns out, E groups, S blocks of rows, each of one group.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

NUM_WARPGROUPS = 2  # compute warpgroups
PARAMS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)
SWIZZLE = 128  # bytes: 64 bfloat16 elements, 128 of 8 bits
PROMOTED_ROWS = 64  # rows of the result whose 8-bit products of one step are in registers beside their sums


class Tiles(NamedTuple):
    """Tile sizes and order.

    block_m, block_n: rows and columns of the result per warpgroup. block_k: size of a pipeline step in the contracted
    dim. stages: blocks of the operands in flight. turns: number of block columns traversed together, so that operands
    are reused from the cache (`plgpu.planar_snake`).
    """

    block_m: int = 128
    block_n: int = 128
    block_k: int = 64
    stages: int = 3
    turns: int = 4


class Blocks(NamedTuple):
    """Blocks of rows, int32[S].

    group: group of each block. row: its first row. begin: offset of the group's first row in the block. size: number of
    rows of the group in the block; 0 in unused blocks, since S is an upper bound for any group sizes.
    """

    group: jax.Array
    row: jax.Array
    begin: jax.Array
    size: jax.Array


def blocks_of_rows(sizes_E: jax.Array, num_rows: int, block_m: int) -> Blocks:
    """Returns aligned blocks of block_m rows; a block shared by several groups is listed once per group."""
    num_groups = sizes_E.shape[0]
    ends_E = _running_sum(sizes_E)
    begins_E = ends_E - sizes_E
    first_E = begins_E // block_m
    count_E = jnp.where(sizes_E > 0, (ends_E - 1) // block_m - first_E + 1, 0)
    total_E = _running_sum(count_E)
    index_S = jnp.arange(pl.cdiv(num_rows, block_m) + num_groups - 1)
    group_S = jnp.minimum((index_S[:, None] >= total_E).sum(axis=1), num_groups - 1)
    row_S = (first_E - (total_E - count_E))[group_S] + index_S
    row_S = jnp.where(index_S < total_E[-1], row_S, 0) * block_m
    begin_S = jnp.maximum(begins_E[group_S] - row_S, 0)
    end_S = jnp.minimum(ends_E[group_S] - row_S, block_m)
    size_S = jnp.where(index_S < total_E[-1], end_S - begin_S, 0)
    begin_S = jnp.where(size_S > 0, begin_S, 0)
    return Blocks(*(x.astype(jnp.int32) for x in (group_S, row_S, begin_S, size_S)))


def product(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, tiles: Tiles, is_transposed: bool) -> jax.Array:
    """Returns x[n] @ w[e] for the rows of each group, [N, F]; if is_transposed, x[n] @ w[e]^T with x [N, F]: [N, D].

    Every row is in a group. block_k divides the columns of x. The two warpgroups compute adjacent columns of the same
    rows. 8-bit operands must be transposed, since Hopper's instructions read both with the contracted dim last; their
    product is bfloat16.
    """
    assert is_transposed or x_ND.dtype.itemsize > 1, x_ND.dtype
    dtype = _result_dtype(x_ND.dtype)
    num_rows, num_summed = x_ND.shape
    num_columns = w_EDF.shape[1 if is_transposed else 2]
    width = NUM_WARPGROUPS * tiles.block_n
    blocks = blocks_of_rows(sizes_E, num_rows, tiles.block_m)
    grid = blocks.size.shape[0], pl.cdiv(num_columns, width)
    w_block, w_place = (tiles.block_k, width), lambda k: (k, 0)
    if is_transposed:
        w_block, w_place = w_block[::-1], lambda k: (0, k)
    specs = [_spec((tiles.block_m, tiles.block_k), lambda k: (0, k), x_ND.dtype), _spec(w_block, w_place, w_EDF.dtype)]

    def body(group_ref, row_ref, begin_ref, size_ref, x_ref, w_ref, out_ref):
        pipeline = functools.partial(_pipeline, specs, tiles, num_summed // tiles.block_k)

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(_nothing, _nothing).get_allocations(x_ref, w_ref.at[0]),
            out_smem=plgpu.SMEM((NUM_WARPGROUPS, tiles.block_m, tiles.block_n), dtype),
            collective_axes="warpgroup",
        )
        def run(buffers, out_smem):
            mine = lax.axis_index("warpgroup")

            @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="processor")
            def each_block(loop):
                block, column = plgpu.planar_snake(loop.index[0], grid, 1, tiles.turns)
                row, begin, size = pl.multiple_of(row_ref[block], tiles.block_m), begin_ref[block], size_ref[block]

                def multiply(_, x_smem, w_smem, total):
                    own = pl.ds(mine * tiles.block_n, tiles.block_n)
                    w_own = w_smem.at[own].transpose((1, 0)) if is_transposed else w_smem.at[:, own]
                    return _add_product(total, x_smem, w_own)

                def store(total):
                    _stage(out_smem, mine, total)
                    at, num = begin, tiles.block_m
                    # The number of rows of a copy is static: one copy per power of two in the binary expansion of size.
                    while num:

                        @pl.when(size & num != 0)
                        def _(at=at, num=num):
                            first = pl.ds(row + at, num), pl.ds(column * width + mine * tiles.block_n, tiles.block_n)
                            plgpu.copy_smem_to_gmem(out_smem.at[mine, pl.ds(at, num)], out_ref.at[first])

                        at, num = at + (size & num), num // 2

                @pl.when(size > 0)
                def _():
                    columns, w = pl.ds(column * width, width), w_ref.at[group_ref[block]]
                    pipeline(multiply, _accumulated(tiles, store, x_ND.dtype))(
                        x_ref.at[pl.ds(row, tiles.block_m), :],
                        w.at[columns, :] if is_transposed else w.at[:, columns],
                        allocations=buffers,
                    )

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return _kernel(body, (num_rows, num_columns), dtype)(*blocks, x_ND, w_EDF)


def matrices(x_ND: jax.Array, y_NF: jax.Array, sizes_E: jax.Array, tiles: Tiles) -> jax.Array:
    """Returns x^T y of each group, [E, D, F]. Every row is in a group; block_n divides F.

    The two warpgroups compute the two halves, of block_m rows each, of a block of D, for the same columns.
    """
    (num_rows, dim), dtype = x_ND.shape, x_ND.dtype
    num_groups, num_columns = sizes_E.shape[0], y_NF.shape[1]
    height = NUM_WARPGROUPS * tiles.block_m
    ends_E = _running_sum(sizes_E)
    first_E = (ends_E - sizes_E) // tiles.block_k * tiles.block_k
    count_E = jnp.where(sizes_E > 0, pl.cdiv(ends_E - first_E, tiles.block_k), 0)
    where = [x.astype(jnp.int32) for x in (first_E, ends_E - sizes_E - first_E, ends_E - first_E, count_E)]
    grid = pl.cdiv(dim, height), pl.cdiv(num_columns, tiles.block_n)
    specs = [_spec((tiles.block_k, n), lambda k: (k, 0), x_ND.dtype) for n in (height, tiles.block_n)]

    def body(first_ref, begin_ref, end_ref, count_ref, x_ref, y_ref, out_ref):
        pipeline = functools.partial(_pipeline, specs, tiles)

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(num_rows // tiles.block_k, _nothing, _nothing).get_allocations(x_ref, y_ref),
            out_smem=plgpu.SMEM((NUM_WARPGROUPS, tiles.block_m, tiles.block_n), dtype, transforms=_transforms(dtype)),
            collective_axes="warpgroup",
        )
        def run(buffers, out_smem):
            mine = lax.axis_index("warpgroup")

            @plgpu.nd_loop((num_groups, grid[0] * grid[1]), collective_axes="processor")
            def each_block(loop):
                group = loop.index[0]
                block, column = plgpu.planar_snake(loop.index[1], grid, 1, tiles.turns)
                begin, end, count = begin_ref[group], end_ref[group], count_ref[group]
                own_rows = pl.ds(block * height + mine * tiles.block_m, tiles.block_m)
                columns = pl.ds(column * tiles.block_n, tiles.block_n)

                def multiply(step, x_smem, y_smem, total):
                    x_own = x_smem.at[:, pl.ds(mine * tiles.block_m, tiles.block_m)]

                    @pl.when((step[0] == 0) | (step[0] == count - 1))
                    def _():  # the first and the last block may contain rows of other groups
                        shape = tiles.block_k, tiles.block_m
                        at = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 0), plgpu.Layout.WGMMA)
                        at = at + step[0] * tiles.block_k
                        x_own[...] = x_own[...] * ((at >= begin) & (at < end)).astype(x_ND.dtype)
                        plgpu.commit_smem()

                    return _add_product(total, x_own.transpose((1, 0)), y_smem)

                def store(total):
                    _stage(out_smem, mine, total)
                    plgpu.copy_smem_to_gmem(out_smem.at[mine], out_ref.at[group, own_rows, columns])

                @pl.when(count > 0)
                def _():
                    # Only `count` blocks of these rows are read.
                    rows = pl.ds(pl.multiple_of(first_ref[group], tiles.block_k), num_rows)
                    pipeline(count, multiply, _accumulated(tiles, store, x_ND.dtype))(
                        x_ref.at[rows, pl.ds(block * height, height)], y_ref.at[rows, columns], allocations=buffers
                    )

                @pl.when((count == 0) & (mine < NUM_WARPGROUPS))
                def _():
                    zero = jnp.zeros((tiles.block_m, tiles.block_n), x_ND.dtype)
                    store([plgpu.layout_cast(zero, plgpu.Layout.WGMMA)])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return _kernel(body, (num_groups, dim, num_columns), x_ND.dtype)(*where, x_ND, y_NF)


def matrices_8bit(x_DN: jax.Array, y_FN: jax.Array, sizes_E: jax.Array, tiles: Tiles) -> jax.Array:
    """Returns x y^T over the columns of each group of 8-bit operands, bfloat16 [E, D, F].

    Every column is in a group. The two warpgroups compute the two halves, of block_m rows each, of a block of D, for
    the same block of F. Operands have their rows, which are contracted, last in memory; see `product`.
    """
    (dim, num_rows), num_columns, num_groups = x_DN.shape, y_FN.shape[0], sizes_E.shape[0]
    dtype, height = _result_dtype(x_DN.dtype), NUM_WARPGROUPS * tiles.block_m
    ends_E = _running_sum(sizes_E)
    first_E = (ends_E - sizes_E) // tiles.block_k * tiles.block_k
    count_E = jnp.where(sizes_E > 0, pl.cdiv(ends_E - first_E, tiles.block_k), 0)
    where = [x.astype(jnp.int32) for x in (first_E, ends_E - sizes_E - first_E, ends_E - first_E, count_E)]
    grid = pl.cdiv(dim, height), pl.cdiv(num_columns, tiles.block_n)
    specs = [_spec((n, tiles.block_k), lambda k: (0, k), x_DN.dtype) for n in (height, tiles.block_n)]

    def body(first_ref, begin_ref, end_ref, count_ref, x_ref, y_ref, out_ref):
        pipeline = functools.partial(_pipeline, specs, tiles)

        @functools.partial(
            pl.run_scoped,
            buffers=pipeline(num_rows // tiles.block_k, _nothing, _nothing).get_allocations(x_ref, y_ref),
            out_smem=plgpu.SMEM((NUM_WARPGROUPS, tiles.block_m, tiles.block_n), dtype, transforms=_transforms(dtype)),
            collective_axes="warpgroup",
        )
        def run(buffers, out_smem):
            mine = lax.axis_index("warpgroup")

            @plgpu.nd_loop((num_groups, grid[0] * grid[1]), collective_axes="processor")
            def each_block(loop):
                group = loop.index[0]
                block, column = plgpu.planar_snake(loop.index[1], grid, 1, tiles.turns)
                begin, end, count = begin_ref[group], end_ref[group], count_ref[group]
                own_rows = pl.ds(block * height + mine * tiles.block_m, tiles.block_m)
                columns = pl.ds(column * tiles.block_n, tiles.block_n)

                def multiply(step, x_smem, y_smem, total):
                    x_own = x_smem.at[pl.ds(mine * tiles.block_m, tiles.block_m)]

                    @pl.when((step[0] == 0) | (step[0] == count - 1))
                    def _():  # the first and the last block may contain rows of other groups
                        shape = tiles.block_m, tiles.block_k
                        at = plgpu.layout_cast(lax.broadcasted_iota(jnp.int32, shape, 1), plgpu.Layout.WGMMA_8BIT)
                        at = at + step[0] * tiles.block_k
                        kept = jnp.where((at >= begin) & (at < end), -1, 0).astype(jnp.int8)
                        bits = lax.bitcast_convert_type(x_own[...], jnp.int8) & kept
                        x_own[...] = lax.bitcast_convert_type(bits, x_DN.dtype)
                        plgpu.commit_smem()

                    return _add_product(total, x_own, y_smem.transpose((1, 0)))

                def store(total):
                    _stage(out_smem, mine, total)
                    plgpu.copy_smem_to_gmem(out_smem.at[mine], out_ref.at[group, own_rows, columns])

                @pl.when(count > 0)
                def _():
                    # Only `count` blocks of these rows are read.
                    rows = pl.ds(pl.multiple_of(first_ref[group], tiles.block_k), num_rows)
                    pipeline(count, multiply, _accumulated(tiles, store, x_DN.dtype))(
                        x_ref.at[pl.ds(block * height, height), rows], y_ref.at[columns, rows], allocations=buffers
                    )

                @pl.when((count == 0) & (mine < NUM_WARPGROUPS))
                def _():
                    zero = jnp.zeros((tiles.block_m, tiles.block_n), dtype)
                    store([plgpu.layout_cast(zero, plgpu.Layout.WGMMA)])

        plgpu.wait_smem_to_gmem(0, wait_read_only=True)

    return _kernel(body, (num_groups, dim, num_columns), dtype)(*where, x_DN, y_FN)


def _running_sum(x_E: jax.Array) -> jax.Array:
    """Returns jnp.cumsum of a few numbers, computed in a single GPU kernel instead of several dependent ones."""
    return jnp.where(jnp.tri(x_E.shape[0], dtype=bool), x_E, 0).sum(axis=1)


def _nothing(*_: Any, **__: Any) -> None:
    """Body of a pipeline of which only the buffers are allocated."""


def _result_dtype(dtype: Any) -> jnp.dtype:
    """Returns the dtype of a product of operands of the given dtype."""
    return jnp.dtype(jnp.bfloat16 if dtype.itemsize == 1 else dtype)


def _transforms(dtype: Any) -> tuple[Any, ...]:
    """Returns the layout in shared memory that tensor cores read."""
    return plgpu.TilingTransform((8, SWIZZLE // dtype.itemsize)), plgpu.SwizzleTransform(SWIZZLE)


def _spec(block: tuple[int, int], place: Callable[..., Any], dtype: Any) -> plgpu.BlockSpec:
    # A block is released when its product is done (delay_release=0): the end of a pipeline does not wait for a delayed
    # release, so the next pipeline would overwrite operands in use.
    return plgpu.BlockSpec(block, place, transforms=_transforms(dtype), memory_space=plgpu.SMEM)


def _pipeline(specs: list[Any], tiles: Tiles, num_steps: Any, multiply: Any, context: Any) -> Any:
    """Returns a pipeline over the contracted dim: the last warpgroup loads both operands, the others multiply."""
    return plgpu.emit_pipeline_warp_specialized(
        multiply,
        grid=(num_steps,),
        memory_registers=40,
        in_specs=specs,
        wg_axis="warpgroup",
        num_compute_wgs=NUM_WARPGROUPS,
        max_concurrent_steps=tiles.stages,
        compute_context=context,
    )


def _accumulated(tiles: Tiles, store: Callable[[Any], None], dtype: Any) -> Callable[..., None]:
    """Returns the context of a compute warpgroup: accumulates in float32 registers over the pipeline, then stores.

    The sum of 8-bit products is a list of arrays; see `_add_product`.
    """
    if dtype.itemsize == 1:

        def promoted(run_pipeline):
            shape, number = (PROMOTED_ROWS, tiles.block_n), tiles.block_m // PROMOTED_ROWS
            zero = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), plgpu.Layout.WGMMA)
            store(run_pipeline([zero] * number))

        return promoted

    def context(run_pipeline):
        @functools.partial(pl.run_scoped, total=plgpu.ACC((tiles.block_m, tiles.block_n), jnp.float32))
        def _(total):
            run_pipeline(total)
            store([total[...]])

    return context


def _add_product(total: Any, a_smem: Any, b_smem: Any) -> Any:
    """Returns total + a @ b, waiting for the product.

    Tensor cores of Hopper keep about 14 bits of a sum of 8-bit products (2412.19437, section 3.3.2). The products of
    each step are therefore added to `total`, one array per PROMOTED_ROWS rows, by the other cores in float32.
    """
    if not isinstance(total, list):
        plgpu.wgmma(total, a_smem, b_smem)
        plgpu.wgmma_wait(0)
        return total

    def product(a_smem):
        def run(accumulator):
            plgpu.wgmma(accumulator, a_smem, b_smem)
            return accumulator[...]

        return pl.run_scoped(run, plgpu.ACC((PROMOTED_ROWS, b_smem.shape[1]), jnp.float32))

    return [part + product(a_smem.at[pl.ds(i * PROMOTED_ROWS, PROMOTED_ROWS)]) for i, part in enumerate(total)]


def _stage(out_smem: Any, mine: jax.Array, parts: list[jax.Array]) -> None:
    """Writes a block of the result to shared memory, after the previous block has been copied from there."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    rows = parts[0].shape[0]
    for i, part in enumerate(parts):
        out_smem[mine, pl.ds(i * rows, rows)] = part.astype(out_smem.dtype)
    plgpu.commit_smem()


def _kernel(body: Callable[..., None], shape: tuple[int, ...], dtype: Any) -> Callable[..., jax.Array]:
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(shape, dtype),
        grid=(jax.devices()[0].core_count,),
        grid_names=("processor",),
        num_threads=NUM_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=PARAMS,
    )
