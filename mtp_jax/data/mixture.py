"""Order in which the rows of several sources are drawn.

For every n, the first n rows have n w_i / sum_j w_j rows of source i, to within the number of sources: the order is
even rather than random. It is a pure function of the weights, without state. (grain's own mixture rounds proportions to
1 in 100 of the smallest, so that weights 0.3 and 0.7 become 100 and 233.)
"""

import bisect
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple


class _Phase(NamedTuple):
    """Rows from `start` on, until the next source has reached its limit.

    used: rows drawn from each source before. sources, weights: those still drawn from, with integer weights.
    """

    start: int
    used: tuple[int, ...]
    sources: tuple[int, ...]
    weights: tuple[int, ...]


class Mixture:
    """Assignment of row n = 0, 1, 2 .. to a source and to a row of that source.

    A source leaves the mixture when its limit is reached; the others keep their proportions.

    Attributes:
      num_rows: number of rows until every source has reached its limit; None: endless.
    """

    def __init__(self, weights: Sequence[float], limits: Sequence[int | None]):
        """Mixture of sources.

        Args:
          weights: the relative share of each source, positive; exact as decimal fractions.
          limits: number of rows that may be drawn from each source, at least 1; None: any number.
        """
        exact = [Fraction(str(weight)) for weight in weights]
        scale = math.lcm(*(each.denominator for each in exact))
        whole = [int(each * scale) for each in exact]
        start, used, left = 0, [0] * len(whole), list(range(len(whole)))
        self._phases: list[_Phase] = []
        while left:
            phase = _Phase(start, tuple(used), tuple(left), tuple(whole[i] for i in left))
            self._phases.append(phase)
            length = _length(phase, limits)
            if length is None:
                break
            start += length
            for i, count in zip(left, _counts(length, phase.weights), strict=True):
                used[i] += count
            left = [i for i in left if used[i] != limits[i]]
        self.num_rows: int | None = None if left else start

    def __getitem__(self, n: int) -> tuple[int, int]:
        """Returns the source of row n, and the number of rows that were drawn from it before."""
        if n < 0 or (self.num_rows is not None and n >= self.num_rows):
            raise IndexError(f"row {n} of {self.num_rows}")
        phase = self._phase(n)
        before, after = (_counts(n - phase.start + i, phase.weights) for i in (0, 1))
        chosen = next(i for i, (a, b) in enumerate(zip(before, after, strict=True)) if b > a)
        source = phase.sources[chosen]
        return source, phase.used[source] + before[chosen]

    def counts(self, n: int) -> list[int]:
        """Returns the number of rows of each source among the first n."""
        n = n if self.num_rows is None else min(n, self.num_rows)
        phase = self._phase(n)
        out = list(phase.used)
        for source, count in zip(phase.sources, _counts(n - phase.start, phase.weights), strict=True):
            out[source] += count
        return out

    def _phase(self, n: int) -> _Phase:
        return self._phases[bisect.bisect_right(self._phases, n, key=lambda phase: phase.start) - 1]


def _counts(n: int, weights: Sequence[int]) -> list[int]:
    """Returns the number of rows of each source among the first n; the sum is n and each is monotone in n.

    The first source gets n w_0 / (w_0 + w_1 + ..), rounded; the others share the rest in the same way.
    """
    out, total = [], sum(weights)
    for weight in weights:
        count = (2 * n * weight + total) // (2 * total)
        out.append(count)
        n, total = n - count, total - weight
    return out


def _length(phase: _Phase, limits: Sequence[int | None]) -> int | None:
    """Returns the number of rows after which the first source of a phase reaches its limit; None: none does."""
    lengths = []
    for at, source in enumerate(phase.sources):
        limit = limits[source]
        if limit is not None:
            wanted = limit - phase.used[source]
            lengths.append(bisect.bisect_left(_CountsOf(phase.weights, at), wanted))
    return min(lengths, default=None)


class _CountsOf(Sequence[int]):
    """The counts of one source for n = 0, 1, 2 .., for bisection."""

    def __init__(self, weights: Sequence[int], at: int):
        self._weights, self._at = weights, at

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, n):  # int -> int
        return _counts(n, self._weights)[self._at]
