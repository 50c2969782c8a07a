"""Star graphs as text: `python experiments/star_graph/graphs.py --output=DIR` writes train.jsonl.

A graph has two arms from one centre, each of three nodes including the centre. A text has the edges in random order,
the centre and the end of one arm, and after `=` the path between them (Bachmann and Nagarajan, 2403.06963, figure 1):

    BD|FA|AC|FB/FC=FAC

The first node of the path is given. The second is the whole task, since all later nodes follow from the edges; a model
that only uses the edges of the centre is right half of the time.
"""

import argparse
import itertools
import json
import pathlib
import random
from collections.abc import Iterator
from typing import Any

LABELS = "ABCDEFGH"
NUM_ARMS, LENGTH = 2, 3
NUM_TEST, SEED = 500, 0


def graph(draw: random.Random) -> tuple[str, str]:
    """Returns a question up to its `=`, and its path."""
    centre, *rest = draw.sample(LABELS, 1 + NUM_ARMS * (LENGTH - 1))
    arms = [[centre, *rest[i::NUM_ARMS]] for i in range(NUM_ARMS)]
    edges = [start + end for arm in arms for start, end in itertools.pairwise(arm)]
    draw.shuffle(edges)
    path = arms[0]  # labels are random, so any arm will do
    return f"{'|'.join(edges)}/{centre}{path[-1]}=", "".join(path)


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
    """Writes train.jsonl with the fields prompt and completion, without test questions."""
    target = pathlib.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    with open(target / "train.jsonl", "w") as file:
        for question, path, _ in itertools.islice(graphs(), NUM_TEST, NUM_TEST + num_train):
            file.write(json.dumps({"prompt": question, "completion": path}) + "\n")


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--output", required=True)
    flags.add_argument("--num_train", type=int, default=100_000)
    args = flags.parse_args()
    write(args.output, args.num_train)


if __name__ == "__main__":
    main()
