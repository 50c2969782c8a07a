"""Dequantization of DeepSeek's block-wise fp8 weights to float32."""

import numpy as np

from mtp_jax.interop.tensorfiles import DTYPES

BLOCK = 128
_FP8 = (DTYPES["F8_E4M3"], DTYPES["F8_E5M2"])


def scale_shape(shape: tuple[int, ...], block: int = BLOCK) -> tuple[int, ...]:
    """Shape of a weight's scale_inv: one scale per block x block, with partial blocks at the edges."""
    return tuple(-(-size // block) for size in shape)


def dequantize(weight: np.ndarray, scale_inv: np.ndarray, first_row: int = 0, block: int = BLOCK) -> np.ndarray:
    """Returns w[o, i] * scale_inv[o // block, i // block] in float32.

    Source: DeepSeek-V3 technical report (2412.19437, section 3.3) and weight_dequant of the released inference code.

    Args:
      weight: fp8 [rows, I], the rows from first_row on of a tensor [O, I].
      scale_inv: float32 [ceil(O / block), ceil(I / block)], of the whole tensor. It multiplies, despite its name.
        Surplus rows cannot be detected here, as O is not given: compare the shape with `scale_shape`.
      first_row: index in the tensor of the first row of `weight`.
      block: number of rows and of columns that share a scale.

    Returns:
      float32 [rows, I], without a temporary array of this size; NaN codes stay NaN.

    Raises:
      ValueError: a weight that is not fp8 with 2 dims, a negative first_row, or a scale_inv that does not cover it.
    """
    if weight.dtype not in _FP8 or weight.ndim != 2:
        raise ValueError(f"weight is {weight.dtype}{list(weight.shape)}; fp8 with 2 dims is needed")
    if first_row < 0:
        raise ValueError(f"first_row is {first_row}; it counts from 0")
    num_rows, num_columns = weight.shape
    needed = scale_shape((first_row + num_rows, num_columns), block)
    if scale_inv.ndim != 2 or scale_inv.shape[0] < needed[0] or scale_inv.shape[1] != needed[1]:
        rows = f"weight {list(weight.shape)} from row {first_row} on needs {list(needed)}"
        raise ValueError(f"scale_inv has shape {list(scale_inv.shape)}, but {rows} with blocks of {block}")
    # A lookup table of the 256 codes is several times faster than astype.
    values = np.arange(256, dtype=np.uint8).view(weight.dtype).astype(np.float32)
    out = values[weight.view(np.uint8)]
    begin = 0
    while begin < num_rows:
        band = (first_row + begin) // block
        end = min((band + 1) * block - first_row, num_rows)
        out[begin:end] *= np.repeat(scale_inv[band].astype(np.float32), block)[:num_columns]
        begin = end
    return out
