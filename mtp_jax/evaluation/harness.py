"""Adapter of `LanguageModel` to the model interface of lm-evaluation-harness."""

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from mtp_jax.config import UserError
from mtp_jax.data import ChatError
from mtp_jax.decoding.generator import check_drafts
from mtp_jax.errors import warn_once
from mtp_jax.language_model import LanguageModel
from mtp_jax.mtp import kind_of

BATCHES_PER_CALL = 8  # of `LanguageModel.generate`; its caches have room for the longest text of a call
DEFAULT_NEW_TOKENS = 256  # the harness's default
# Generation options that tasks may set. IGNORED ones select a search, which neither greedy nor sampled decoding uses.
OPTIONS = ("until", "max_gen_toks", "max_new_tokens", "max_tokens", "do_sample", "temperature", "top_p", "top_k")
QUESTION = [{"role": "user", "content": "?"}]
IGNORED = ("num_beams", "early_stopping", "num_return_sequences", "seed")


class HarnessModel(LM):
    """A `LanguageModel` with the harness's interface. Every process of a mesh answers the same requests.

    Attributes:
      num_truncated: contexts that were truncated to fit the model's.
      num_shortened: task name -> number of generated answers that the end of the model's context truncated.
      passes: task name -> [generated tokens, forward passes of the main model] of generated answers.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        batch_size: int = 16,
        speculative: bool = False,
        num_speculative_tokens: int | None = None,
        seed: int = 0,
        chat: bool = False,
    ):
        """Adapter of one model.

        Args:
          batch_size: prompts continued at once.
          speculative: generated answers are drafted by the extra depths; the same text when greedy.
          num_speculative_tokens: tokens drafted before each forward pass; None: the trained depth.
          seed: of sampled answers.
          chat: the requests are texts of the model's chat template, as `apply_chat_template` returns them: special
            tokens that they spell are encoded as such, no bos is added, and answers end at the end-of-turn mark too.

        Raises:
          UserError: a model that cannot draft, or has no chat template.
        """
        super().__init__()
        if speculative:
            check_drafts(model.config.architecture, num_speculative_tokens or max(1, kind_of(model.config).depth))
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.drafts: dict[str, Any] = {"speculative": speculative} if speculative else {}
        if speculative and num_speculative_tokens is not None:
            self.drafts["num_speculative_tokens"] = num_speculative_tokens
        self.chat, self.marks = chat, list[str]()
        if chat:
            self.marks = [mark for mark in [model.chat_template.end_mark(model.needs_tokenizer(), QUESTION)] if mark]
        self.num_truncated = 0
        self.num_shortened: dict[str, int] = collections.defaultdict(int)
        self.passes: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer in the harness's results."""
        return self.model.config.data.tokenizer.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the Jinja template, for the harness's results; None where none is applied."""
        return self.model.chat_template.source if chat_template else None

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Returns the text of a chat; it ends with the last message where there is no generation prompt.

        As the harness's own models do, system messages are left out if the template refuses them, with a notice.
        """
        options: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        try:
            return self.model.chat_template.render(chat_history, **options)
        except ChatError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) in (0, len(chat_history)):
                raise
            text = self.model.chat_template.render(others, **options)
            warn_once(f"system messages are left out, since the chat template refuses them ({error})")
            return text

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Returns (log p in nats, whether greedy decoding generates it) of each request's (context, continuation)."""
        texts, starts = self.model.pair_ids([request.args for request in requests], self.chat)
        longest = self.model.config.data.sequence_length + 1  # the last token is only predicted
        truncated = {request.args[0] for request, ids in zip(requests, texts, strict=True) if len(ids) > longest}
        self.num_truncated += len(truncated)  # each context once, however many answers it has
        with _bar("loglikelihood", len(texts)) as progress:
            return self.model.token_loglikelihood(texts, starts, progress)

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Returns log p in nats of each request's whole text."""
        texts = [request.args[0] for request in requests]
        with _bar("loglikelihood_rolling windows", None) as progress:
            return self.model.loglikelihood_rolling(texts, progress)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Returns the text generated after each request's context, up to the first of its stop strings.

        An answer has the number of tokens that its task requests, or as many as fit the model's context after the
        prompt. A prompt loses its beginning only where it would leave less than half of the context, and less than
        requested. Requests with the same options are generated together, the longest contexts first; those that wait
        enter the batch where answers are done.

        Raises:
          UserError: options that the decoding does not support.
        """
        answers: list[str] = [""] * len(requests)
        with _bar("generate_until", len(requests)) as progress:
            for options, members in _by_options(requests):
                num_new = options.pop("max_new_tokens")
                options["stop"] = [*options["stop"], *self.marks]
                prompts = {i: self._prompt(requests[i].args[0], num_new) for i in members}
                members.sort(key=lambda i: -len(prompts[i]))
                size = BATCHES_PER_CALL * self.batch_size
                for number, at in enumerate(range(0, len(members), size)):
                    some = members[at : at + size]
                    rows = [prompts[i] for i in some]
                    options |= {"seed": self.seed + number, "batch_size": self.batch_size, "progress": progress}
                    written = self.model.generate(rows, num_new, **options, **self.drafts)
                    for row, i in enumerate(some):
                        answers[i], tokens = written.texts[row], written.tokens[row]
                        task = requests[i].task_name or ""
                        self.num_shortened[task] += self._is_shortened(rows[row], tokens, num_new, options["stop"])
                        counts = self.passes[task]
                        counts[0] += len(tokens)
                        counts[1] += int(written.num_speculative_steps[row])
        return answers

    def _is_shortened(self, prompt: list[int], tokens: np.ndarray, num_new: int, stops: list[str]) -> bool:
        """Returns whether an answer ended only because the context was full."""
        if len(tokens) >= num_new or len(prompt) + len(tokens) < self.model.config.data.sequence_length:
            return False
        tokenizer = self.model.tokenizer
        text = tokenizer.decode_after(np.asarray(prompt), tokens) if stops and tokenizer else ""
        ends = {*self.model.end_tokens, *(tokenizer.special_id(stop) for stop in stops if tokenizer)}
        return tokens[-1] not in ends and not any(stop in text for stop in stops)

    def _prompt(self, text: str, num_new: int) -> list[int]:
        """Returns token ids, truncated on the left to leave room for `num_new` tokens or half of the context."""
        tokenizer = self.model.tokenizer
        if self.chat:
            ids = self.model.needs_tokenizer().encode(text, special_tokens=True).tolist()
        elif text or tokenizer is None:
            ids = self.model.prompt_ids([text])[0].tolist()
        else:
            first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
            if first is None:
                raise UserError("a task has an empty prompt, and the tokenizer has neither bos nor eos to begin with")
            ids = [first]
        context = self.model.config.data.sequence_length
        room = context - min(num_new, context // 2)
        self.num_truncated += len(ids) > room
        return ids[-room:]


def _by_options(requests: Sequence[Instance]) -> Iterator[tuple[dict[str, Any], list[int]]]:
    """Yields options of `LanguageModel.generate`, with the indices of the requests that have them."""
    groups: dict[str, tuple[dict[str, Any], list[int]]] = {}
    for i, request in enumerate(requests):
        asked = request.args[1]
        groups.setdefault(repr(sorted(asked.items())), (generation_options(asked), []))[1].append(i)
    yield from groups.values()


def generation_options(asked: dict[str, Any]) -> dict[str, Any]:
    """Returns the arguments of `LanguageModel.generate` for a task's generation_kwargs.

    Raises:
      UserError: an unknown option.
    """
    unknown = [name for name in asked if name not in OPTIONS + IGNORED]
    if unknown or asked.get("num_beams", 1) != 1:
        name = (unknown or ["num_beams"])[0]
        raise UserError(f"generation_kwargs: {name}={asked[name]!r} is not supported; known are {', '.join(OPTIONS)}")
    until = asked.get("until") or []
    out: dict[str, Any] = {"stop": [until] if isinstance(until, str) else [s for s in until if s]}
    limits = [asked[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if asked.get(name) is not None]
    out["max_new_tokens"] = int(limits[0]) if limits else DEFAULT_NEW_TOKENS
    temperature = asked.get("temperature")
    if asked.get("do_sample", bool(temperature)) and temperature != 0:
        out["temperature"] = 1.0 if temperature is None else float(temperature)
        out |= {name: asked[name] for name in ("top_p", "top_k") if (asked.get(name) or 0) > 0}  # 0: no limit
    return out


@contextlib.contextmanager
def _bar(name: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Shows a progress bar on stderr, on the first process only; yields a function that advances it."""
    with tqdm(total=total, desc=name, disable=jax.process_index() != 0 or None) as bar:
        yield lambda num: bar.update(num) and None
