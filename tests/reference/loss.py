"""The loss over all depths (DeepSeek-V3, eqs. 24-25; 2404.19737, eq. 2) and the rates that go with it."""

import math

import numpy as np


def log_sum_exp(logits):
    """ln sum_v exp(logits_v)."""
    top = np.max(logits)
    return top + math.log(np.sum(np.exp(logits - top)))


def depth_sums(logits_BTV, targets_BT, valid_BT):
    """Sums over the valid positions of one depth: nll, z (logsumexp squared), correct, count."""
    sums = {"nll": 0.0, "z": 0.0, "correct": 0, "count": 0}
    for b, i in np.ndindex(*valid_BT.shape):
        if not valid_BT[b, i]:
            continue
        logits, target = logits_BTV[b, i], targets_BT[b, i]
        normaliser = log_sum_exp(logits)
        sums["nll"] += normaliser - logits[target]
        sums["z"] += normaliser**2
        sums["correct"] += int(np.argmax(logits) == target)
        sums["count"] += 1
    return sums


def agreement_sums(logits_KBTV, valid_KBT, segment_ids_BT, k):
    """(agreed, count) of depth k: is its choice that of the main head one forward pass later, at i + k?

    Counted where i + k is a position, depth k is valid at i, depth 0 is valid at i + k, and both are one document.
    """
    agreed = count = 0
    _, B, T = valid_KBT.shape
    for b in range(B):
        for i in range(T):
            if i + k >= T or not valid_KBT[k, b, i] or not valid_KBT[0, b, i + k]:
                continue
            if segment_ids_BT[b, i] != segment_ids_BT[b, i + k]:
                continue
            count += 1
            agreed += int(np.argmax(logits_KBTV[k, b, i]) == np.argmax(logits_KBTV[0, b, i + k]))
    return agreed, count


def expected_tokens(acceptance):
    """1 + sum_k prod_{j <= k} a_j tokens a forward pass, from the acceptance rates a_1 .. a_D."""
    total, product = 1.0, 1.0
    for rate in acceptance:
        product *= rate
        total += product
    return total


def combine(per_depth, mtp_weight, depth_weights):
    """L_0 + lambda * sum_k w_k L_k / sum_k w_k."""
    if len(per_depth) == 1:
        return per_depth[0]
    extra = sum(w * value for w, value in zip(depth_weights, per_depth[1:], strict=True))
    return per_depth[0] + mtp_weight * extra / sum(depth_weights)


def ratio(total, count):
    """total / count, and 0 where nothing was counted."""
    return total / count if count else 0.0


def loss(logits_KBTV, built, segment_ids_BT, mtp_weight, depth_weights, normalize="paper", z_loss_weight=0.0):
    """The loss and its parts, without the balance loss.

    Args:
      built: `targets.Targets`.
      mtp_weight: lambda. depth_weights: w_1 .. w_D.
      normalize: "paper" divides L_k by the valid depth-0 targets, "valid" by the depth's own.
      z_loss_weight: factor of the mean logsumexp squared, combined over depths as the nll is.

    Returns:
      dict: loss, depth_losses [K], z_losses [K], nll_sums [K], counts [K], accuracy [K], agreement [D],
      agreement_sums [D] of (agreed, count), expected_tokens.
    """
    K = len(logits_KBTV)
    sums = [depth_sums(logits_KBTV[k], built.targets[k], built.valid[k]) for k in range(K)]
    divisors = [s["count"] if normalize == "valid" else sums[0]["count"] for s in sums]
    depth_losses = [ratio(s["nll"], d) for s, d in zip(sums, divisors, strict=True)]
    z_losses = [ratio(s["z"], d) for s, d in zip(sums, divisors, strict=True)]
    agreements = [agreement_sums(logits_KBTV, built.valid, segment_ids_BT, k) for k in range(1, K)]
    agreement = [ratio(agreed, count) for agreed, count in agreements]
    total = combine(depth_losses, mtp_weight, depth_weights)
    return {
        "loss": total + z_loss_weight * combine(z_losses, mtp_weight, depth_weights),
        "depth_losses": np.array(depth_losses),
        "z_losses": np.array(z_losses),
        "nll_sums": np.array([s["nll"] for s in sums]),
        "counts": np.array([s["count"] for s in sums]),
        "accuracy": np.array([ratio(s["correct"], s["count"]) for s in sums]),
        "agreement": np.array(agreement),
        "agreement_sums": agreements,
        "expected_tokens": expected_tokens(agreement),
    }
