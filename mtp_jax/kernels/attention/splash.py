"""Causal attention within documents on TPUs by jax's splash attention; no scores in HBM, forward or backward.

Blocks of scores above the diagonal are not computed. In the other blocks a mask for causality and document boundaries
is computed from positions and segment ids inside the kernel. If a row is sharded over the context axis, each device
takes its own rows of the block table.

Shape letters: as in `kernels.attention`.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.attention.mask import Mask

LANES = 128  # of the vector unit; block sizes are multiples
# Queries and keys per block in all three kernels (forward, dq, dk and dv): MaxText's defaults (configs/types.py,
# sa_block_* and sa_use_fused_bwd_kernel). Larger blocks read keys and values less often but compute more masked scores;
# 2048, as in some recipes for v5p, needs more vector memory than a program gets by default.
BLOCK = 512
MOST_DIM = 256  # head dim; compiles in blocks of 512 in both dtypes for v5e, v5p and v6e; 576 in float32 does not


def _splash() -> Any:
    """Returns jax's splash attention, unchanged from jax 0.10 to 0.12; imported on use, since only TPUs need it."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    return splash_attention


def attend(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H, scale, interpret: bool = False) -> jax.Array:
    """See `kernels.attention.attend`; the queries are one of S / T equal parts of their rows.

    Head dims are not padded, also if they differ (192 and 128).

    Args:
      interpret: run the kernels in interpret mode, on any device.
    """
    length = q_BTHQ.shape[1]
    # The kernels have no scale argument: queries are scaled in float32 and rounded again.
    scaled_BTHQ = (q_BTHQ.astype(jnp.float32) * scale).astype(q_BTHQ.dtype)
    heads_first = (jnp.swapaxes(x, 1, 2) for x in (scaled_BTHQ, k_BSGQ, v_BSGV))
    segments = None
    if mask.segments_BS is not None:
        segments_BT = jax.lax.dynamic_slice_in_dim(mask.segments_BS, mask.first, length, axis=1)
        segments = _splash().SegmentIds(segments_BT, mask.segments_BS)
    kernel = _kernel(q_BTHQ.shape[2:], length, k_BSGQ.shape[1], mask, interpret)
    sinks_H = None if sinks_H is None else sinks_H.astype(jnp.float32)
    return jnp.swapaxes(_run(kernel, *heads_first, segments, sinks_H), 1, 2)


def _rows(kernel: Any, q_BHTQ, k_BGSQ, v_BGSV, segments, sinks_H) -> jax.Array:
    """Applies the kernel to each row."""
    return jax.vmap(lambda *row: kernel(*row, sinks=sinks_H))(q_BHTQ, k_BGSQ, v_BGSV, segments)


@jax.custom_vjp
def _run(
    kernel: Any,
    q_BHTQ: jax.Array,
    k_BGSQ: jax.Array,
    v_BGSV: jax.Array,
    segments: Any,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Applies the kernel to each row, [B, H, T, V], with the kernel's own gradient.

    The kernel writes 128 copies of each query's normalizer. The compiler would slice one out where it is read, in the
    backward pass, and keep all 128 until then; the barrier in the forward pass moves the slice before the output.
    """
    return _rows(kernel, q_BHTQ, k_BGSQ, v_BGSV, segments, sinks_H)


def _run_forward(kernel, q_BHTQ, k_BGSQ, v_BGSV, segments, sinks_H):
    out_and_back = jax.vjp(
        lambda q, k, v, sinks: _rows(kernel, q, k, v, segments, sinks), q_BHTQ, k_BGSQ, v_BGSV, sinks_H
    )
    return jax.lax.optimization_barrier(out_and_back)


def _run_backward(back, grad_BHTV):
    dq_BHTQ, dk_BGSQ, dv_BGSV, dsinks_H = back(grad_BHTV)
    return None, dq_BHTQ, dk_BGSQ, dv_BGSV, None, dsinks_H


_run.defvjp(_run_forward, _run_backward)


def _kernel(heads: tuple[int, ...], length: int, num_keys: int, mask: Mask, interpret: bool) -> Any:
    """Returns a differentiable function of one row: (q [H, T, Q], k [G, S, Q], v [G, S, V], segments) -> [H, T, V].

    Args:
      heads: H and Q.
      length: T.
      num_keys: S.
    """
    splash, num_parts, (num_heads, dim) = _splash(), num_keys // length, heads
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    # With the head dim last, 192 dims are padded to 256 in memory, also while saved for the backward pass; with
    # positions last there is no padding.
    layout = splash.QKVLayout.SEQ_MINOR if dim % LANES else splash.QKVLayout.HEAD_DIM_MINOR
    shape = (num_keys, num_keys)
    one = splash.LocalMask(shape, (mask.window - 1, 0), 0) if mask.window else splash.CausalMask(shape)
    whole = splash.make_splash_mha(
        splash.MultiHeadMask([one] * num_heads),
        block_sizes=splash.BlockSizes(
            **{f"block_{name}": block_of(length) for name in names}, q_layout=layout, k_layout=layout
        ),
        head_shards=1,
        q_seq_shards=num_parts,
        residual_checkpoint_name=KERNEL,
        interpret=interpret,
    )
    if num_parts == 1:
        return whole

    def of_part(x):  # tables [heads, blocks of queries, blocks of keys], and positions of the queries
        dim = {3: 1, 1: 0}[x.ndim]
        size = x.shape[dim] // num_parts
        return jax.lax.dynamic_slice_in_dim(x, mask.first // length * size, size, axis=dim)

    return jax.tree.map(of_part, whole)


def unsupported_reason(q_BTHQ, k_BSGQ, v_BSGV, *_: Any) -> str:
    """Returns why splash attention does not support the operands; empty if it does."""
    dtypes, dims = {x.dtype for x in (q_BTHQ, k_BSGQ, v_BSGV)}, (q_BTHQ.shape[-1], v_BSGV.shape[-1])
    if len(dtypes) > 1 or not dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float32)}:
        return f"it computes in bfloat16 or float32, and this is {', '.join(sorted(map(str, dtypes)))}"
    if q_BTHQ.shape[1] % LANES:
        return f"it takes a multiple of {LANES} positions a device, and these are {q_BTHQ.shape[1]}"
    if k_BSGQ.shape[1] % q_BTHQ.shape[1]:
        return f"queries are an equal part of their rows, and these are {q_BTHQ.shape[1]} of {k_BSGQ.shape[1]}"
    if max(dims) > MOST_DIM:
        return f"head dims are at most {MOST_DIM}, and these are {dims}"
    return ""


def block_of(length: int) -> int:
    """Returns the largest multiple of 128 that divides the length and is at most BLOCK."""
    return next(block for block in range(BLOCK, 0, -LANES) if length % block == 0)


def computed_blocks(name: str, grid: Sequence[int]) -> float:
    """Returns the number of blocks of a grid that a kernel computes: those on and below the diagonal.

    For sharded rows, the mean over the parts of a row. With a window the grid has as many blocks of keys as the window
    spans, fewer than blocks of queries, and the first queries see fewer. In the grid of the dk and dv kernel a window
    cannot be distinguished from a part of a row, so about half of a window's blocks are counted.

    Args:
      name: of the kernel.
      grid: [rows, heads, blocks of queries, blocks of keys]; for dk and dv [rows, blocks of keys, heads, blocks of
        queries].
    """
    if "_dkv" not in name and grid[-1] < grid[-2]:
        return math.prod(grid[:-2]) * (grid[-2] * grid[-1] - grid[-1] * (grid[-1] - 1) / 2)
    num_blocks = grid[-3] if "_dkv" in name else grid[-1]  # of keys of a whole row
    return math.prod(grid) * (num_blocks + 1) / (2 * num_blocks)
