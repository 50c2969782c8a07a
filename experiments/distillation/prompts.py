"""Writes prompts for distillation: beginnings and inner parts of the documents of a run.

python experiments/distillation/prompts.py --output=FOLDER [--config=WORKDIR/config.json]

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

PLACES = {"starts": 0.0, "inner": 0.5}  # share of the document before the prompt


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    flags.add_argument("--config", default=str(HERE / "config.py"), help="default: that of the experiment")
    flags.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    flags.add_argument("--num_train", type=int, default=160, help="prompts of each file from training documents")
    flags.add_argument("--num_held_out", type=int, default=32, help="and from documents that are held out")
    args = flags.parse_args()
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare(load_config(args.config))
    (part,) = corpus.sources
    for name, share in PLACES.items():
        lines = []
        for documents, num in ((part.train, args.num_train), (part.validation, args.num_held_out)):
            texts: dict[str, None] = {}
            for i in documents:
                ids = part.store.document(int(i))
                at = int(share * len(ids))
                if len(ids) > 4 * args.length and len(texts) < num:
                    texts[corpus.tokenizer.decode(ids[at : at + args.length])] = None
            lines += [json.dumps({"prompt": text}) + "\n" for text in texts]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{output / name}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    main()
