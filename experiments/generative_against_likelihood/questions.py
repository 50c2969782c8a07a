"""Questions of four families: `python experiments/generative_against_likelihood/questions.py --output=DIR`.

Writes train.jsonl (questions with their answers), facts.jsonl (statements of a generated knowledge base) and
tokenizer.json (a token per word, syllable, letter and digit). Test questions are held out, each with three
wrong options:

    copy      copy b d d a c a b e = e b a c a d d b    the letters, in reverse order
    sum       sum 3 7 + 4 8 = 8 5                       arithmetic
    lookup    lookup f a b k g e j d i h l c = k g e    the letters after a key
    fact      fact ta mo pet = grey newt                a fact of the knowledge base

The statements name every fact in other words ("pet of ta mo : grey newt ."). Half of the people are asked about in
training, the others only in the test: closed-book questions whose answers occur in training, but not as answers.
The variable SIZE, cpu or gpu, sets the difficulty.
"""

import argparse
import functools
import itertools
import json
import os
import pathlib
import random
from collections.abc import Iterator
from typing import Any, NamedTuple

FAMILIES = ("copy", "sum", "lookup", "fact")
TURNS = ("copy", "lookup", "sum", "lookup", "fact", "lookup", "sum")  # families of training questions, in turn
NUM_TEST, SEED = 250, 0
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SYLLABLES = [a + b for a, b in itertools.product("bdfklmnprstvz", "aeiou")]
VALUES = {  # a value is one word of each list
    "food": ("sweet sour hot cold dried".split(), "rice bread soup olives noodles".split()),
    "pet": ("grey brown old young wild".split(), "newt horse parrot crab yak".split()),
}
STATEMENTS = ("{name} {attribute} : {value} .", "{attribute} of {name} : {value} .", "{name} has {attribute} {value} .")


class Size(NamedTuple):
    """Difficulty of the questions: numbers of letters to copy, upper bounds of summands, pairs in a lookup, people."""

    copied: tuple[int, int]
    summands: tuple[int, int]
    num_pairs: int
    num_people: int


SIZES = {"cpu": Size((6, 14), (99, 99), 4, 600), "gpu": Size((10, 24), (9999, 9999), 8, 4000)}
SIZE = SIZES[os.environ.get("SIZE", "cpu")]


class Question(NamedTuple):
    """A question, its answer, and three wrong options."""

    text: str
    answer: str
    wrong: tuple[str, ...]


def copy(draw: random.Random) -> Question:
    """Returns letters to copy in reverse order; options have one letter replaced or dropped, or two exchanged."""
    letters = draw.choices(LETTERS[:6], k=draw.randint(*SIZE.copied))
    word = "".join(reversed(letters))
    wrong: set[str] = set()
    while len(wrong) < 3:
        i = draw.randrange(len(word) - 1)
        letter = draw.choice(LETTERS[:6])
        changed = [
            word[:i] + letter + word[i + 1 :],
            word[:i] + word[i + 1 :],
            word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        ][draw.randrange(3)]
        if not word.startswith(changed):  # a beginning of the word is never less likely than the word
            wrong.add(changed)
    return Question(f"copy {' '.join(letters)} =", " ".join(word), tuple(" ".join(each) for each in sorted(wrong)))


def sum_(draw: random.Random) -> Question:
    """Returns the sum of two numbers; options are off in one digit or in both."""
    a, b = draw.randint(20, SIZE.summands[0]), draw.randint(2, SIZE.summands[1])
    near = [a + b + d for d in (-20, -11, -10, -9, -2, -1, 1, 2, 9, 10, 11, 20)]
    a_, b_, answer, *wrong = (" ".join(str(number)) for number in (a, b, a + b, *draw.sample(near, 3)))
    return Question(f"sum {a_} + {b_} =", answer, tuple(wrong))


def lookup(draw: random.Random) -> Question:
    """Returns the two letters after a key; options are those after other keys. All letters are different."""
    n = SIZE.num_pairs
    letters = draw.sample(LETTERS[: 3 * n], 3 * n)
    keys, values = letters[:n], [f"{a} {b}" for a, b in zip(letters[n : 2 * n], letters[2 * n :], strict=True)]
    i = draw.randrange(n)
    pairs = " ".join(f"{key} {value}" for key, value in zip(keys, values, strict=True))
    return Question(f"lookup {pairs} = {keys[i]}", values[i], tuple(draw.sample(values[:i] + values[i + 1 :], 3)))


@functools.cache
def knowledge_base() -> dict[str, dict[str, str]]:
    """Returns the attributes of every person, {name: {attribute: value}}; the first half is asked about in the test."""
    draw = random.Random(SEED)
    names = draw.sample([f"{a} {b}" for a, b in itertools.product(SYLLABLES, SYLLABLES)], SIZE.num_people)
    return {
        name: {key: " ".join(draw.choice(words) for words in lists) for key, lists in VALUES.items()} for name in names
    }


def facts(is_test: bool) -> list[tuple[str, str, str]]:
    """Returns (name, attribute, value) of the people that test questions are about, or of the others."""
    people = list(knowledge_base().items())
    chosen = people[: SIZE.num_people // 2] if is_test else people[SIZE.num_people // 2 :]
    return [(name, key, value) for name, values in chosen for key, value in values.items()]


def fact(draw: random.Random, name: str, attribute: str, value: str) -> Question:
    """Returns the question for a fact; options are other values of the same attribute."""
    others = [" ".join(words) for words in itertools.product(*VALUES[attribute])]
    others.remove(value)
    return Question(f"fact {name} {attribute} =", value, tuple(draw.sample(others, 3)))


GENERATED = {"copy": copy, "sum": sum_, "lookup": lookup}


@functools.cache
def test_questions(family: str) -> list[Question]:
    """Returns the test questions of a family, all different."""
    draw = random.Random(f"{SEED} test {family}")
    if family == "fact":
        chosen = draw.sample(facts(is_test=True), NUM_TEST)
        return [fact(draw, *each) for each in chosen]
    found: dict[str, Question] = {}
    while len(found) < NUM_TEST:
        question = GENERATED[family](draw)
        found.setdefault(question.text, question)
    return list(found.values())


def train_questions() -> Iterator[Question]:
    """Yields training questions without end, of each family in turn, none of which is a test question."""
    held_out = {question.text for family in FAMILIES for question in test_questions(family)}
    draw, asked = random.Random(f"{SEED} train"), facts(is_test=False)
    for family in itertools.cycle(TURNS):
        question = fact(draw, *draw.choice(asked)) if family == "fact" else GENERATED[family](draw)
        while question.text in held_out:
            question = GENERATED[family](draw)
        yield question


def statements() -> Iterator[str]:
    """Yields statements of all facts without end: all of them in random order, then again."""
    draw, known = random.Random(f"{SEED} facts"), facts(is_test=True) + facts(is_test=False)
    while True:
        draw.shuffle(known)
        for name, attribute, value in known:
            yield draw.choice(STATEMENTS).format(name=name, attribute=attribute, value=value)


def test_set(*, family: str, **_: Any) -> dict[str, Any]:
    """Returns the test set of a family: `custom_dataset` of the tasks. The options are in the order of the alphabet."""
    from mtp_jax.evaluation import benchmark_data

    rows = []
    for text, answer, wrong in test_questions(family):
        options = sorted([answer, *wrong])
        rows.append({"question": text, "answer": answer, "options": options, "place": options.index(answer)})
    return benchmark_data.dataset(test=rows)


def tokenizer() -> dict[str, Any]:
    """Returns a tokenizer.json with one token per word, syllable, letter, digit and mark."""
    from mtp_jax.data.tokenizer.word_level import word_level

    words = [*"=+:.", "of", "has", *FAMILIES, *LETTERS, *"0123456789", *VALUES, *SYLLABLES]
    return word_level([*words, *(word for lists in VALUES.values() for each in lists for word in each)])


def write(folder: str, num_questions: int, num_statements: int) -> None:
    """Writes train.jsonl with the fields prompt and completion, facts.jsonl with the field text, and tokenizer.json."""
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer(), indent=1))
    with open(target / "train.jsonl", "w") as file:
        for question in itertools.islice(train_questions(), num_questions):
            file.write(json.dumps({"prompt": question.text, "completion": f" {question.answer}"}) + "\n")
    with open(target / "facts.jsonl", "w") as file:
        for text in itertools.islice(statements(), num_statements):
            file.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", required=True)
    flags.add_argument("--num_questions", type=int, default=60_000)
    flags.add_argument("--num_statements", type=int, default=30_000)
    args = flags.parse_args()
    write(args.output, args.num_questions, args.num_statements)


if __name__ == "__main__":
    main()
