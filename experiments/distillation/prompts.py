"""Writes the prompts of the distillation experiment: beginnings and inner parts of Python files that are held out.

python experiments/distillation/prompts.py --output=FOLDER
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

LENGTH, NUM_EACH = 64, 160  # bytes of a prompt, prompts of each file


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    output = flags.parse_args().output
    output.mkdir(parents=True, exist_ok=True)
    corpus = prepare(load_config(str(HERE / "config.py")))
    documents = [document for document in corpus.held_out_documents() if len(document) > 20 * LENGTH]
    starts = [document[:LENGTH] for document in documents]
    inner = [document[at : at + LENGTH] for document in documents for at in range(5 * LENGTH, 20 * LENGTH, 2 * LENGTH)]
    for name, prompts in (("starts", starts), ("inner", inner)):
        every = prompts[:: max(1, len(prompts) // NUM_EACH)][:NUM_EACH]
        texts = dict.fromkeys(corpus.tokenizer.decode(ids) for ids in every)
        lines = [json.dumps({"prompt": text}) + "\n" for text in texts if text]
        (output / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{output / name}.jsonl: {len(lines)} prompts")


if __name__ == "__main__":
    main()
