"""Softmax attention, one query at a time (1706.03762, eq. 1) with a causal and a segment mask."""

import numpy as np


def softmax(scores):
    """exp(s_i) / sum_j exp(s_j)."""
    e = np.exp(scores - np.max(scores))
    return e / np.sum(e)


def attend(q_BTHn, k_BTHn, v_BTHm, segment_ids_BT, scale, window=0, sinks_H=None):
    """o_i = sum_j softmax_j(scale * q_i . k_j) v_j over the j <= i of the same segment id.

    With a window only the last `window` of them, i included. With sinks the softmax has one more score per head, whose
    weight nothing gets.

    Segment id 0 is padding and like any other id here: padding sees padding, and its output is not used.

    Returns:
      [B, T, H, m].
    """
    B, T, H, _ = q_BTHn.shape
    out = np.zeros((B, T, H, v_BTHm.shape[-1]))
    for b in range(B):
        for i in range(T):
            first = max(0, i - window + 1) if window else 0
            seen = [j for j in range(first, i + 1) if segment_ids_BT[b, j] == segment_ids_BT[b, i]]
            for h in range(H):
                scores = [scale * np.dot(q_BTHn[b, i, h], k_BTHn[b, j, h]) for j in seen]
                weights = softmax(np.array(scores + ([] if sinks_H is None else [sinks_H[h]])))[: len(seen)]
                for weight, j in zip(weights, seen, strict=True):
                    out[b, i, h] += weight * v_BTHm[b, j, h]
    return out
