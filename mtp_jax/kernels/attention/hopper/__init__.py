"""Attention within packed documents for Hopper GPUs in Pallas, which skips what lies in other documents.

The online softmax of FlashAttention (2205.14135) with two computing warpgroups that take turns on the tensor cores and
one that fetches (FlashAttention-3, 2407.08608). A document is a run of positions, so the keys that a block of queries
sees are a range: from where the document, or the window, of its first query begins to its last query; and the queries
that see a block of keys are a range too. Only blocks that reach over a range's end are masked element by element. The
backward pass is two kernels, one for the queries and one for keys and values, which compute the probabilities anew.

The kernels are imported where they are used: they need what only a jax with CUDA has.

Shape letters: as in `kernels.attention`.
"""

import jax
import jax.numpy as jnp

from mtp_jax.kernels.attention.mask import Mask

BLOCK, DIMS = 128, 320  # positions that the kernels take together; head dims that registers hold


def attend(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H, scale) -> jax.Array:
    """As `kernels.attention.attend`."""
    from mtp_jax.kernels.attention.hopper import blocks, kernel

    seen = blocks.ranges(mask, q_BTHQ.shape[0], k_BSGQ.shape[1], q_BTHQ.shape[1])
    return kernel.attend(q_BTHQ, k_BSGQ, v_BSGV, seen, sinks_H, scale, blocks.Tiles())


def unsupported_reason(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H) -> str:
    """Why the kernels cannot take this attention; empty where they can."""
    lengths = (q_BTHQ.shape[1], k_BSGQ.shape[1])
    dims = q_BTHQ.shape[3], v_BSGV.shape[3]
    if 12080 <= _cuda_version() < 12091:  # as jax's own causal kernel says, jax.experimental.pallas.ops.gpu
        return f"CUDA 12.8 to 12.9.0 compiles its masks wrongly, and this is {_cuda_version()}"
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and this is {q_BTHQ.dtype}"
    if any(length % BLOCK for length in lengths):
        return f"it takes lengths that are multiples of {BLOCK}, and these are {lengths}"
    if any(dim % 64 for dim in dims) or dims[1] > dims[0] or sum(dims) > DIMS:
        return f"head dims are multiples of 64, values' no larger, together at most {DIMS}; these are {dims}"
    return ""


def _cuda_version() -> int:
    """12080 for CUDA 12.8; 0 where there is none."""
    from jax._src.lib import cuda_versions  # jax has no public way to it

    return cuda_versions.cuda_runtime_get_version() if cuda_versions else 0
