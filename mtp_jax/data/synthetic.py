"""Synthetic documents: short texts whose tokens depend on each other at every distance."""

import random
from collections.abc import Iterator


def synthetic_documents(num_documents: int, seed: int) -> Iterator[str]:
    """Yields short texts with dependencies at every distance: sums, copies, reversals, counting, repeated words."""
    kinds = (_sums, _copies, _reversals, _counting, _refrain)
    for i in range(num_documents):
        rng = random.Random(f"{seed}/{i}")
        yield kinds[rng.randrange(len(kinds))](rng)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 8)))


def _sums(rng: random.Random) -> str:
    pairs = [(rng.randint(0, 99), rng.randint(0, 99)) for _ in range(rng.randint(4, 24))]
    return "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


def _copies(rng: random.Random) -> str:
    words = [_word(rng) for _ in range(rng.randint(4, 24))]
    return "".join(f"copy {w}: {w}\n" for w in words)


def _reversals(rng: random.Random) -> str:
    words = [_word(rng) for _ in range(rng.randint(4, 24))]
    return "".join(f"reverse {w}: {w[::-1]}\n" for w in words)


def _counting(rng: random.Random) -> str:
    start, step = rng.randint(0, 99), rng.randint(1, 9)
    return "count: " + " ".join(str(start + step * i) for i in range(rng.randint(8, 48))) + "\n"


def _refrain(rng: random.Random) -> str:
    line = " ".join(_word(rng) for _ in range(rng.randint(2, 6)))
    return f"{line}\n" * rng.randint(3, 12)
