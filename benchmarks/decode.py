"""Comparison of plain and self-speculative decoding of a trained model, on held-out text or on given prompts.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart      # or make train
    python benchmarks/decode.py --workdir=runs/quickstart --drafts=1,2 --batches=1,8

    python train.py --config=configs/code_400m.py --workdir=runs/code_400m
    python benchmarks/decode.py --workdir=runs/code_400m --drafts=1,2,3 --batches=1,8,32

    python benchmarks/decode.py --workdir=OUT --prompts=PROMPTS.jsonl --drafts=3 --temperatures=0,1 \
        --min_confidence=none,0.3 --vocabulary=draft,whole      # after mtp_jax.tools.distill

Appends a line per combination of the values to benchmarks/results/decode.jsonl: acceptance of each draft, tokens per
forward pass, tokens per second of plain and speculative decoding, the speed-up, milliseconds per speculative step, and
the number of equal texts. The prompts, up to 12 times the batch size, enter where texts are done; plain and speculative
decoding take turns, and the faster of two runs each counts, prefill included.
--only_missing leaves out what the file has a line of already. With JAX_COMPILATION_CACHE_DIR the programs of plain
decoding, which are the same for all models of one kind, are compiled once.
"""

import argparse
import concurrent.futures
import datetime
import functools
import itertools
import json
import pathlib
import sys
import time
from importlib import metadata
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import numpy as np  # noqa: E402

import mtp_jax  # noqa: E402
from mtp_jax.decoding.samplers import make_sampler  # noqa: E402
from mtp_jax.evaluation import speculative  # noqa: E402
from mtp_jax.language_model import LanguageModel  # noqa: E402
from mtp_jax.model import count_parameters  # noqa: E402
from mtp_jax.mtp import kind_of  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results" / "decode.jsonl"
LEAST_PROMPTS, MOST_BATCHES = 32, 12


class Case(NamedTuple):
    """Settings of one measurement; fields of its line."""

    vocabulary: str
    temperature: float
    min_confidence: float | None
    batch_size: int
    num_speculative_tokens: int


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--workdir", required=True)
    flags.add_argument("--drafts", default="1", help="draft lengths")
    flags.add_argument("--batches", default="1", help="batch sizes")
    flags.add_argument("--max_new_tokens", type=int, default=256)
    flags.add_argument("--temperatures", default="0")
    flags.add_argument("--prompts", help="as of eval.py; default: held-out documents")
    flags.add_argument("--num_prompts", type=int, default=0, help="at most, 12 batches; default: the largest batch")
    flags.add_argument("--min_confidence", default="none", help="as of eval.py, or none")
    flags.add_argument("--vocabulary", default="draft", help="draft: the model's draft vocabulary if it has one; whole")
    flags.add_argument("--compile_threads", type=int, default=1, help="programs compiled at once")
    flags.add_argument("--only_missing", action="store_true")
    flags.add_argument("--output", type=pathlib.Path, default=RESULTS)
    args = flags.parse_args()
    cases = missing_cases(args)
    if not cases:
        return
    models: dict[str, LanguageModel] = {}
    for vocabulary in dict.fromkeys(case.vocabulary for case in cases):
        models[vocabulary] = mtp_jax.load(args.workdir, draft_vocabulary=vocabulary != "whole")
    prompts = read_prompts(args, models[cases[0].vocabulary], max(case.batch_size for case in cases))
    started = time.monotonic()
    with concurrent.futures.ThreadPoolExecutor(args.compile_threads) as pool:
        list(pool.map(functools.partial(compile_programs, args, models, prompts), cases))
    print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    for case in cases:
        model = models[case.vocabulary]
        result = speculative.measure(
            model.decoder,
            measured(prompts, case),
            num_speculative_tokens=case.num_speculative_tokens,
            batch_size=case.batch_size,
            max_new_tokens=args.max_new_tokens,
            sampler=make_sampler(case.temperature),
            min_confidence=case.min_confidence,
            repeats=2,
        )
        line = record(model, args, case, result)
        args.output.parent.mkdir(parents=True, exist_ok=True)
        with args.output.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            f"batch {case.batch_size}, {case.num_speculative_tokens} drafts, temperature {case.temperature:g}, "
            f"confidence {case.min_confidence}, {result.draft_vocabulary_size:,} tokens: "
            f"{result.tokens_per_forward:.2f} tokens a forward pass, "
            f"{result.plain_tokens_per_second:,.0f} -> {result.tokens_per_second:,.0f} tokens/s, "
            f"{result.speed_up:.2f}x; {result.num_same} of {result.num_prompts} the same",
            flush=True,
        )


def missing_cases(args: argparse.Namespace) -> list[Case]:
    """Returns the combinations of the flags' values; with --only_missing those without a line in the output."""
    confidences = [None if text == "none" else float(text) for text in args.min_confidence.split(",")]
    cases = [
        Case(*values)
        for values in itertools.product(
            args.vocabulary.split(","),
            map(float, args.temperatures.split(",")),
            confidences,
            map(int, args.batches.split(",")),
            map(int, args.drafts.split(",")),
        )
    ]
    if not args.only_missing or not args.output.exists():
        return cases
    lines = [json.loads(line) for line in args.output.read_text().splitlines()]
    name = pathlib.Path(args.workdir).name
    done = {tuple(line.get(field) for field in Case._fields) for line in lines if line.get("model") == name}
    return [case for case in cases if case not in done]


def read_prompts(args: argparse.Namespace, model: LanguageModel, largest_batch: int) -> list[np.ndarray]:
    """Returns the last prompts of the file, or prompts from held-out documents."""
    num = max(LEAST_PROMPTS, args.num_prompts, largest_batch)
    if args.prompts:
        return model.prompt_ids(speculative.read_prompts(args.prompts)[-num:])
    return speculative.held_out_prompts(model.config, num, model.config.data.sequence_length // 4)


def compile_programs(
    args: argparse.Namespace, models: dict[str, LanguageModel], prompts: list[np.ndarray], case: Case
) -> None:
    """Compiles plain and speculative decoding."""
    decoder, sampler = models[case.vocabulary].decoder, make_sampler(case.temperature)
    for drafts, least in ((0, None), (case.num_speculative_tokens, case.min_confidence)):
        decoder.compile(
            measured(prompts, case),
            args.max_new_tokens,
            sampler=sampler,
            num_speculative_tokens=drafts,
            min_confidence=least,
            batch_size=case.batch_size,
        )


def measured(prompts: list[np.ndarray], case: Case) -> list[np.ndarray]:
    """Returns the prompts of a case, taken evenly from all: few where few rows run at the same time, to save time."""
    num = min(len(prompts), max(LEAST_PROMPTS, MOST_BATCHES * case.batch_size))
    return [prompts[i * len(prompts) // num] for i in range(num)]


def record(model: LanguageModel, args: argparse.Namespace, case: Case, result: speculative.SpeculativeResult) -> dict:
    """Returns the result's line."""
    counts, config = count_parameters(model.config.architecture), model.config
    seconds = result.num_tokens / result.tokens_per_second
    return {
        "benchmark": "decode",
        "model": pathlib.Path(args.workdir).name,
        "parameters": counts.total,
        "mtp": config.mtp.kind,
        "depth": kind_of(config).depth,
        **case._asdict(),
        **speculative.as_json(result),
        "plain_ms": 1e3 * result.batch_size / result.plain_tokens_per_second,
        "speculative_step_ms": 1e3 * seconds / result.num_steps,
        "compute_dtype": config.model.compute_dtype,
        "device": jax.devices()[0].device_kind,
        "jax": metadata.version("jax"),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
