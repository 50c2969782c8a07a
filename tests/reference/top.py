"""Token order prediction (TOP, 2508.19228): rank the words by how soon they occur."""

import numpy as np

from tests.reference.losses import listnet


def scores(tokens, segment_ids, i, window):
    """Score of each word that occurs in i's document among the `window` tokens after i: {word: window - distance}.

    x[i + 1] has distance 0 and x[i + window], the last one looked at, has distance window - 1; the nearest occurrence
    counts. Scores lie in 1 .. window. Words that are absent have score -inf and no entry. Padding (segment id 0) and
    the last position of a document have none at all. A row that ends before x[i + window] has a shorter window there.

    Args:
      tokens, segment_ids: one row, [length].
    """
    out = {}
    if segment_ids[i] == 0:
        return out
    for distance in range(window):
        j = i + 1 + distance
        if j >= len(tokens) or segment_ids[j] != segment_ids[i]:
            continue
        word = int(tokens[j])
        if word not in out:
            out[word] = float(window - distance)
    return out


def top_loss_sum(hidden_BTD, unembed_DV, tokens, segment_ids, window, T):
    """(sum of the ListNet losses, count) over the positions i < T whose next token is of i's document.

    Args:
      hidden_BTD: what the output head reads, after the final norm.
      unembed_DV: TOP's own unembedding.
      tokens, segment_ids: [B, T + 1 + lookahead].
    """
    total, count = 0.0, 0
    for b in range(len(tokens)):
        for i in range(T):
            if segment_ids[b][i] == 0 or segment_ids[b][i] != segment_ids[b][i + 1]:
                continue
            logits = np.asarray(hidden_BTD[b, i] @ unembed_DV, np.float64)
            total += listnet(logits, scores(tokens[b], segment_ids[b], i, window))
            count += 1
    return total, count
