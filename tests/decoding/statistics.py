"""Tests of goodness of fit between counts and probabilities."""

import numpy as np
from scipy.stats import chi2  # jax itself needs scipy

LIKELY = 1e-3  # a right distribution fails one seed in a thousand; seeds are fixed


def p_value(counts, probs):
    """Chi-square: how likely counts at least so far from `probs` are. 0 where something impossible was seen.

    Outcomes expected less than five times are one.
    """
    counts, probs = np.asarray(counts, float).ravel(), np.asarray(probs, float).ravel()
    assert abs(probs.sum() - 1) < 1e-5
    if counts[probs == 0].any():
        return 0.0
    expected = probs * counts.sum()
    rare = expected < 5
    observed, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    observed, expected = observed[expected > 0], expected[expected > 0]
    if len(expected) == 1:
        return 1.0
    return float(chi2.sf(((observed - expected) ** 2 / expected).sum(), len(expected) - 1))


def count_rows(rows, num_values):
    """Counts of each tuple of values: int[V, ..., V] of int[N, places]."""
    rows = np.asarray(rows)
    shape = (num_values,) * rows.shape[1]
    return np.bincount(np.ravel_multi_index(rows.T, shape), minlength=num_values ** rows.shape[1]).reshape(shape)
