"""Dequantization of microscaling fp4 (mxfp4, OCP MX 1.0), used for gpt_oss's experts: 32 values share an exponent."""

import ml_dtypes
import numpy as np

BLOCK = 32  # values that share a scale


def dequantize(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Returns value * 2^(scale - 127) for every 4-bit code, in float32.

    Args:
      blocks: uint8 [..., G, 16] (`*_blocks`), two e2m1 codes per byte, the lower four bits first.
      scales: uint8 [..., G] (`*_scales`), e8m0: an exponent with bias 127; 255 is NaN.

    Returns:
      float32 [..., 32 * G].

    Raises:
      ValueError: arrays that are not uint8, or shapes that do not match.
    """
    half = BLOCK // 2
    if blocks.dtype != np.uint8 or scales.dtype != np.uint8 or blocks.shape != (*scales.shape, half):
        has = f"blocks are {blocks.dtype}{list(blocks.shape)} and scales {scales.dtype}{list(scales.shape)}"
        raise ValueError(f"{has}; uint8[..., G, {half}] and uint8[..., G] are needed")
    code = np.arange(256, dtype=np.uint8)
    values = np.stack([code & 15, code >> 4], -1).view(ml_dtypes.float4_e2m1fn).astype(np.float32)  # [256, 2] by byte
    factors = code.view(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    out = values[blocks].reshape(*scales.shape, BLOCK)
    out *= factors[scales][..., None]
    return out.reshape(*scales.shape[:-1], BLOCK * scales.shape[-1])
