"""Attention for Hopper GPUs in Pallas that skips blocks of keys outside the documents of a block of queries.

The online softmax of FlashAttention (2205.14135) with two compute warpgroups that alternate on the tensor cores and a
third one that loads (FlashAttention-3, 2407.08608). A document is a run of positions, so the keys that a block of
queries sees are a range, from the start of the first query's document or window to the last query; likewise the queries
that see a block of keys. Only blocks across an end of a range are masked elementwise. The backward pass has two
kernels, one for queries and one for keys and values, which recompute the probabilities.

The kernels are imported on use, since they require a jax with CUDA.

Shape letters: as in `kernels.attention`.
"""

import jax
import jax.numpy as jnp

from mtp_jax.kernels.attention.mask import Mask

BLOCK, DIMS = 128, 320  # positions per block; maximum sum of the head dims, limited by registers


def attend(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H, scale) -> jax.Array:
    """See `kernels.attention.attend`."""
    from mtp_jax.kernels.attention.hopper import blocks, kernel

    seen = blocks.ranges(mask, q_BTHQ.shape[0], k_BSGQ.shape[1], q_BTHQ.shape[1])
    value_dim = v_BSGV.shape[3]
    wide_q, wide_v = padded_dims(q_BTHQ.shape[3], value_dim)
    operands = (_padded(x, dim) for x, dim in ((q_BTHQ, wide_q), (k_BSGQ, wide_q), (v_BSGV, wide_v)))
    return kernel.attend(*operands, seen, sinks_H, scale, blocks.Tiles())[..., :value_dim]


def padded_dims(query_dim: int, value_dim: int) -> tuple[int, int]:
    """Returns the head dims that the kernels run with: unequal ones, which no other kernel supports, are padded."""
    if query_dim == value_dim:
        return query_dim, value_dim
    return -(-query_dim // 64) * 64, -(-value_dim // 64) * 64


def _padded(x_BSHX: jax.Array, dim: int) -> jax.Array:
    """Pads the last dim with zeros, which add nothing to a score; those of values are dropped from the output."""
    return jnp.pad(x_BSHX, ((0, 0), (0, 0), (0, 0), (0, dim - x_BSHX.shape[3])))


def unsupported_reason(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H) -> str:
    """Returns why the kernels do not support the operands; empty if they do."""
    lengths = (q_BTHQ.shape[1], k_BSGQ.shape[1])
    dims = padded_dims(q_BTHQ.shape[3], v_BSGV.shape[3])
    if 12080 <= _cuda_version() < 12091:  # as in jax's own causal kernel, jax.experimental.pallas.ops.gpu
        return f"CUDA 12.8 to 12.9.0 compiles its masks wrongly, and this is {_cuda_version()}"
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and this is {q_BTHQ.dtype}"
    if any(length % BLOCK for length in lengths):
        return f"it takes lengths that are multiples of {BLOCK}, and these are {lengths}"
    if any(dim % 64 for dim in dims) or dims[1] > dims[0] or sum(dims) > DIMS:
        return f"equal head dims are multiples of 64, values' no larger, together at most {DIMS}; these are {dims}"
    return ""


def _cuda_version() -> int:
    """Returns the version of the CUDA runtime, 12080 for CUDA 12.8; 0 without CUDA."""
    from jax._src.lib import cuda_versions  # jax has no public API for it

    return cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
