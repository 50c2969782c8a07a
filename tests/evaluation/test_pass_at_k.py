"""pass@k against every choice of k samples."""

import itertools
import math

import pytest

from mtp_jax.config import UserError
from mtp_jax.evaluation.pass_at_k import pass_at_k


@pytest.mark.parametrize("num_samples", range(1, 9))
def test_it_is_the_share_of_subsets_with_a_sample_that_passes(num_samples):
    for num_passed, k in itertools.product(range(num_samples + 1), range(1, num_samples + 1)):
        subsets = list(itertools.combinations([i < num_passed for i in range(num_samples)], k))
        expected = sum(map(any, subsets)) / len(subsets)
        assert pass_at_k(num_samples, num_passed, k) == pytest.approx(expected, abs=1e-12)


def test_large_numbers_neither_overflow_nor_cancel():
    n, c, k = 20_000, 3, 5_000
    expected = 1 - math.comb(n - c, k) / math.comb(n, k)
    assert pass_at_k(n, c, k) == pytest.approx(expected, rel=1e-9)
    assert pass_at_k(10**6, 1, 1) == pytest.approx(1e-6, rel=1e-9)


@pytest.mark.parametrize(("n", "c", "k"), [(1, 0, 2), (8, 3, 0), (8, 3, 9), (0, 0, 1), (4, 5, 1), (4, -1, 1)])
def test_what_cannot_be_drawn_is_an_error(n, c, k):
    with pytest.raises(UserError, match=f"pass@{k}: of {n} samples|num_passed={c}: of {n}"):
        pass_at_k(n, c, k)
