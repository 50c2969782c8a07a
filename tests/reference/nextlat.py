"""Next-latent prediction (NextLat, 2511.05963 v4): an MLP that predicts the decoder's next hidden state, unrolled.

The abstract was read at the source. Details (the residual, the three layers, which vectors enter the norm, the
losses) come from third-party notes. These have LayerNorm; the default here is RMSNorm, as in the rest of the model.
"""

import math

import numpy as np

from tests.reference.losses import cross_entropy, kl, smooth_l1
from tests.reference.norm import rms_norm


def gelu(x, approximate=False):
    """x Phi(x), Phi the normal distribution function; approximate: by tanh (1606.08415, section 2)."""
    out = np.zeros(x.shape)
    for where in np.ndindex(*x.shape):
        v = float(x[where])
        if approximate:
            out[where] = v / 2 * (1 + math.tanh(math.sqrt(2 / math.pi) * (v + 0.044715 * v**3)))
        else:
            out[where] = v / 2 * (1 + math.erf(v / math.sqrt(2)))
    return out


def default_norm(params, x):
    """RMSNorm with the model's default epsilon."""
    return rms_norm(params, x, 1e-6)


def mlp(layers, x, approximate_gelu=False):
    """gelu(gelu(x W1) W2) W3: three layers without bias, nothing after the last."""
    first, second, third = layers
    return gelu(gelu(x @ first, approximate_gelu) @ second, approximate_gelu) @ third


def hidden_states(params, h_BTD, embed_fn, tokens, depth, norm=default_norm, approximate_gelu=False):
    """p_1 .. p_depth with p_0 = h[i] and p_j = p_{j-1} + MLP(norm([p_{j-1}; Emb(x[i + j])])).

    p_j at i stands for h[i + j], so the head reads it (without another norm) as a prediction of x[i + 1 + j].
    Every position is computed, those of which some x[i + j] is of another document too: `losses` leaves them out.

    Args:
      params: {"norm": of `norm`, {"scale": [2d]} for RMSNorm; "layers": [W1 [2d, m], W2 [m, m], W3 [m, d]]}.
      h_BTD: the decoder's output after the final norm, what the head reads.
      embed_fn: word -> [d].
      tokens: [B, T + 1 + depth] or longer.
      norm: (params["norm"], vector [2d]) -> [2d].

    Returns:
      list of `depth` arrays [B, T, d].
    """
    B, T, _ = h_BTD.shape
    out = [np.zeros(h_BTD.shape) for _ in range(depth)]
    for b in range(B):
        for i in range(T):
            p = np.asarray(h_BTD[b, i], np.float64)
            for j in range(1, depth + 1):
                joined = np.concatenate([p, embed_fn(int(tokens[b][i + j]))])
                p = p + mlp(params["layers"], norm(params["norm"], joined), approximate_gelu)
                out[j - 1][b, i] = p
    return out


def token_valid(segment_ids, i, j):
    """Is the target x[i + 1 + j] of i's document? segment_ids: one row; 0 is padding."""
    return segment_ids[i] != 0 and segment_ids[i] == segment_ids[i + 1 + j]


def latent_valid(segment_ids, i, j, T):
    """Is there a target h[i + j] (i + j < T, in i's document) at a position whose token target is valid?"""
    return i + j < T and segment_ids[i] == segment_ids[i + j] and token_valid(segment_ids, i, j)


def losses(
    params, h_BTD, head_fn, embed_fn, tokens, segment_ids, depth,
    norm=default_norm, approximate_gelu=False, target_h_BTD=None, teacher_head_fn=None,
):  # fmt: skip
    """Sums and counts of each depth j = 1 .. depth.

    The latent losses (smooth_l1, kl) count where `latent_valid`, the token's nll where `token_valid`: at the last j
    positions of a row there is a token but no hidden state to compare with.

    Args:
      head_fn: hidden [d] -> logits [V].
      segment_ids: like tokens, [B, T + 1 + depth] or longer.
      target_h_BTD, teacher_head_fn: the stop_gradient sides, which stay constant when a numerical gradient moves
        h_BTD or head_fn; None: h_BTD and head_fn themselves.

    Returns:
      list of dicts: smooth_l1 (of p_j against h[i + j], mean over d), kl (KL(head(h[i + j]) || head(p_j))),
      latent_count, nll (of x[i + 1 + j] under head(p_j)), token_count.
    """
    B, T, _ = h_BTD.shape
    targets = h_BTD if target_h_BTD is None else target_h_BTD
    teacher = head_fn if teacher_head_fn is None else teacher_head_fn
    predictions = hidden_states(params, h_BTD, embed_fn, tokens, depth, norm, approximate_gelu)
    out = []
    for j in range(1, depth + 1):
        sums = {"smooth_l1": 0.0, "kl": 0.0, "latent_count": 0, "nll": 0.0, "token_count": 0}
        for b in range(B):
            for i in range(T):
                p = predictions[j - 1][b, i]
                if token_valid(segment_ids[b], i, j):
                    sums["nll"] += cross_entropy(head_fn(p), int(tokens[b][i + 1 + j]))
                    sums["token_count"] += 1
                if latent_valid(segment_ids[b], i, j, T):
                    sums["smooth_l1"] += smooth_l1(p, targets[b, i + j])
                    sums["kl"] += kl(teacher(targets[b, i + j]), head_fn(p))
                    sums["latent_count"] += 1
        out.append(sums)
    return out
