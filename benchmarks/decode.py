"""Comparison of plain and self-speculative decoding of a trained model, on held-out text or on given prompts.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart      # or make train
    python benchmarks/decode.py --workdir=runs/quickstart --drafts=1,2 --batches=1,8

    python train.py --config=configs/code_400m.py --workdir=runs/code_400m
    python benchmarks/decode.py --workdir=runs/code_400m --drafts=1,2,3 --batches=1,8,32

    python benchmarks/decode.py --workdir=OUT --prompts=PROMPTS.jsonl --drafts=3     # after mtp_jax.tools.distill

Appends a line per number of drafts and batch size to benchmarks/results/decode.jsonl: acceptance of each draft, tokens
per forward pass, tokens per second of plain and speculative decoding (the same prompts, alternating by batch, the
faster of two runs, prefill included), the speed-up, milliseconds per speculative step, and the number of equal texts.
"""

import argparse
import datetime
import json
import pathlib
import sys
from importlib import metadata

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402

import mtp_jax  # noqa: E402
from mtp_jax.decoding.samplers import make_sampler  # noqa: E402
from mtp_jax.evaluation import speculative  # noqa: E402
from mtp_jax.model import count_parameters  # noqa: E402
from mtp_jax.mtp import kind_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "decode.jsonl"
LEAST_PROMPTS = 8


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--workdir", required=True)
    flags.add_argument("--drafts", default="1", help="draft lengths")
    flags.add_argument("--batches", default="1", help="batch sizes")
    flags.add_argument("--max_new_tokens", type=int, default=256)
    flags.add_argument("--temperature", type=float, default=0.0)
    flags.add_argument("--prompts", help="as of eval.py; default: held-out documents")
    flags.add_argument("--min_confidence", type=float, help="as of eval.py")
    flags.add_argument("--whole_vocabulary", action="store_true", help="do not use the model's draft vocabulary")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    model = mtp_jax.load(args.workdir, draft_vocabulary=not args.whole_vocabulary)
    batches = [int(b) for b in args.batches.split(",")]
    context, num_prompts = model.config.data.sequence_length, max(LEAST_PROMPTS, *batches)
    if args.prompts:
        prompts = model.prompt_ids(speculative.read_prompts(args.prompts)[-num_prompts:])
    else:
        prompts = speculative.held_out_prompts(model.config, num_prompts, context // 4)
    for batch in batches:
        for drafts in map(int, args.drafts.split(",")):
            result = speculative.measure(
                *(model.decoder, prompts[: max(LEAST_PROMPTS, batch)]),
                num_speculative_tokens=drafts,
                batch_size=batch,
                max_new_tokens=args.max_new_tokens,
                sampler=make_sampler(args.temperature),
                min_confidence=args.min_confidence,
                repeats=2,
            )
            line = record(model, args, result)
            with args.output.open("a") as file:
                file.write(json.dumps(line) + "\n")
            print(
                f"batch {batch}, {drafts} drafts: {result.tokens_per_forward:.2f} tokens a forward pass, "
                f"{result.plain_tokens_per_second:,.0f} -> {result.tokens_per_second:,.0f} tokens/s, "
                f"{result.speed_up:.2f}x; {result.num_same} of {result.num_prompts} the same",
                flush=True,
            )


def record(model: mtp_jax.language_model.LanguageModel, args: argparse.Namespace, result) -> dict:
    """Returns the result's line."""
    counts, config = count_parameters(model.config.architecture), model.config
    steps_per_second = result.tokens_per_second / result.tokens_per_forward / result.batch_size
    return {
        "benchmark": "decode",
        "model": pathlib.Path(args.workdir).name,
        "parameters": counts.total,
        "mtp": config.mtp.kind,
        "depth": kind_of(config).depth,
        "temperature": args.temperature,
        "min_confidence": args.min_confidence,
        **speculative.as_json(result),
        "plain_ms": 1e3 * result.batch_size / result.plain_tokens_per_second,
        "speculative_step_ms": 1e3 / steps_per_second,
        "compute_dtype": config.model.compute_dtype,
        "device": jax.devices()[0].device_kind,
        "jax": metadata.version("jax"),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
