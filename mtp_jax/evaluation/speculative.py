"""Gain of self-speculation on given texts: acceptance, tokens per forward pass, and time relative to plain decoding."""

import dataclasses
import itertools
import json
import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from mtp_jax import data, storage
from mtp_jax.config import Config, UserError
from mtp_jax.decoding.generator import Generation, Generator
from mtp_jax.decoding.inference_model import cache_bytes_per_token
from mtp_jax.decoding.samplers import GREEDY, Sampler, is_greedy
from mtp_jax.evaluation.results import without_nan
from mtp_jax.typing import JsonObject


@dataclasses.dataclass(frozen=True)
class SpeculativeResult:
    """Plain and self-speculated continuations of the same prompts.

    acceptance: of draft k, how often it was accepted where those before it were.
    num_same: rows with the same tokens in both (all of them, up to rounding in low precision); None where sampled.
    num_steps: speculative steps of the batch. If it were full in all of them, num_tokens would be num_steps *
      batch_size * tokens_per_forward; texts that are done wait for others (`Generator.generate`).
    tokens_per_second, plain_tokens_per_second: of all prompts, including prefill.
    cache_bytes, multi_head_bytes: cache of the main model per token, and that of plain multi-head attention.
    draft_vocabulary_size: number of tokens that may be drafted, of the vocab_size of the model.
    """

    num_speculative_tokens: int
    batch_size: int
    num_prompts: int
    num_tokens: int
    num_same: int | None
    acceptance: list[float]
    tokens_per_forward: float
    num_steps: int
    plain_tokens_per_second: float
    tokens_per_second: float
    speed_up: float
    cache_bytes: int
    multi_head_bytes: int
    draft_vocabulary_size: int
    vocab_size: int


def held_out_prompts(config: Config, num: int, num_tokens: int) -> list[np.ndarray]:
    """Returns the first tokens of validation documents that are longer; if those are too few, also later parts.

    Raises:
      UserError: there is none.
    """
    documents = list(data.prepare(config).held_out_documents())
    longest = max(map(len, documents), default=0)
    places = (
        (document, at)
        for at in range(0, longest - num_tokens, config.data.sequence_length)
        for document in documents
        if len(document) > at + num_tokens
    )
    prompts = [document[at : at + num_tokens] for document, at in itertools.islice(places, num)]
    if not prompts:
        raise UserError(
            f"data.validation_fraction={config.data.validation_fraction}: no held-out document is longer than "
            f"{num_tokens} tokens; give prompts with --prompts=FILE"
        )
    return prompts


def read_prompts(path: str) -> list[str]:
    """Returns the prompts in a file: the field "prompt" of each line of a .jsonl, else every line that is not blank.

    Raises:
      UserError: no such file, a line without the field, or no prompt at all.
    """
    lines = prompt_lines(path)
    return [_prompt_of(path, n, line) if path.endswith(".jsonl") else line for n, line in lines]


def prompt_lines(path: str) -> list[tuple[int, str]]:
    """Returns the lines of a file that are not blank, with their numbers from 1 on.

    Raises:
      UserError: no such file, one that is not UTF-8, or one without such a line.
    """
    file = storage.path(path, "--prompts")
    if not storage.is_file(file):
        raise UserError(f"--prompts={path}: no such file")
    try:
        lines = [(n, line) for n, line in enumerate(storage.read_text(file).splitlines(), 1) if line.strip()]
    except UnicodeDecodeError as error:
        raise UserError(f"--prompts={path}: is not UTF-8") from error
    if not lines:
        raise UserError(f"--prompts={path}: holds no prompt")
    return lines


def _prompt_of(path: str, number: int, line: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise UserError(f'--prompts={path}: line {number} is no JSON object with a text in its field "prompt"')
    return prompt


def measure(
    decoder: Generator,
    prompts: Sequence[np.ndarray],
    *,
    num_speculative_tokens: int,
    batch_size: int,
    max_new_tokens: int,
    sampler: Sampler = GREEDY,
    seed: int = 0,
    stop_tokens: Sequence[int] = (),
    min_confidence: float | None = None,
    repeats: int = 1,
) -> SpeculativeResult:
    """Generates plain and self-speculated continuations of every prompt, `batch_size` at a time.

    Programs are compiled before the clock starts. Plain and speculative generation alternate; the fastest of `repeats`
    is reported. For `min_confidence` see `Generator.write`.

    Raises:
      UserError: as `Generator.generate`.
    """
    common: dict[str, Any] = {"sampler": sampler, "stop_tokens": stop_tokens, "batch_size": batch_size}
    options = {0: common, num_speculative_tokens: common | {"min_confidence": min_confidence}}  # by number of drafts
    for drafts, each in options.items():
        decoder.compile(prompts, max_new_tokens, num_speculative_tokens=drafts, **each)
    runs: dict[int, Generation] = {}
    seconds = dict.fromkeys(options, math.inf)
    for drafts, each in [*options.items()] * repeats:
        started = time.monotonic()
        runs[drafts] = decoder.generate(prompts, max_new_tokens, num_speculative_tokens=drafts, seed=seed, **each)
        seconds[drafts] = min(seconds[drafts], time.monotonic() - started)
    plain, drafted = runs[0], runs[num_speculative_tokens]
    same = sum(np.array_equal(a, b) for a, b in zip(plain.tokens, drafted.tokens, strict=True))
    num_tokens = sum(map(len, drafted.tokens))
    speed, plain_speed = num_tokens / seconds[num_speculative_tokens], sum(map(len, plain.tokens)) / seconds[0]
    cache = cache_bytes_per_token(decoder.architecture)
    network = decoder.network
    drafted_ids = network.draft_vocabulary
    return SpeculativeResult(
        num_speculative_tokens=drafted.tested.shape[1],
        batch_size=batch_size,
        num_prompts=len(prompts),
        num_tokens=num_tokens,
        num_same=same if is_greedy(sampler) else None,
        acceptance=drafted.acceptance,
        tokens_per_forward=drafted.tokens_per_forward,
        num_steps=drafted.num_forward_passes,
        plain_tokens_per_second=plain_speed,
        tokens_per_second=speed,
        speed_up=speed / plain_speed,
        cache_bytes=cache["kept"],
        multi_head_bytes=cache["multi_head"],
        draft_vocabulary_size=network.vocab_size if drafted_ids is None else len(drafted_ids),
        vocab_size=network.vocab_size,
    )


def text(result: SpeculativeResult) -> str:
    """Returns the result as a table, followed by a few lines of text."""
    r = result
    rates = " ".join("-" if math.isnan(a) else f"{a:.0%}" for a in r.acceptance)
    width = max(12, len(rates) + 1)
    head = f"{'drafts':<8}{'acceptance':>{width}}{'tokens/forward':>16}{'plain tok/s':>13}{'tok/s':>9}{'speed-up':>10}"
    row = (
        f"{r.num_speculative_tokens:<8}{rates:>{width}}{r.tokens_per_forward:>16.2f}{r.plain_tokens_per_second:>13,.0f}"
        f"{r.tokens_per_second:>9,.0f}{r.speed_up:>9.2f}x"
    )
    same = "" if r.num_same is None else f"; {r.num_same} of {r.num_prompts} texts equal those of plain decoding"
    saved = 1 - r.cache_bytes / r.multi_head_bytes
    is_reduced = r.draft_vocabulary_size < r.vocab_size
    part = f"{r.draft_vocabulary_size:,} of {r.vocab_size:,}" if is_reduced else f"all {r.vocab_size:,}"
    size = f"{r.num_prompts} prompts {r.batch_size} at a time, {r.num_tokens:,} new tokens"
    return "\n".join(
        [
            f"speculative decoding, {size}{same}",
            head,
            row,
            f"drafts from {part} tokens",
            f"cache: {r.cache_bytes:,} bytes per token; plain multi-head attention would keep {r.multi_head_bytes:,} "
            f"({saved:.1%} saved)",
        ]
    )


def as_json(result: SpeculativeResult) -> JsonObject:
    """Returns the fields; None for those not measured."""
    return without_nan(dataclasses.asdict(result))
