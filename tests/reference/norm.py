"""Root mean square layer normalisation (1910.07467, eq. 4)."""

import math

import numpy as np


def rms_norm(params, x, eps):
    """y = scale * x / sqrt(mean(x^2) + eps), over the last dim.

    Args:
      params: {"scale": [n]}.
      x: [..., n].
    """
    out = np.zeros(x.shape)
    for where in np.ndindex(*x.shape[:-1]):
        vector = x[where]
        mean_square = sum(float(v) ** 2 for v in vector) / len(vector)
        out[where] = params["scale"] * vector / math.sqrt(mean_square + eps)
    return out
