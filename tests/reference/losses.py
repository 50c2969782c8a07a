"""Losses of one position from its logits, their weighted sums over positions, and numerical gradients.

Logits are [V] float64; a teacher's logits are constants (detached) in every gradient.
"""

import math

import numpy as np

from tests.reference.loss import log_sum_exp


def log_probability(logits, word):
    """ln softmax(logits)_word."""
    return logits[word] - log_sum_exp(logits)


def cross_entropy(logits, target, z_loss_weight=0.0):
    """-ln softmax(logits)_target + z_loss_weight * (ln Z)^2, with ln Z = ln sum_v exp(logits_v)."""
    log_z = log_sum_exp(logits)
    return log_z - logits[target] + z_loss_weight * log_z**2


def total_variation(logits, teacher_logits):
    """1/2 sum_v |p_v - q_v|, between p = softmax(teacher_logits) and q = softmax(logits)."""
    total = 0.0
    for v in range(len(logits)):
        total += abs(math.exp(log_probability(teacher_logits, v)) - math.exp(log_probability(logits, v)))
    return total / 2


def end_to_end_total_variation(logits_KV, teacher_logits_KV):
    """Terms v_j = 1 - prod_{i <= j} (1 - TV_i), j = 1 .. K (Bebop, 2606.12370).

    v_j is the probability that not all of the first j drafts are accepted under rejection sampling. The loss of one
    position is the mean of the terms, 1 - (1/K) sum_j prod_{i <= j} (1 - TV_i).

    Args:
      logits_KV: of the K drafts, in the order in which they are verified.
      teacher_logits_KV: row j is the main model's distribution of the token that draft j predicts.

    Returns:
      list of K floats.
    """
    terms, accepted = [], 1.0
    for logits, teacher_logits in zip(logits_KV, teacher_logits_KV, strict=True):
        accepted *= 1.0 - total_variation(logits, teacher_logits)
        terms.append(1.0 - accepted)
    return terms


def kl(teacher_logits, logits):
    """KL(p || q) = sum_v p_v (ln p_v - ln q_v), p = softmax(teacher_logits) and q = softmax(logits).

    The teacher comes first, as in the formula and unlike in `total_variation`, which is symmetric.
    """
    total = 0.0
    for v in range(len(logits)):
        log_p = log_probability(teacher_logits, v)
        if log_p == -math.inf:
            continue  # p ln p -> 0
        total += math.exp(log_p) * (log_p - log_probability(logits, v))
    return total


def listnet(logits, scores):
    """-sum_v t_v ln softmax(logits)_v, with t the softmax of the scores over the words that have one.

    Args:
      scores: dict word -> score; a word that is not in it has score -inf, i.e. t_v = 0. Not empty.
    """
    if not scores:
        raise ValueError("no word has a score: the target distribution is undefined")
    log_z = log_sum_exp(np.array(list(scores.values()), np.float64))
    total = 0.0
    for word, score in scores.items():
        total -= math.exp(score - log_z) * log_probability(logits, word)
    return total


def smooth_l1(prediction, target):
    """Mean over the dims of d^2 / 2 where |d| < 1 and of |d| - 1/2 elsewhere, d = prediction - target.

    torch.nn.SmoothL1Loss(reduction="mean", beta=1.0) of one vector.
    """
    total = 0.0
    for a, b in zip(prediction, target, strict=True):
        d = abs(a - b)
        total += d**2 / 2 if d < 1.0 else d - 0.5
    return total / len(prediction)


def weighted_sums(values_KBT, weight_KBT):
    """(sum of weight * value, sum of weights) of each depth, two [K] arrays.

    A value of weight 0 is not read: it may be anything, nan included.
    """
    K, B, T = weight_KBT.shape
    sums, weights = np.zeros(K), np.zeros(K)
    for k, b, i in np.ndindex(K, B, T):
        weight = float(weight_KBT[k, b, i])
        if weight == 0.0:
            continue
        sums[k] += weight * values_KBT[k, b, i]
        weights[k] += weight
    return sums, weights


def numerical_gradient(f, x, step=1e-5):
    """Central differences (f(x + step e) - f(x - step e)) / (2 step) of a scalar f, in the shape of x.

    x itself is left as it was. For a smooth f of order 1 the error is about 1e-10.
    """
    x = np.asarray(x, np.float64)
    out = np.zeros(x.shape)
    for where in np.ndindex(*x.shape):
        above, below = x.copy(), x.copy()
        above[where] += step
        below[where] -= step
        out[where] = (f(above) - f(below)) / (2 * step)
    return out
