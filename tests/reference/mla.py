"""Multi-head latent attention, unabsorbed (DeepSeek-V2, 2405.04434, eqs. 9-19)."""

import math

import numpy as np

from tests.reference.attention import attend
from tests.reference.norm import rms_norm
from tests.reference.rope import rotate, softmax_factor


def mla(params, model, x_BTD, segment_ids_BT, positions_BT):
    """o_i = W_o [ attention over keys (k_nope, k_rope) ], keys and values unfolded from the normed latent.

    Args:
      params: {"q": [D, H, N + R]} or {"q_a": [D, Rq], "q_a_norm", "q_b": [Rq, H, N + R]}, with
        {"kv_a": [D, C + R], "kv_a_norm", "kv_b": [C, H, N + V_h], "o": [H, V_h, D]}.
      positions_BT: what rope rotates by.

    Returns:
      [B, T, D].
    """
    B, T, D = x_BTD.shape
    H, N, R, V_h = model.num_heads, model.qk_nope_head_dim, model.qk_rope_head_dim, model.v_head_dim
    q, k, v = np.zeros((B, T, H, N + R)), np.zeros((B, T, H, N + R)), np.zeros((B, T, H, V_h))
    for b in range(B):
        for t in range(T):
            q[b, t], k[b, t], v[b, t] = _one_position(params, model, x_BTD[b, t], positions_BT[b, t])
    scale = softmax_factor(model) / math.sqrt(N + R)
    o = attend(q, k, v, segment_ids_BT, scale, model.local.window, params.get("sinks"))
    out = np.zeros((B, T, D))
    for h in range(H):
        out += o[:, :, h] @ params["o"][h]
    return out


def _one_position(params, model, x, position):
    """Query [H, N + R], key [H, N + R] and value [H, V_h] of one position (eqs. 10-17)."""
    H, N, C = model.num_heads, model.qk_nope_head_dim, model.kv_lora_rank
    if "q_a" in params:
        latent_q, w_q = rms_norm(params["q_a_norm"], x @ params["q_a"], model.latent_norm_eps), params["q_b"]
    else:
        latent_q, w_q = x, params["q"]
    compressed = x @ params["kv_a"]
    latent = rms_norm(params["kv_a_norm"], compressed[:C], model.latent_norm_eps)
    shared_rope_key = rotate(compressed[C:], position, model)  # one for all heads, not normed
    queries, keys, values = [], [], []
    for h in range(H):
        query = latent_q @ w_q[:, h]
        unfolded = latent @ params["kv_b"][:, h]
        queries.append(np.concatenate([query[:N], rotate(query[N:], position, model)]))
        keys.append(np.concatenate([unfolded[:N], shared_rope_key]))
        values.append(unfolded[N:])
    return np.array(queries), np.array(keys), np.array(values)
