"""Answers of a model to prompts, generated in batches of one file each, so that an interrupted run continues.

The files are sources of `data.records=tokens`: an object per line with `tokens`, the ids of prompt and answer, and
`weights`, 0 for the prompt and 1 for the answer.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import jax
import numpy as np
import tqdm
from etils import epath
from jax.experimental import multihost_utils

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.language_model import LanguageModel
from mtp_jax.mtp import kind_of
from mtp_jax.tools.distilling.prompts import Domain
from mtp_jax.typing import JsonObject

SETTINGS_FILE = "settings.json"


@dataclass(frozen=True)
class Settings:
    """Settings that the answers depend on, beside the model and the prompts.

    Attributes:
      model: path of the model.
      num_prompts: number of prompts that are trained on.
      num_per_prompt: answers to each prompt.
      max_new_tokens, temperature, batch_size, seed: of the generation.
    """

    model: str
    num_prompts: int
    num_per_prompt: int
    max_new_tokens: int
    temperature: float
    batch_size: int
    seed: int


def write(model: LanguageModel, domains: Sequence[Domain], folder: epath.Path, settings: Settings) -> None:
    """Writes the answers to the prompts that are trained on, except batches that are there already.

    Several processes must all call it; process 0 writes.

    Raises:
      UserError: the folder has answers of other settings.
    """
    is_main = jax.process_index() == 0
    prompts = [ids for domain in domains for ids in domain.train for _ in range(settings.num_per_prompt)]
    ends = sorted({*model.end_tokens, *(end for domain in domains for end in domain.end_tokens)})
    # Texts of about one length fill a batch best.
    order = sorted(range(len(prompts)), key=lambda n: (len(prompts[n]), n))
    batches = [order[at : at + settings.batch_size] for at in range(0, len(order), settings.batch_size)]
    _check_settings(folder, settings)
    written = set(storage.names(folder))
    multihost_utils.sync_global_devices("every process has seen which answers there are")
    if is_main:
        storage.make_folder(folder)
        storage.write_text(folder / SETTINGS_FILE, json.dumps(asdict(settings), indent=2) + "\n")
    missing = [n for n in range(len(batches)) if _name(n) not in written]
    drafts, vocab_size = _own_drafts(model), model.needs_tokenizer().vocab_size
    bar = tqdm.tqdm(missing, desc="answers", unit=" batches", disable=not is_main or not missing)
    for n in bar:
        batch = [prompts[i] for i in batches[n]]
        found = model.decoder.generate(
            batch,
            settings.max_new_tokens,
            sampler=make_sampler(settings.temperature),
            num_speculative_tokens=drafts,
            seed=(settings.seed + n) % 2**32,
            stop_tokens=ends,
        )
        if is_main:
            known = [_known(answer, vocab_size) for answer in found.tokens]
            lines = [_record(prompt, answer) for prompt, answer in zip(batch, known, strict=True)]
            storage.write_text(folder / _name(n), "".join(lines))
    multihost_utils.sync_global_devices("all answers are written")


def read(folder: epath.Path) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields token ids int32[n] and weights float32[n] of every answer with its prompt."""
    for name in storage.names(folder):
        if name.startswith("part-"):
            for line in storage.read_text(folder / name).splitlines():
                record = json.loads(line)
                yield np.asarray(record["tokens"], np.int32), np.asarray(record["weights"], np.float32)


def counts(folder: epath.Path, vocab_size: int) -> np.ndarray:
    """Returns how often each token occurs in the answers, int64[V]."""
    counts_V = np.zeros(vocab_size, np.int64)
    for tokens, weights in read(folder):
        counts_V += np.bincount(tokens[weights > 0], minlength=vocab_size)
    return counts_V


def pattern(folder: epath.Path) -> str:
    """Returns the value of `data.files` that names all files of answers."""
    return f"{folder}/part-*.jsonl"


def _own_drafts(model: LanguageModel) -> int:
    """Number of tokens that the model drafts by itself: those of its trained depths."""
    kind = kind_of(model.config)
    return 0 if kind.max_drafts == 0 else kind.depth


def _known(answer: np.ndarray, vocab_size: int) -> np.ndarray:
    """Returns an answer up to the first id that the tokenizer lacks; models often have more outputs than it has ids."""
    is_unknown = answer >= vocab_size
    return answer[: int(np.argmax(is_unknown))] if is_unknown.any() else answer


def _name(n: int) -> str:
    return f"part-{n:06d}.jsonl"


def _record(prompt: np.ndarray, answer: np.ndarray) -> str:
    tokens = [*map(int, prompt), *map(int, answer)]
    return json.dumps({"tokens": tokens, "weights": [0] * len(prompt) + [1] * len(answer)}) + "\n"


def _check_settings(folder: epath.Path, settings: Settings) -> None:
    file = folder / SETTINGS_FILE
    if not storage.is_file(file):
        return
    old: JsonObject = storage.read_json(file, "remove the folder to generate the answers again")
    for key, value in asdict(settings).items():
        if old.get(key) != value:
            raise UserError(
                f"--{key}={value}: {folder} has answers with {key}={old.get(key)}; use that, or another --workdir"
            )
