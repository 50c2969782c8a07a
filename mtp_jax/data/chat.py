"""Chats, and prompts with completions, as token ids with loss weights.

A chat is a list of messages with a role and a content. Its text is rendered by the chat template of the tokenizer as
transformers does (`apply_chat_template`); special tokens that this text spells are encoded as special tokens.
"""

import datetime
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mtp_jax.config import UserError
from mtp_jax.data import chat_template_files
from mtp_jax.data.messages import ChatError, Message, messages_of, plain_values, text_content, with_content
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import first_line, short

LossOn = Literal["assistant", "all"]

# The date in training documents, which must not depend on the day: that of Llama 3's template where it has no clock.
_TRAINING_DATE = datetime.datetime(2024, 7, 26)
_MARK = "\ue0f1\ue0f2"  # private characters, which no text has


class ChatTemplate:
    """The chat template of a tokenizer.

    Attributes:
      source: the Jinja template.
      fingerprint: a hash of everything that the rendered text depends on, besides the messages and the date.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str], where: str):
        """Compiles the templates of a tokenizer.

        Args:
          sources: Jinja templates by name: "default", and "tool_use", which is used where there are tools.
          special_tokens: texts of bos_token, eos_token and others, as variables of the templates.
          where: name of the templates in errors.

        Raises:
          UserError: no template "default", or one that is not a Jinja template.
        """
        import jinja2

        from mtp_jax.data import template_sandbox

        if "default" not in sources:
            raise UserError(
                f"{where}: has no template 'default' among {short(sorted(sources))}; set data.chat_template"
            )
        self.source, self._where, self._special_tokens = sources["default"], where, dict(special_tokens)
        self._sources = dict(sources)
        try:
            self._templates = {name: template_sandbox.compile_template(text) for name, text in sources.items()}
        except (jinja2.TemplateError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, jinja2.TemplateSyntaxError) else ""
            raise UserError(
                f"{where}: is not a Jinja template ({first_line(error)}{line}); correct it, or set data.chat_template"
            ) from error
        parts = json.dumps([1, sorted(sources.items()), sorted(special_tokens.items())])
        self.fingerprint = hashlib.blake2b(parts.encode(), digest_size=16).hexdigest()

    @classmethod
    def load(cls, tokenizer: str, template: str = "") -> "ChatTemplate":
        """Reads the chat template of a tokenizer.

        Args:
          tokenizer: the value of data.tokenizer: "bytes", a folder or a file in it.
          template: the value of data.chat_template, the path of a Jinja template; empty: chat_template.jinja beside the
            tokenizer, else chat_template in its tokenizer_config.json.

        Raises:
          UserError: no template, one that cannot be read or is not a Jinja template, or one that uses bos_token or
            eos_token of a tokenizer that has no tokenizer_config.json.
        """
        return cls(*chat_template_files.read(tokenizer, template))

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
    ) -> str:
        """Returns the text of a chat.

        Args:
          messages: each with "role", and "content": a text, or a list of parts such as {"type": "text", "text": ...}.
          add_generation_prompt: the text ends with the beginning of an answer.
          tools: JSON schemas of functions, for templates that describe them.
          continue_final_message: the text ends with the content of the last message, without an end-of-turn mark.

        Raises:
          ChatError: messages without a role, or that the template refuses, with the template's own message.
        """
        checked, now = messages_of(messages), datetime.datetime.now()
        if not continue_final_message:
            return self._render(checked, now, add_generation_prompt, tools)[0]
        found = self._split(checked, len(checked) - 1, tools, now, lambda content: _marked(content) + " ")
        if found is None:
            raise self._error("does not write the content of the last message", "give it another role or content")
        before, after = found
        return before if after.startswith(" ") else before.rstrip()  # the template strips contents

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        loss_on: LossOn = "assistant",
        tools: Sequence[Mapping[str, Any]] | None = None,
        num_context: int = 0,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the token ids of a chat, int32[n], and the weight of each as a target, float32[n].

        With loss_on="assistant" the weight is 1 for tokens of what the assistant wrote, else 0: its `{% generation %}`
        blocks if the template has them; otherwise everything from the end of the generation prompt to the end of the
        turn, the end-of-turn mark included. Answers among the first `num_context` messages have weight 0, as part of a
        prompt. With loss_on="all" every weight is 1.

        The date of a template that prints one is that of July 26, 2024, so that documents are the same on every day.

        Raises:
          ChatError: as `render`, and where the tokens of the assistant cannot be determined.
        """
        checked = messages_of(messages)
        text, spans = self._render(checked, _TRAINING_DATE, False, tools)
        ids, offsets = tokenizer.encode_with_offsets(_encodable(text), special_tokens=True)
        if loss_on == "all":
            return ids, np.ones(len(ids), np.float32)
        answers = [i for i, message in enumerate(checked) if message["role"] == "assistant"]
        if not self._has_generation_blocks(tools):
            spans = [self._answer(text, checked, i, tools) for i in answers if i >= num_context]
            spans = [_with_mark(tokenizer, text, offsets, span) for span in spans]
        elif num_context:  # one block per answer, in their order
            if len(spans) != len(answers):
                raise self._error(
                    f"has {len(spans)} generation blocks for {len(answers)} answers",
                    "use a template with one block per answer, or data.loss_on=all",
                )
            spans = [span for i, span in zip(answers, spans, strict=True) if i >= num_context]
        return ids, _weights(offsets, spans)

    def answer_frame(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None = None
    ) -> tuple[str, str]:
        """Returns the texts between the generation prompt and an answer to `messages`, and after that answer.

        The second one is the end-of-turn mark. Both are empty where the template does not show them.
        """
        checked, now = messages_of(messages), datetime.datetime.now()
        prompt = self._render(checked, now, True, tools)[0]
        answer = {"role": "assistant", "content": ""}
        found = self._split([*checked, answer], len(checked), tools, now, _marked)
        if found is None:
            return "", ""
        before, after = found
        return before[len(prompt) :] if before.startswith(prompt) else "", after

    def end_mark(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Returns the special token that ends an answer to `messages`, else the text that does; "" if there is none.

        Where nothing follows an answer (GLM), it is the special token that begins the next question.
        """
        after = self.answer_frame(messages, tools)[1]
        if after.strip():
            return _first_special(tokenizer, after) or after.strip()
        checked = [*messages_of(messages), {"role": "assistant", "content": ""}, {"role": "user", "content": "?"}]
        found = self._split(checked, len(checked) - 2, tools, datetime.datetime.now(), _marked)
        return "" if found is None else _first_special(tokenizer, found[1])

    def _render(
        self,
        messages: Sequence[dict[str, Any]],
        now: datetime.datetime,
        add_generation_prompt: bool,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[str, list[tuple[int, int]]]:
        from mtp_jax.data import template_sandbox

        values = {"messages": messages, "tools": plain_values(tools), "documents": None}
        values |= {"add_generation_prompt": add_generation_prompt, **self._special_tokens}
        try:
            return template_sandbox.render(self._templates[self._name(tools)], values, now)
        except template_sandbox.RENDER_ERRORS as error:
            raise self._error(first_line(error), "correct the messages, or set data.chat_template") from error

    def _name(self, tools: object) -> str:
        return "tool_use" if tools is not None and "tool_use" in self._templates else "default"

    def _has_generation_blocks(self, tools: object) -> bool:
        return re.search(r"\{%-?\s*generation\s*-?%\}", self._sources[self._name(tools)]) is not None

    def _error(self, problem: str, remedy: str) -> ChatError:
        return ChatError(f"{self._where}: {problem}; {remedy}")

    # The characters that an assistant wrote, where the template does not mark them.

    def _answer(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: Sequence[Mapping[str, Any]] | None
    ) -> tuple[int, int]:
        """Returns the characters [start, end) of message i in `text`, with its end-of-turn mark."""
        start, end = self._start(text, messages, i, tools), self._end(text, messages, i, tools)
        if start is None or end is None or end < start or not self._is_answer(text, (start, end), messages, i, tools):
            raise self._error(
                f"the tokens of message {i} (assistant) cannot be determined",
                "use a template with {% generation %} blocks (data.chat_template), or data.loss_on=all",
            )
        return start, end

    def _start(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: Sequence[Mapping[str, Any]] | None
    ) -> int | None:
        """Returns the start of message i in `text`: the end of the generation prompt, as far as the message has it."""
        prompt = self._prefix(messages[:i], tools, True)
        if prompt is not None and text.startswith(prompt):
            return len(prompt)
        # The generation prompt has text that this answer lacks, such as an opened <think>.
        found = self._split(messages, i, tools, _TRAINING_DATE, lambda content: _MARK)
        if found is not None and text.startswith(found[0]):
            return len(found[0])
        before = self._prefix(messages[:i], tools, False)
        if prompt is None or before is None or not (prompt.startswith(before) and text.startswith(before)):
            return None
        common = len(os.path.commonprefix([prompt, text]))
        return common if common > len(before) else None

    def _end(
        self, text: str, messages: list[dict[str, Any]], i: int, tools: Sequence[Mapping[str, Any]] | None
    ) -> int | None:
        """Returns the end of message i in `text`: after its content, the text that ends it as the last message."""
        until = self._prefix(messages[: i + 1], tools, False)
        if until is not None and text.startswith(until):
            return len(until)
        # The answer is another one while it is the last message, as with the thinking of Qwen3.
        in_chat = self._split(messages, i, tools, _TRAINING_DATE, _marked)
        if in_chat is None or not text.endswith(in_chat[1]):
            return None
        content_end = len(text) - len(in_chat[1])
        if text[:content_end].rstrip() != in_chat[0].rstrip():  # templates may strip contents
            return None
        closings = self._closings(messages[: i + 1], tools)
        return next((content_end + len(each) for each in closings if text.startswith(each, content_end)), None)

    def _closings(self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None) -> Iterator[str]:
        """Yields texts that may follow the content of the last message, if others follow it, up to its end."""
        last = len(messages) - 1
        as_last = self._split(messages, last, tools, _TRAINING_DATE, _marked)
        if as_last is not None:
            yield as_last[1]
        # The last message of a chat has another end: eos after its mark, or in place of it.
        before, prompt = self._prefix(messages[:last], tools, False), self._prefix(messages[:last], tools, True)
        continued = self._split(messages, last, tools, _TRAINING_DATE, _marked, add_generation_prompt=True)
        if before is not None and prompt is not None and continued is not None and prompt.startswith(before):
            if continued[1].endswith(prompt[len(before) :]):
                yield continued[1].removesuffix(prompt[len(before) :])
        eos = self._special_tokens.get("eos_token", "")
        if as_last is not None and eos and as_last[1].endswith(eos):
            yield as_last[1].removesuffix(eos)

    def _prefix(
        self, messages: list[dict[str, Any]], tools: Sequence[Mapping[str, Any]] | None, add_generation_prompt: bool
    ) -> str | None:
        """Returns the text of the first messages of a chat; None where the template refuses them."""
        try:
            return self._render(messages, _TRAINING_DATE, add_generation_prompt, tools)[0]
        except ChatError:
            return None

    def _split(
        self,
        messages: list[dict[str, Any]],
        i: int,
        tools: Sequence[Mapping[str, Any]] | None,
        now: datetime.datetime,
        change: Callable[[str], str],
        add_generation_prompt: bool = False,
    ) -> tuple[str, str] | None:
        """Returns the text before and after the mark that `change` writes into the content of message i.

        None where the template refuses that content, or does not write the mark exactly once.
        """
        changed = [*messages[:i], with_content(messages[i], change), *messages[i + 1 :]]
        try:
            parts = self._render(changed, now, add_generation_prompt, tools)[0].split(_MARK)
        except ChatError:
            return None
        return (parts[0], parts[1]) if len(parts) == 2 else None

    def _is_answer(
        self,
        text: str,
        span: tuple[int, int],
        messages: list[dict[str, Any]],
        i: int,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> bool:
        """Returns whether the characters `span` have the content of message i, without the thinking before it."""
        start, end = span
        answer = text_content(messages[i]).rsplit("</think>", 1)[-1].strip()
        if answer in text[start:end]:
            return True
        found = self._split(messages, i, tools, _TRAINING_DATE, _marked)  # the template may have changed the content
        return found is not None and start < len(found[0]) <= end


def encode_prompt(tokenizer: Tokenizer, prompt: str, completion: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns the token ids of a prompt and its completion, int32[n], and the weight of each as a target, float32[n].

    The two are one plain text, [bos] + ids + [eos] where the tokenizer has these. The weight is 1 for tokens with a
    character of the completion and for eos, else 0.

    Raises:
      ChatError: an empty completion, or values that are not texts.
    """
    for name, text in (("prompt", prompt), ("completion", completion)):
        if not isinstance(text, str):
            raise ChatError(f"{name}: {short(text)} is not a text; give a string")
    if not completion:
        raise ChatError("completion: is empty; give it at least one character")
    text = _encodable(prompt + completion)
    ids, offsets = tokenizer.encode_with_offsets(text)
    weights = _weights(offsets, [(len(prompt), len(text))])
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    ids = np.concatenate([bos, ids, eos]).astype(np.int32)
    return ids, np.concatenate([np.zeros(len(bos)), weights, np.ones(len(eos))]).astype(np.float32)


def _weights(offsets: np.ndarray, spans: Sequence[tuple[int, int]]) -> np.ndarray:
    """Returns 1 for each token that has characters of a span, else 0: float32[n]. As transformers' assistant masks."""
    weights = np.zeros(len(offsets), np.float32)
    for start, end in spans:
        weights[(offsets[:, 0] < end) & (offsets[:, 1] > start)] = 1
    return weights


def _with_mark(tokenizer: Tokenizer, text: str, offsets: np.ndarray, span: tuple[int, int]) -> tuple[int, int]:
    """Returns the span of an answer, with the special token after it if there is none in it.

    A model whose turns have no mark of their end (GLM) ends its answer with the mark of the next turn.
    """
    start, end = span
    behind = offsets[offsets[:, 0] >= start]
    texts = [text[first:stop] for first, stop in behind[: np.searchsorted(behind[:, 0], end) + 1]]
    special = [n for n, each in enumerate(texts) if tokenizer.special_id(each) is not None]
    return (start, int(behind[special[0]][1])) if special == [len(texts) - 1] else span


def _first_special(tokenizer: Tokenizer, text: str) -> str:
    """Returns the first special token that a text spells; "" if it spells none."""
    offsets = tokenizer.encode_with_offsets(text, special_tokens=True)[1]
    texts = (text[start:end] for start, end in offsets)
    return next((each for each in texts if tokenizer.special_id(each) is not None), "")


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise ChatError(f"text: character {error.start} is {found}, half of a surrogate pair; remove it") from error
    return text


def _marked(content: str) -> str:
    return content + _MARK
