"""Polynomial arithmetic in F_p[X]/(X^d) as text: `python experiments/polynomials/expressions.py --output=DIR`.

Writes train.jsonl.

A polynomial is d symbols, its coefficients from the constant term on, and each power has symbols of its own: 0 and 1,
then 2 for 0 X and 3 for X in F_2[X]/(X^2). An expression has m operations in postfix notation: `-` negates, `+` adds,
`*` multiplies, `@` inserts its second operand into its first. After `=` a text has the coefficients of the result, as
for (1 + X) * -X:

    1303-*=03

Operations and coefficients are drawn uniformly, m uniformly from 1 to 5 in training. Test expressions have up to 8
operations (Gloeckle et al., 2404.19737, section 4.2, with F_7[X]/(X^5)). SIZE=gpu in the environment selects that ring,
default is the smaller one of SIZES.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
import string
from collections.abc import Callable, Iterator
from typing import Any

Polynomial = tuple[int, ...]

SIZES = {"cpu": (2, 2), "gpu": (7, 5)}  # p and d
PRIME, DEGREE = SIZES[os.environ.get("SIZE", "cpu")]
MAX_TRAINED, MAX_TESTED = 5, 8  # operations
NUM_TEST, SEED = 200, 0  # test expressions for each number of operations


def negate(a: Polynomial) -> Polynomial:
    return tuple(-c % PRIME for c in a)


def add(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple((c + e) % PRIME for c, e in zip(a, b, strict=True))


def multiply(a: Polynomial, b: Polynomial) -> Polynomial:
    return tuple(sum(a[i] * b[k - i] for i in range(k + 1)) % PRIME for k in range(DEGREE))


def compose(a: Polynomial, b: Polynomial) -> Polynomial:
    """Returns a(b(X)) modulo X^d, by Horner's rule."""
    result: Polynomial = (0,) * DEGREE
    for c in reversed(a):
        result = add(multiply(result, b), (c, *[0] * (DEGREE - 1)))
    return result


BINARY: dict[str, Callable[[Polynomial, Polynomial], Polynomial]] = {"+": add, "*": multiply, "@": compose}
OPERATIONS = ("-", *BINARY)
SYMBOLS = string.digits + string.ascii_lowercase


def text_of(a: Polynomial) -> str:
    return "".join(SYMBOLS[k * PRIME + c] for k, c in enumerate(a))


def expression(draw: random.Random, num_operations: int) -> tuple[str, Polynomial]:
    """Returns an expression and its value; the operations of the operands of a binary one are split uniformly."""
    if not num_operations:
        a = tuple(draw.randrange(PRIME) for _ in range(DEGREE))
        return text_of(a), a
    sign = draw.choice(OPERATIONS)
    if sign == "-":
        text, a = expression(draw, num_operations - 1)
        return f"{text}-", negate(a)
    num_left = draw.randrange(num_operations)
    left, a = expression(draw, num_left)
    right, b = expression(draw, num_operations - 1 - num_left)
    return f"{left}{right}{sign}", BINARY[sign](a, b)


def held_out(num_operations: int) -> list[tuple[str, str]]:
    """Returns the test set of a number of operations: (question, answer).

    Those of one operation may be equal, and are in the training data: there are only 52 in F_2[X]/(X^2).
    """
    draw, found = random.Random(f"{SEED}/test/{num_operations}"), []
    while len(found) < NUM_TEST:
        text, value = expression(draw, num_operations)
        pair = (f"{text}=", text_of(value))
        if num_operations == 1 or pair not in found:
            found.append(pair)
    return found


def examples() -> Iterator[tuple[str, str]]:
    """Yields (question, answer) for training without end, without the test questions of two and more operations."""
    draw = random.Random(SEED)
    tested = {question for m in range(2, MAX_TRAINED + 1) for question, _ in held_out(m)}
    while True:
        text, value = expression(draw, draw.randint(1, MAX_TRAINED))
        if f"{text}=" not in tested:
            yield f"{text}=", text_of(value)


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Returns whether the first d digits are right, for all and for this number of operations: `process_results`."""
    is_right = float(results[0][:DEGREE] == doc["answer"])
    return {"exact": is_right, f"exact_{doc['num_operations']}": is_right}


def test_set(first: int, last: int, **_: Any) -> dict[str, Any]:
    """Returns the test set with first to last operations: `custom_dataset` of the tasks."""
    from mtp_jax.evaluation import benchmark_data

    rows = [
        {"question": question, "answer": answer, "num_operations": m}
        for m in range(first, last + 1)
        for question, answer in held_out(m)
    ]
    return benchmark_data.dataset(test=rows)


def write(folder: str, num_train: int) -> None:
    """Writes train.jsonl with the fields prompt and completion."""
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "train.jsonl", "w") as file:
        for question, answer in itertools.islice(examples(), num_train):
            file.write(json.dumps({"prompt": question, "completion": answer}) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", required=True)
    flags.add_argument("--num_train", type=int, default=200_000)
    args = flags.parse_args()
    write(args.output, args.num_train)


if __name__ == "__main__":
    main()
