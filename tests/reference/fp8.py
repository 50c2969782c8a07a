"""Products in 8-bit floating point (2209.05433) with scales of several granularities (2412.19437, section 3.3).

Shape letters: N tokens, D dims in, F dims out. `x_ND` activations, `w_DF` a weight, `g_NF` the gradient of x @ w.
"""

import math
from typing import NamedTuple

import numpy as np


class Format(NamedTuple):
    """Floating-point format: bits of the mantissa, smallest exponent of a normal number, largest value."""

    mantissa_bits: int
    min_exponent: int
    max_value: float


E4M3 = Format(3, -6, 448.0)  # float8_e4m3fn: S.1111.111 is NaN, there is no infinity
E5M2 = Format(2, -14, 57344.0)
TINY = 2.0**-200  # scale of zeros: they round to zero and contribute to no other scale
TILE = 128  # of DeepSeek-V3: 1 x 128 of activations and gradients along the summed dim, 128 x 128 of weights


def rounded(x, form):
    """Returns the nearest value of a format for each element, ties to even; overflow is an error."""
    out = np.zeros(x.shape)
    for index, value in np.ndenumerate(np.asarray(x, np.float64)):
        if not math.isfinite(value):
            out[index] = math.nan
        elif value:
            exponent = max(math.frexp(value)[1] - 1, form.min_exponent)
            step = 2.0 ** (exponent - form.mantissa_bits)
            out[index] = round(value / step) * step  # Python rounds halves to even
            assert abs(out[index]) <= form.max_value, (value, form)
    return out


def power_of_two(amax, form):
    """Returns the power of two s for which amax / s is in [2^(e-1), 2^e), 2^e at most the largest of the format."""
    top = math.floor(math.log2(form.max_value)) - 1
    return 2.0 ** (math.floor(math.log2(amax)) - top) if amax else TINY


def exact(amax, form):
    """Returns the scale that maps amax to the largest value of the format."""
    return amax / form.max_value if amax else TINY


def approximated(x, form, tile, scale=power_of_two):
    """Returns x rounded to a format after division by one scale per tile, and multiplied by that scale again.

    Args:
      x: [A, B].
      tile: sizes (rows, columns) of the parts with one scale each; None: the whole dim.
    """
    out = np.zeros(x.shape)
    rows, columns = (size or whole for size, whole in zip(tile, x.shape, strict=True))
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            part = x[i : i + rows, j : j + columns]
            by = scale(np.abs(part).max(), form)
            out[i : i + rows, j : j + columns] = rounded(part / by, form) * by
    return out


def per_tensor(x_ND, w_DF, g_NF, form=E4M3, scale=power_of_two):
    """Returns x @ w, g @ w^T and x^T @ g with one scale per array."""
    whole = None, None
    x, w = approximated(x_ND, E4M3, whole, scale), approximated(w_DF, E4M3, whole, scale)
    g = approximated(g_NF, form, whole, scale)
    return x @ w, g @ w.T, x.T @ g


def per_token(x_ND, w_DF, g_NF, form=E4M3, scale=power_of_two):
    """Returns x @ w, g @ w^T and x^T @ g with one scale per token of x and g, and one for w: what mtp_jax computes.

    The scales of tokens are not constant along the summed dim of x^T @ g. Its operands are x without its scales and g,
    already rounded, with those of both, rounded again with one scale for all tokens.
    """
    by_x = np.array([scale(np.abs(row).max(), E4M3) for row in x_ND])
    by_g = np.array([scale(np.abs(row).max(), form) for row in g_NF])
    x = np.stack([rounded(row / by, E4M3) for row, by in zip(x_ND, by_x, strict=True)])
    g = np.stack([rounded(row / by, form) for row, by in zip(g_NF, by_g, strict=True)])
    w = approximated(w_DF, E4M3, (None, None), scale)
    by_all = (by_x * by_g).max()
    shifted = np.stack([rounded(row * by / by_all, form) for row, by in zip(g, by_x * by_g, strict=True)])
    return (x * by_x[:, None]) @ w, (g * by_g[:, None]) @ w.T, (x.T @ shifted) * by_all


def per_token_and_column(x_ND, w_DF, g_NF, form=E4M3, scale=power_of_two):
    """Returns x @ w, g @ w^T and x^T @ g with one scale per token of x and per column of w.

    Those scales are not constant along the summed dims of the gradients, F and N. The gradient g is multiplied by them
    before it is rounded, with one scale per token for g @ w^T and one per column for x^T @ g.
    """
    x, w = approximated(x_ND, E4M3, (1, None), scale), approximated(w_DF, E4M3, (None, 1), scale)
    by_N = np.array([scale(np.abs(row).max(), E4M3) for row in x_ND])
    by_F = np.array([scale(np.abs(column).max(), E4M3) for column in w_DF.T])
    g_by_token = approximated(g_NF * by_F, form, (1, None), scale) / by_F
    g_by_column = approximated(g_NF * by_N[:, None], form, (None, 1), scale) / by_N[:, None]
    return x @ w, g_by_token @ w.T, x.T @ g_by_column


def per_tile(x_ND, w_DF, g_NF, form=E4M3, scale=power_of_two):
    """Returns x @ w, g @ w^T and x^T @ g with the tiles of DeepSeek-V3.

    The activations of x^T @ g are those that were rounded for x @ w, rounded again in tiles along N.
    """
    x, w = approximated(x_ND, E4M3, (1, TILE), scale), approximated(w_DF, E4M3, (TILE, TILE), scale)
    again = approximated(x, E4M3, (TILE, 1), scale)
    g_by_token = approximated(g_NF, form, (1, TILE), scale)
    return x @ w, g_by_token @ w.T, again.T @ approximated(g_NF, form, (TILE, 1), scale)
