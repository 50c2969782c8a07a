"""Causal attention within a document by cuDNN, through jax: forward and backward without the scores in memory.

Where rows hold one document each the kernel's own causal mask is all there is. Packed documents are told apart by a
mask that is added to the scores, a number in the compute dtype for every pair of positions of a row: exact for any
segment ids, and B T S numbers of memory.

Shape letters: as in the package.
"""

from typing import Any

import jax
import jax.numpy as jnp

# Of packed rows' masks, a device: rows of 32,768 one at a time.
MASK_BYTES = 4 << 30
FORWARD = "dot_product_attention_fwd_wrapper"  # its primitive, to policies of recomputation
UNEQUAL = {(192, 128)}  # DeepSeek's (query/key, value) dims, which cuDNN has kernels for; equal dims: any
MLA_VERSION = 91000  # the first cuDNN with them


def _cudnn() -> Any:
    """jax's own way to cuDNN; the public front to it, in jax.nn, refuses unequal head dims. Imported where it is used:
    devices without cuDNN need not have it."""
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def attend(q_BTHQ, k_BTGQ, v_BTGV, segments_BT, first, scale) -> jax.Array:
    """As `kernels.attention.attend`, of whole rows (`first` is 0)."""
    cudnn, mask = _cudnn(), None
    if segments_BT is not None:
        causal_TT = jnp.tri(segments_BT.shape[1], dtype=bool)
        mask = (causal_TT & (segments_BT[:, :, None] == segments_BT[:, None, :]))[:, None]
    return cudnn.dot_product_attention(q_BTHQ, k_BTGQ, v_BTGV, mask=mask, scale=scale, mask_type=cudnn.MaskType.CAUSAL)


def unsupported_reason(q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first) -> str:
    """Why cuDNN cannot take this attention; empty where it can."""
    length, dims = q_BTHQ.shape[1], (q_BTHQ.shape[-1], v_BSGV.shape[-1])
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and this is {q_BTHQ.dtype}"
    if not isinstance(first, int) or first or length != k_BSGQ.shape[1]:
        return "it takes whole rows, and these are sharded over the context axis"
    if dims not in UNEQUAL and (dims[0] != dims[1] or dims[0] % 8 or dims[0] > 256):
        return f"head dims are equal multiples of 8 up to 256, or one of {sorted(UNEQUAL)}, and these are {dims}"
    if dims in UNEQUAL and _cudnn().check_cudnn_version() < MLA_VERSION:
        return f"head dims {dims} need cuDNN 9.10, and this is {_cudnn().check_cudnn_version()}"
    if segments_BS is not None and (length % 2 or mask_bytes(segments_BS) > MASK_BYTES):
        return f"packed rows are of even length with masks of at most {MASK_BYTES} bytes, and these are not"
    return ""


def mask_bytes(segments_BS: jax.Array) -> int:
    """Of the mask that tells packed documents apart."""
    return 2 * segments_BS.shape[0] * segments_BS.shape[1] ** 2
