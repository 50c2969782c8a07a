"""Microscaling fp4 by its definition (OCP Microscaling Formats 1.0, sections 5.3.3 and 5.4.1), one number at a time."""

import itertools
import math

import numpy as np


def e2m1(code):
    """Sign, two bits of exponent with bias 1, one of mantissa; exponent 0 is subnormal."""
    sign, exponent, mantissa = code >> 3, code >> 1 & 3, code & 1
    size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)
    return -size if sign else size


def e8m0(code):
    """A power of two with bias 127; 255 is not a number."""
    return math.nan if code == 255 else 2.0 ** (code - 127)


def dequantize(blocks, scales):
    """uint8 [..., G, 16] and [..., G] -> float32 [..., 32 * G]; a byte holds its lower half's value first."""
    out = np.empty((*scales.shape[:-1], scales.shape[-1] * 32), np.float32)
    for at in itertools.product(*map(range, scales.shape)):
        for i, byte in enumerate(blocks[at]):
            place = 32 * at[-1] + 2 * i
            out[(*at[:-1], place)] = e2m1(int(byte) & 15) * e8m0(int(scales[at]))
            out[(*at[:-1], place + 1)] = e2m1(int(byte) >> 4) * e8m0(int(scales[at]))
    return out
