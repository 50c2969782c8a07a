"""Causal attention within documents by cuDNN, called through jax; no scores in memory, forward or backward.

Rows of a single document use the kernel's own causal mask. Packed documents and windows need a mask that is added to
the scores: exact for any segment ids, but B T S numbers in the compute dtype, and no computation is skipped.

Shape letters: as in `kernels.attention`.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mtp_jax.kernels.attention.mask import Mask

# Limit of the masks of packed rows, per device: two rows of 32,768 positions.
MASK_BYTES = 4 << 30
FORWARD = "dot_product_attention_fwd_wrapper"  # name of the primitive, for checkpoint policies
UNEQUAL = {(192, 128)}  # supported unequal (query/key, value) dims: DeepSeek's
MLA_VERSION = 91000  # first cuDNN version that supports UNEQUAL


def _cudnn() -> Any:
    """Returns jax's private cuDNN module; the public function in jax.nn refuses unequal head dims.

    Imported on use, since installations without cuDNN may lack it.
    """
    from jax._src.cudnn import fused_attention_stablehlo

    return fused_attention_stablehlo


def attend(q_BTHQ, k_BTGQ, v_BTGV, mask: Mask, sinks_H, scale) -> jax.Array:
    """See `kernels.attention.attend`; whole rows (`mask.first` is 0) without sinks only."""
    cudnn, visible, length = _cudnn(), None, q_BTHQ.shape[1]
    if mask.window:
        visible = (jnp.tri(length, dtype=bool) & ~jnp.tri(length, k=-mask.window, dtype=bool))[None, None]
    if mask.segments_BS is not None:
        same = mask.segments_BS[:, None, :, None] == mask.segments_BS[:, None, None, :]
        visible = same & (jnp.tri(length, dtype=bool) if visible is None else visible)
    kind = cudnn.MaskType.CAUSAL
    return cudnn.dot_product_attention(q_BTHQ, k_BTGQ, v_BTGV, mask=visible, scale=scale, mask_type=kind)


def unsupported_reason(q_BTHQ, k_BSGQ, v_BSGV, mask: Mask, sinks_H) -> str:
    """Returns why cuDNN does not support the operands; empty if it does."""
    length, dims = q_BTHQ.shape[1], (q_BTHQ.shape[-1], v_BSGV.shape[-1])
    if q_BTHQ.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it computes in bfloat16 and float16, and this is {q_BTHQ.dtype}"
    if sinks_H is not None:
        return "it does not support attention sinks"
    if not isinstance(mask.first, int) or mask.first or length != k_BSGQ.shape[1]:
        return "it takes whole rows, and these are sharded over the context axis"
    if dims not in UNEQUAL and (dims[0] != dims[1] or dims[0] % 8 or dims[0] > 256):
        return f"head dims are equal multiples of 8 up to 256, or one of {sorted(UNEQUAL)}, and these are {dims}"
    if dims in UNEQUAL and _cudnn().check_cudnn_version() < MLA_VERSION:
        return f"head dims {dims} need cuDNN 9.10, and this is {_cudnn().check_cudnn_version()}"
    if (mask.segments_BS is not None or mask.window) and (length % 2 or mask_bytes(mask, length) > MASK_BYTES):
        return f"packed rows and windows need even lengths with masks of at most {MASK_BYTES} bytes"
    return ""


def mask_bytes(mask: Mask, length: int) -> int:
    """Returns the bytes of the mask for packed documents and windows."""
    return 2 * (1 if mask.segments_BS is None else mask.segments_BS.shape[0]) * length**2
