"""Prompts of distillation by domain, divided into those that are trained on and those that are measured on."""

import json
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.evaluation import speculative
from mtp_jax.language_model import LanguageModel


class Domain(NamedTuple):
    """Prompts of one file, as token ids.

    held_out: only measured on; train: the others. end_tokens: ids that end an answer, besides those of the model: the
    end-of-turn mark of conversations.
    """

    name: str
    train: list[np.ndarray]
    held_out: list[np.ndarray]
    end_tokens: tuple[int, ...]


def read(model: LanguageModel, given: Sequence[str], num_held_out: int, longest: int) -> tuple[list[Domain], int]:
    """Returns the domains of `--prompts` flags, and the number of prompts left out because they are too long.

    Args:
      model: encodes the prompts; those with messages by its chat template.
      given: "NAME=FILE", or "FILE" for a domain with the name of the file without its suffixes. A .jsonl has on each
        line an object with a field prompt (a text) or messages (a list of role and content); any other file has a
        prompt on each line that is not blank.
      num_held_out: prompts of each file, its last ones, that are not trained on.
      longest: tokens of the longest prompt that is used.

    Raises:
      UserError: a file that cannot be read, a line without a prompt, two domains with one name, or a file with too few
        prompts to hold any out.
    """
    if longest < 1:
        raise UserError("--max_new_tokens: leaves no room for a prompt in the model's context; use fewer new tokens")
    domains: list[Domain] = []
    num_dropped = 0
    for flag in given:
        name, _, path = flag.rpartition("=")
        name = name or storage.path(path, "--prompts").name.partition(".")[0]
        if name in [domain.name for domain in domains]:
            raise UserError(f"--prompts={flag}: there is another file for the domain {name}; name it, as in NAME=FILE")
        every, ends = _file(model, path)
        prompts = [ids for ids in every if len(ids) <= longest]
        num_dropped += len(every) - len(prompts)
        if len(prompts) <= num_held_out:
            raise UserError(
                f"--prompts={flag}: holds {len(prompts)} prompts of at most {longest} tokens, of which --held_out="
                f"{num_held_out} are not trained on; give more, or lower --held_out"
            )
        first = len(prompts) - num_held_out
        domains.append(Domain(name, prompts[:first], prompts[first:], ends))
    return domains, num_dropped


def _file(model: LanguageModel, path: str) -> tuple[list[np.ndarray], tuple[int, ...]]:
    """Returns the prompts of a file, and the ids of the end-of-turn marks of its conversations."""
    lines = speculative.prompt_lines(path)
    if not path.endswith(".jsonl"):
        return model.prompt_ids([line for _, line in lines]), ()
    records = [(f"--prompts={path}: line {n}", _record(f"--prompts={path}: line {n}", line)) for n, line in lines]
    chats = [record for _, record in records if not isinstance(record, str)]
    return [_ids(model, where, record) for where, record in records], _ends(model, chats[0]) if chats else ()


def _record(where: str, line: str) -> str | list[Any]:
    """Returns the prompt of a line, or its messages up to the assistant's answer; a last answer is left out."""
    try:
        record = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not JSON; correct it") from error
    prompt, messages = (record.get(key) if isinstance(record, dict) else None for key in ("prompt", "messages"))
    if isinstance(prompt, str) and prompt:
        return prompt
    if isinstance(messages, list) and messages:
        is_answered = isinstance(messages[-1], dict) and messages[-1].get("role") == "assistant" and len(messages) > 1
        return messages[:-1] if is_answered else messages
    raise UserError(f'{where} has neither a text "prompt" nor a list "messages"; correct it')


def _ids(model: LanguageModel, where: str, record: str | list[Any]) -> np.ndarray:
    try:
        return model.prompt_ids([record])[0] if isinstance(record, str) else model.chat_ids(record)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _ends(model: LanguageModel, messages: list[Any]) -> tuple[int, ...]:
    """Returns the id of the end-of-turn mark, where the template has one that is a special token of the model."""
    tokenizer = model.needs_tokenizer()
    end = tokenizer.special_id(model.chat_template.end_mark(tokenizer, messages))
    return () if end is None or end >= (model.config.model.vocab_size or 0) else (end,)
