"""Training loss of drafts, compared with the main model's predictions (Bebop, 2606.12370; DSpark, 2607.05147).

The teacher of depth k at position i is the main model at i + k, which predicts the same token x[i + 1 + k].
"""

from tests.reference.losses import cross_entropy, end_to_end_total_variation, total_variation


def draft_loss(logits_KBTV, tokens, segment_ids, loss_mask, name, share, mtp_weight, teacher_BTV=None):
    """L_0 + lambda / N sum_k L_k with equal weights of the depths and the paper's divisor, and no balance loss.

    Depth k counts at position i if x[i + 1 + k] is of i's document and the teacher's position i + k is in the row;
    then with the weight of x[i + 1 + k]. One position's end-to-end loss, where all of its N drafts count, is
    1 - (1/N) sum_j prod_{k <= j} (1 - TV_k).

    Args:
      logits_KBTV: of every depth, 0 is the main model.
      tokens, segment_ids, loss_mask: [B, T + 1 + N].
      name: "cross_entropy", "tv" or "end_to_end_tv".
      share: of cross-entropy; the rest is the distance.
      mtp_weight: lambda.
      teacher_BTV: the main model's logits as the drafts are compared with; None: logits_KBTV[0]. A constant of
        numerical gradients.

    Returns:
      (loss, sum over depths and positions of weight * draft loss, sum of these weights).
    """
    K, B, T, _ = logits_KBTV.shape
    teacher_BTV = logits_KBTV[0] if teacher_BTV is None else teacher_BTV
    main = extra = divisor = num = 0.0
    for b in range(B):
        for i in range(T):
            weights = [weight_of(segment_ids[b], loss_mask[b], i, k) for k in range(K)]
            divisor += weights[0]
            if weights[0]:
                main += weights[0] * cross_entropy(logits_KBTV[0, b, i], tokens[b, i + 1])
            for k in range(1, K):
                has_teacher = i + k < T
                if not weights[k] or (name != "cross_entropy" and not has_teacher):
                    continue
                value = cross_entropy(logits_KBTV[k, b, i], tokens[b, i + 1 + k])
                if name != "cross_entropy":
                    value = share * value + (1 - share) * distance(logits_KBTV, teacher_BTV, name, b, i, k)
                extra += weights[k] * value
                num += weights[k]
    return (main + mtp_weight * extra / (K - 1)) / divisor, extra, num


def weight_of(segment_ids, loss_mask, i, k):
    """Of x[i + 1 + k] as a target at position i of a row."""
    inside = segment_ids[i] != 0 and segment_ids[i] == segment_ids[i + 1 + k]
    return float(loss_mask[i + 1 + k]) if inside else 0.0


def distance(logits_KBTV, teacher_BTV, name, b, i, k):
    """Of draft k at position i from the main model."""
    drafts = [logits_KBTV[j, b, i] for j in range(1, k + 1)]
    teachers = [teacher_BTV[b, i + j] for j in range(1, k + 1)]
    if name == "tv":
        return total_variation(drafts[-1], teachers[-1])
    return end_to_end_total_variation(drafts, teachers)[-1]
