"""Children's stories from templates, with names of two tokens: `python experiments/induction/stories.py --output=DIR`.

Writes train.jsonl and tokenizer.json; sentences and words are those of templates.json.

A story is about two characters, each named by two tokens drawn at random, as `ka dor`, and mentioned several times:

    once there was a small bear called ka dor . ka dor lived near the river with mi lan . ...

The first token of a later mention depends on the story, the second can only be copied from the earlier mentions
(Gloeckle et al., 2404.19737, section 4.1). The names of the test stories occur in no training story.
"""

import argparse
import functools
import itertools
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

CONSONANTS, VOWELS, ENDS = "bdfgklmnprstvwyz", "aeiu", "lmnr"
FIRST = [c + v for c in CONSONANTS for v in VOWELS]  # 64 first tokens of names
SECOND = [c + v + e for c in CONSONANTS[::2] for v in "ao" for e in ENDS]  # 64 second tokens, all different from FIRST
TEMPLATES = json.loads((pathlib.Path(__file__).parent / "templates.json").read_text())
SLOTS = {slot: TEMPLATES[slot].split() for slot in ("look", "animal", "place", "thing", "act")}
NUM_MIDDLE = 5
NUM_TEST, SEED = 500, 0
Name = tuple[str, str]


@functools.cache
def names() -> tuple[list[Name], list[Name]]:
    """Returns the names of training and of test stories: nine and one of every ten pairs of tokens."""
    pairs = list(itertools.product(FIRST, SECOND))
    random.Random(SEED).shuffle(pairs)
    num_test = len(pairs) // 10
    return pairs[num_test:], pairs[:num_test]


def story(draw: random.Random, given: list[Name]) -> tuple[list[str], tuple[Name, Name]]:
    """Returns the words of a story, and the names of its characters, whose tokens are all different."""
    a, b = draw.choice(given), draw.choice(given)
    while a[0] == b[0] or a[1] == b[1]:
        b = draw.choice(given)
    sentences = ("opening", "meeting", *["middle"] * NUM_MIDDLE)
    templates = [draw.choice(TEMPLATES[sentence]) for sentence in sentences]
    words: list[str] = []
    for i, template in enumerate(templates):
        first, second = (a, b) if i < 2 or draw.random() < 0.5 else (b, a)
        chosen = {slot: draw.choice(options) for slot, options in SLOTS.items()}
        filled = template.format(a=" ".join(first), b=" ".join(second), **chosen)
        words += filled.split()
    return words, (a, b)


def question(draw: random.Random) -> tuple[str, str]:
    """Returns a test story up to the first token of a name that has been mentioned before, and its second token."""
    while True:
        words, characters = story(draw, names()[1])
        starts = {first for first, _ in characters}
        seen: set[str] = set()
        later = []
        for i, word in enumerate(words):
            if word in starts and word in seen:
                later.append(i)
            seen.add(word)
        if later:
            i = draw.choice(later)
            return " ".join(words[: i + 1]), words[i + 1]


def score(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Returns whether the first token of an answer is right: `process_results` of induction.yaml."""
    return {"second_token": float(results[0].split()[:1] == [doc["answer"]])}


def test_set(**_: Any) -> dict[str, Any]:
    """Returns the test set: `custom_dataset` of induction.yaml."""
    from mtp_jax.evaluation import benchmark_data

    draw = random.Random(f"{SEED}/test")
    return benchmark_data.dataset(
        test=[{"question": text, "answer": answer} for text, answer in (question(draw) for _ in range(NUM_TEST))]
    )


def texts() -> Iterator[str]:
    """Yields training stories without end."""
    draw = random.Random(SEED)
    while True:
        yield " ".join(story(draw, names()[0])[0])


def tokenizer() -> dict[str, Any]:
    """Returns a tokenizer.json with one token per word and per token of a name."""
    from mtp_jax.data.tokenizer.word_level import word_level

    sentences = [*TEMPLATES["opening"], *TEMPLATES["meeting"], *TEMPLATES["middle"]]
    fixed = {word for sentence in sentences for word in sentence.split() if "{" not in word}
    return word_level([*FIRST, *SECOND, *sorted(fixed.union(*SLOTS.values()))])


def write(folder: str, num_train: int) -> None:
    """Writes train.jsonl with the field text, and tokenizer.json."""
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / "tokenizer.json").write_text(json.dumps(tokenizer(), indent=1))
    with open(target / "train.jsonl", "w") as file:
        for text in itertools.islice(texts(), num_train):
            file.write(json.dumps({"text": text}) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", required=True)
    flags.add_argument("--num_train", type=int, default=20_000)
    args = flags.parse_args()
    write(args.output, args.num_train)


if __name__ == "__main__":
    main()
