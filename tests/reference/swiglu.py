"""SwiGLU feed-forward (2002.05202, eq. 6)."""

import numpy as np


def swiglu(params, x):
    """(silu(x W_gate) * (x W_up)) W_down, silu(a) = a / (1 + exp(-a)).

    Args:
      params: {"gate": [D, F], "up": [D, F], "down": [F, D]}.
      x: [..., D].
    """
    gate = x @ params["gate"]
    return (gate / (1.0 + np.exp(-gate)) * (x @ params["up"])) @ params["down"]
