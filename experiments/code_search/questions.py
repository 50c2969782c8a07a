"""Questions about held-out code: `python experiments/code_search/questions.py --config=CONFIG --output=DIR`.

Writes two files of questions, each from documents that the model of CONFIG is not trained on:

* next_line.jsonl: a part of a file up to the indentation of a line; the answer is the line.
* identifier.jsonl: a part of a file up to an identifier of at least eight characters that occurs earlier in that part;
  the answer is the identifier. A model that reads the part can copy it.

The last space of the indentation belongs to the answer, as tokenizers join it with the word.
"""

import argparse
import json
import os
import pathlib
import random
import re
from collections.abc import Iterator
from typing import Any

NUM_QUESTIONS, SEED = 500, 0
PER_DOCUMENT = 8  # at most, of each kind
CONTEXT = 800  # characters before the answer
LINE = re.compile(r"(?<=\n) {3,}( \S[^\n]{9,59})(?=\n)")
IDENTIFIER = re.compile(r"(?<!\w) ?([A-Za-z_]\w{7,})")


def next_lines(text: str, draw: random.Random) -> Iterator[dict[str, str]]:
    """Yields the lines of a text that can be asked for, in random order."""
    found = [match for match in LINE.finditer(text) if match.start() >= CONTEXT and "#" not in match[1]]
    for match in draw.sample(found, len(found)):
        at = match.start(1)
        yield {"question": text[at - CONTEXT : at], "answer": match[1]}


def identifiers(text: str, draw: random.Random) -> Iterator[dict[str, str]]:
    """Yields the identifiers of a text that occur in the context before them, in random order."""
    found = [match for match in IDENTIFIER.finditer(text) if match.start() >= CONTEXT]
    for match in draw.sample(found, len(found)):
        question = text[match.start() - CONTEXT : match.start()]
        if re.search(rf"\b{match[1]}\b", question):
            yield {"question": question, "answer": match[0]}


def score_line(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Returns 1 where the line is right, but for the spaces around it: `process_results` of next_line.yaml."""
    return {"exact": float(results[0].strip() == doc["answer"].strip())}


def score_identifier(doc: dict[str, str], results: list[str]) -> dict[str, float]:
    """Returns 1 where the text begins with the identifier: `process_results` of identifier.yaml."""
    word = re.match(r"\s*(\w+)", results[0])
    return {"exact": float(word is not None and word[1] == doc["answer"].strip())}


def test_set(*, name: str, **_: Any) -> dict[str, Any]:
    """Returns the questions of a file in $CODE_QUESTIONS: `custom_dataset` of the tasks."""
    from mtp_jax.evaluation import benchmark_data

    path = pathlib.Path(os.environ["CODE_QUESTIONS"]) / f"{name}.jsonl"
    return benchmark_data.dataset(test=[json.loads(line) for line in path.read_text().splitlines()])


def write(config: Any, folder: pathlib.Path) -> None:
    """Writes both files."""
    from mtp_jax.data import prepare

    corpus = prepare(config)
    (part,) = corpus.sources
    texts = [corpus.tokenizer.decode(part.store.document(int(i))) for i in part.validation]
    folder.mkdir(parents=True, exist_ok=True)
    for name, kind in {"next_line": next_lines, "identifier": identifiers}.items():
        draw, rows = random.Random(SEED), {}
        for text in draw.sample(texts, len(texts)):
            for row, _ in zip(kind(text, draw), range(PER_DOCUMENT), strict=False):
                rows[row["question"]] = row
        kept = list(rows.values())[:NUM_QUESTIONS]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
        print(f"{folder / name}.jsonl: {len(kept)} questions")


def main() -> None:
    from mtp_jax.config import load_config

    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", required=True)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    args, overrides = flags.parse_known_args()
    write(load_config(args.config, overrides), args.output)


if __name__ == "__main__":
    main()
