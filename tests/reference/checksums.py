"""Checksums of arrays, element by element in Python integers."""

import numpy as np

MASK = 2**32 - 1


def mix(h):
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & MASK
    return h ^ (h >> 16)


def checksum(array, starts=None, shape=None):
    """The sums of `array`, a block at `starts` of an array of `shape`."""
    shape = array.shape if shape is None else shape
    starts = [0] * array.ndim if starts is None else starts
    bits = np.ascontiguousarray(array).view(f"uint{8 * array.dtype.itemsize}").reshape(array.shape)
    first = second = 0
    for index in np.ndindex(array.shape):
        at = [start + i for start, i in zip(starts, index, strict=True)]
        row_major = column_major = 0
        for i, n in zip(at, shape, strict=True):
            row_major = row_major * n + i
        for i, n in zip(reversed(at), reversed(shape), strict=True):
            column_major = column_major * n + i
        mixed = mix(int(bits[index]) ^ (row_major * 0x9E3779B1 & MASK))
        first, second = first + mixed, second + mixed * (2 * column_major + 1)
    return first & MASK, second & MASK
