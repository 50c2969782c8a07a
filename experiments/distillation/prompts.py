"""Writes the prompts of the distillation experiment: beginnings and inner parts of Python files.

python experiments/distillation/prompts.py --output=FOLDER

The last prompts of each file are of documents that the model was not trained on.
"""

import argparse
import json
import pathlib
import sys

HERE = pathlib.Path(__file__).resolve().parent
if __package__ in (None, ""):
    sys.path.insert(0, str(HERE.parent.parent))

from mtp_jax.config import load_config  # noqa: E402
from mtp_jax.data import prepare  # noqa: E402

LENGTH = 64  # bytes of a prompt
NUM_TRAIN, NUM_HELD_OUT = 160, 32  # prompts of each file
PLACES = {"starts": 0.0, "inner": 0.5}  # share of the document before the prompt


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    output = flags.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare(load_config(str(HERE / "config.py")))
    (part,) = corpus.sources
    for name, share in PLACES.items():
        lines = []
        for documents, num in ((part.train, NUM_TRAIN), (part.validation, NUM_HELD_OUT)):
            texts: dict[str, None] = {}
            for i in documents:
                ids = part.store.document(int(i))
                at = int(share * len(ids))
                if len(ids) > 4 * LENGTH and len(texts) < num:
                    texts[corpus.tokenizer.decode(ids[at : at + LENGTH])] = None
            lines += [json.dumps({"prompt": text}) + "\n" for text in texts]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{output / name}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    main()
