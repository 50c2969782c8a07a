"""Writes prompts for distillation: beginnings and inner parts of the documents of a run.

python experiments/distillation/prompts.py --output=FOLDER [--config=WORKDIR/config.json]

The last prompts of each file are of documents that the model was not trained on.
"""

import argparse
import json
import pathlib
import sys

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
if __package__ in (None, ""):
    sys.path.insert(0, str(HERE.parent.parent))

from mtp_jax import storage  # noqa: E402
from mtp_jax.config import load_config  # noqa: E402
from mtp_jax.data import prepare  # noqa: E402


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    flags.add_argument("--config", default=str(HERE / "config.py"), help="default: that of the experiment")
    flags.add_argument("--length", type=int, default=64, help="tokens of a prompt")
    flags.add_argument("--inner", default="0.5", help="shares of the document before its inner prompts")
    flags.add_argument("--num_train", type=int, default=160, help="prompts of each file from training documents")
    flags.add_argument("--num_held_out", type=int, default=32, help="and from documents that are held out")
    flags.add_argument("--unseen", action="store_true", help="without the latter that a training document has too")
    args = flags.parse_args()
    output = args.output
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare(load_config(args.config))
    (part,) = corpus.sources
    trained = b""
    if args.unseen:
        trained = np.concatenate([part.store.document(int(i)) for i in part.train]).tobytes()
    inner = [float(share) for share in args.inner.split(",")]
    for name, shares in {"starts": [0.0], "inner": inner}.items():
        lines = []
        for documents, num, unseen in (
            (part.train, args.num_train, b""),
            (part.validation, args.num_held_out, trained),
        ):
            texts: dict[str, None] = {}
            for i in documents:
                ids = part.store.document(int(i))
                for share in shares if len(ids) > 4 * args.length else []:
                    prompt = ids[int(share * len(ids)) :][: args.length]
                    if len(texts) < num and prompt.tobytes() not in unseen:
                        texts[corpus.tokenizer.decode(prompt)] = None
            lines += [json.dumps({"prompt": text}) + "\n" for text in texts]
        storage.write_text(output / f"{name}.jsonl", "".join(lines))
        print(f"{output / name}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    main()
