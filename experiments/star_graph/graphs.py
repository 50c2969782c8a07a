"""Star graphs as text: `python experiments/star_graph/graphs.py --output=DIR` writes train.jsonl.

A graph G(d, l) has d arms from one centre, each of l nodes including the centre. A text has the edges in random order,
the centre and the end of one arm, and after `=` the path between them (Bachmann and Nagarajan, 2403.06963, figure 1),
here of G(2, 3):

    BD|FA|AC|FB/FC=FAC

STAR_GRAPH=d,l,N in the environment selects another graph, with labels out of 0 .. N - 1 that are separated by spaces;
then tokenizer.json, with one token per label, is written too:

    4 17 | 80 3 | 3 52 | 80 4 / 80 52 = 80 3 52

The first node of the path is given. The second is the whole task, since all later nodes follow from the edges; a model
that only uses the edges of the centre is right once in d times.
"""

import argparse
import itertools
import json
import os
import pathlib
import random
from collections.abc import Iterator
from typing import Any

NUM_TEST, SEED = 500, 0
SETTING = os.environ.get("STAR_GRAPH")
NUM_ARMS, LENGTH, NUM_LABELS = map(int, (SETTING or "2,3,8").split(","))
LABELS = [str(i) for i in range(NUM_LABELS)] if SETTING else list("ABCDEFGH")
SEPARATOR = " " if SETTING else ""


def graph(draw: random.Random) -> tuple[str, str]:
    """Returns a question up to its `=`, and its path."""
    centre, *rest = draw.sample(LABELS, 1 + NUM_ARMS * (LENGTH - 1))
    arms = [[centre, *rest[i::NUM_ARMS]] for i in range(NUM_ARMS)]
    edges = [edge for arm in arms for edge in itertools.pairwise(arm)]
    draw.shuffle(edges)
    path = arms[0]  # labels are random, so any arm will do
    words = [word for edge in edges for word in ("|", *edge)][1:]
    return SEPARATOR.join([*words, "/", centre, path[-1], "="]), SEPARATOR.join(path)


def graphs() -> Iterator[tuple[str, str, bool]]:
    """Yields (question, path, is_test) without end: first the test questions, all different, then other questions."""
    draw, asked = random.Random(SEED), set()
    while True:
        question, path = graph(draw)
        if question not in asked:
            is_test = len(asked) < NUM_TEST
            if is_test:
                asked.add(question)
            yield question, path, is_test


def test_set(**_: Any) -> dict[str, Any]:
    """Returns the test set: `custom_dataset` of star_graph.yaml."""
    from mtp_jax.evaluation import benchmark_data

    held_out = itertools.islice(graphs(), NUM_TEST)
    return benchmark_data.dataset(test=[{"question": question, "path": path} for question, path, _ in held_out])


def write(folder: str, num_train: int) -> None:
    """Writes train.jsonl with the fields prompt and completion, without test questions; with spaces a tokenizer too."""
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    if SEPARATOR:
        from mtp_jax.data.tokenizer.word_level import word_level

        (target / "tokenizer.json").write_text(json.dumps(word_level(["|", "/", "=", *LABELS]), indent=1))
    with open(target / "train.jsonl", "w") as file:
        for question, path, _ in itertools.islice(graphs(), NUM_TEST, NUM_TEST + num_train):
            file.write(json.dumps({"prompt": question, "completion": SEPARATOR + path}) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", required=True)
    flags.add_argument("--num_train", type=int, default=100_000)
    args = flags.parse_args()
    write(args.output, args.num_train)


if __name__ == "__main__":
    main()
