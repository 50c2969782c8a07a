"""pass@k: the probability that at least one of k samples passes, from n samples of which c did (2107.03374, eq. 1)."""

import math

from mtp_jax.config import UserError


def pass_at_k(num_samples: int, num_passed: int, k: int) -> float:
    """Returns 1 - C(n - c, k) / C(n, k), the unbiased estimate.

    Args:
      num_samples: n, samples of one problem.
      num_passed: c, those that passed.
      k: the k of pass@k.

    Raises:
      UserError: k is not between 1 and n, or c not between 0 and n.
    """
    if not 1 <= k <= num_samples:
        raise UserError(f"pass@{k}: of {num_samples} samples a problem; k must lie between 1 and the task's repeats")
    if not 0 <= num_passed <= num_samples:
        raise UserError(f"num_passed={num_passed}: of {num_samples} samples; count each sample once")
    subsets = math.comb(num_samples, k)
    return (subsets - math.comb(num_samples - num_passed, k)) / subsets
