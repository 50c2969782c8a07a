"""Grouped-query attention (2305.13245, section 2.2): query head h reads key/value head h // (H / G)."""

import math

import numpy as np

from tests.reference.attention import attend
from tests.reference.norm import rms_norm
from tests.reference.rope import rotate


def gqa(params, model, x_BTD, segment_ids_BT, positions_BT):
    """o_i = W_o [ attention ]; each head: project, add bias, norm over head_dim (q, k), rotate its first dims (q, k).

    Args:
      params: {"q": [D, H, hd], "k": [D, G, hd], "v": [D, G, hd], "o": [H, hd, D]}, optionally "q_bias": [H, hd],
        "k_bias", "v_bias": [G, hd], "o_bias": [D], "q_norm", "k_norm": {"scale": [hd]}, "sinks": [H].
      model: of this layer, see `decoder.of_layer`.

    Returns:
      [B, T, D].
    """
    B, T, D = x_BTD.shape
    H, G, hd = model.num_heads, model.num_kv_heads, model.head_dim
    q, k, v = np.zeros((B, T, H, hd)), np.zeros((B, T, H, hd)), np.zeros((B, T, H, model.value_head_dim or hd))
    for b in range(B):
        for t in range(T):
            for h in range(H):
                g = h // (H // G)
                x, position = x_BTD[b, t], positions_BT[b, t]
                q[b, t, h] = _position(_head(params, "q", h, x, model), position, model)
                k[b, t, h] = _position(_head(params, "k", g, x, model), position, model)
                v[b, t, h] = model.value_scale * _head(params, "v", g, x, model)
    o = attend(q, k, v, segment_ids_BT, 1.0 / math.sqrt(hd), model.local.window, params.get("sinks"))
    out = np.zeros((B, T, D))
    for h in range(H):
        out += o[:, :, h] @ params["o"][h]
    return out + params.get("o_bias", 0.0)


def _head(params, name, index, x, model):
    """Projection, bias, norm of one head of q, k or v (v has no norm)."""
    out = x @ params[name][:, index]
    if f"{name}_bias" in params:
        out = out + params[f"{name}_bias"][index]
    if f"{name}_norm" in params:
        out = rms_norm(params[f"{name}_norm"], out, model.norm_eps)
    return out


def _position(vector, position, model):
    """Rotate the first round(rotary_fraction * head_dim) dims, leave the rest."""
    n = round(model.rotary_fraction * model.head_dim)
    assert n % 2 == 0, f"rotary_fraction {model.rotary_fraction} of {model.head_dim} is odd"
    return np.concatenate([rotate(vector[:n], position, model), vector[n:]])
