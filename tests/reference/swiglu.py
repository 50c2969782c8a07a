"""SwiGLU feed-forward (2002.05202, eq. 6)."""

import numpy as np


def swiglu(params, x, unit=None):
    """(silu(x W_gate) * (x W_up)) W_down, silu(a) = a / (1 + exp(-a)).

    As gpt-oss has it: gate at most `limit`, up within +-limit, silu(a) = a / (1 + exp(-alpha a)), up + offset.

    Args:
      params: {"gate": [D, F], "up": [D, F], "down": [F, D]}, optionally "gate_bias", "up_bias": [F], "down_bias": [D].
      x: [..., D].
      unit: has alpha, offset and limit (0: none).
    """
    gate, up = x @ params["gate"] + params.get("gate_bias", 0), x @ params["up"] + params.get("up_bias", 0)
    alpha, offset = (unit.alpha, unit.offset) if unit else (1, 0)
    if unit and unit.limit:
        gate, up = np.minimum(gate, unit.limit), np.maximum(np.minimum(up, unit.limit), -unit.limit)
    return (gate / (1.0 + np.exp(-alpha * gate)) * (up + offset)) @ params["down"] + params.get("down_bias", 0)
