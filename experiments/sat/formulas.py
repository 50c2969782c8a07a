"""Satisfiable 3-SAT formulas as text: `python experiments/sat/formulas.py --output=DIR`.

Writes train.jsonl and tokenizer.json.

A literal is a letter: `A` is true where variable a is true, `a` where it is false. A clause is three literals of
different variables, of which one must be true; it is one token. A text has the clauses in random order and, after `=`,
an assignment as the literals that it makes true, in the order of the variables:

    aCd BDe abE ... =A b C d E

So an assignment satisfies a formula if it shares a literal with every clause. The assignment is one of all that do,
drawn uniformly. The first literals are the whole task: once most variables are fixed, the clauses imply the others.
"""

import argparse
import functools
import itertools
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

NUM_VARIABLES, NUM_CLAUSES = 6, 25
NUM_TEST, SEED = 500, 0
VARIABLES = "abcdefgh"


@functools.cache
def clauses(num_variables: int) -> list[str]:
    """Returns all clauses of three different variables, in the order of the variables."""
    signs = list(itertools.product((str.lower, str.upper), repeat=3))
    triples = itertools.combinations(VARIABLES[:num_variables], 3)
    return ["".join(f(v) for f, v in zip(sign, triple, strict=True)) for triple in triples for sign in signs]


@functools.cache
def satisfied(num_variables: int) -> tuple[dict[str, int], list[str]]:
    """Returns ({clause: bits of the assignments that satisfy it}, the assignments in the order of the bits)."""
    pairs = [(v, v.upper()) for v in VARIABLES[:num_variables]]
    assignments = [" ".join(literals) for literals in itertools.product(*pairs)]
    found = {
        clause: sum(1 << i for i, assignment in enumerate(assignments) if set(clause) & set(assignment))
        for clause in clauses(num_variables)
    }
    return found, assignments


def formula(draw: random.Random, num_variables: int, num_clauses: int) -> tuple[str, str]:
    """Returns a satisfiable formula up to its `=`, and an assignment that satisfies it."""
    bits, assignments = satisfied(num_variables)
    while True:
        chosen = draw.sample(clauses(num_variables), num_clauses)
        solutions = functools.reduce(int.__and__, (bits[clause] for clause in chosen))
        if solutions:
            places = [i for i in range(len(assignments)) if solutions >> i & 1]
            return f"{' '.join(chosen)} =", assignments[draw.choice(places)]


def formulas(num_variables: int = NUM_VARIABLES, num_clauses: int = NUM_CLAUSES) -> Iterator[tuple[str, str, bool]]:
    """Yields (question, assignment, is_test) without end: first the test formulas, all different, then others.

    Two formulas are different if their sets of clauses are.
    """
    draw, asked = random.Random(SEED), set()
    while True:
        question, assignment = formula(draw, num_variables, num_clauses)
        key = frozenset(question.split())
        if key not in asked:
            is_test = len(asked) < NUM_TEST
            if is_test:
                asked.add(key)
            yield question, assignment, is_test


def is_satisfied(question: str, answer: str) -> bool:
    """Returns whether an answer assigns every variable of the formula once, in order, and satisfies every clause."""
    given = question.removesuffix("=").split()
    variables = sorted({literal.lower() for clause in given for literal in clause})
    literals = answer.split()
    is_assignment = [literal.lower() for literal in literals] == variables
    return is_assignment and all(set(clause) & set(literals) for clause in given)


def score(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Returns the score of an answer: `process_results` of sat.yaml."""
    return {"satisfied": float(is_satisfied(doc["question"], results[0]))}


def test_set(**settings: Any) -> dict[str, Any]:
    """Returns the test set: `custom_dataset` of sat.yaml. settings: num_variables and num_clauses, where given."""
    from mtp_jax.evaluation import benchmark_data

    sizes = {name: settings[name] for name in ("num_variables", "num_clauses") if name in settings}
    held_out = itertools.islice(formulas(**sizes), NUM_TEST)
    return benchmark_data.dataset(test=[{"question": question, "answer": answer} for question, answer, _ in held_out])


def tokenizer(num_variables: int) -> dict[str, Any]:
    """Returns a tokenizer.json with one token per clause, per literal, and for `=`."""
    from mtp_jax.data.tokenizer.word_level import word_level

    literals = [literal for v in VARIABLES[:num_variables] for literal in (v, v.upper())]
    return word_level(["=", *literals, *clauses(num_variables)])


def write(folder: str, num_train: int, num_variables: int, num_clauses: int) -> None:
    """Writes train.jsonl with the fields prompt and completion, without test formulas, and tokenizer.json."""
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer(num_variables), indent=1))
    found = formulas(num_variables, num_clauses)
    with open(target / "train.jsonl", "w") as file:
        for question, answer, _ in itertools.islice(found, NUM_TEST, NUM_TEST + num_train):
            file.write(json.dumps({"prompt": question, "completion": f" {answer}"}) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", required=True)
    flags.add_argument("--num_train", type=int, default=100_000)
    flags.add_argument("--num_variables", type=int, default=NUM_VARIABLES)
    flags.add_argument("--num_clauses", type=int, default=NUM_CLAUSES)
    args = flags.parse_args()
    write(args.output, args.num_train, args.num_variables, args.num_clauses)


if __name__ == "__main__":
    main()
