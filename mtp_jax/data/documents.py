"""Documents: the forms in which records become training data, and the checks of their fields."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data.records import FIELDS, TOOLS, BadRecord, Record
from mtp_jax.errors import short

_ABSENT = object()
_USUAL = {  # names that fields often have, to propose them
    "text": (("text",), ("content",)),
    "chat": (("messages",), ("conversations",)),
    "prompt": (("prompt", "completion"),),
    "tokens": (("tokens",), ("input_ids",)),
}
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True)
class Text:
    """A text, never empty."""

    text: str
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Chat:
    """A conversation.

    Attributes:
      messages: one or more, each with `role` and `content`, both strings, and any other keys of the record.
      tools: JSON schemas of the tools that the assistant may call; None if the record has none.
      num_context: number of messages at the start that are context only: those of a prompt, the rest being its
        completion.
      origin: that of the record.
    """

    messages: tuple[dict[str, Any], ...]
    tools: tuple[dict[str, Any], ...] | None = None
    num_context: int = 0
    origin: str = ""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt and its completion, of which at least one is not empty."""

    prompt: str
    completion: str
    origin: str = ""


@dataclasses.dataclass(frozen=True, eq=False)
class Tokens:
    """Ids of a tokenizer.

    Attributes:
      ids: int32[n], n > 0, at least 0; the vocabulary is not known here.
      weights: float32[n], loss weight of each token as a target, finite and at least 0; None: 1.
      origin: that of the record.
    """

    ids: np.ndarray
    weights: np.ndarray | None = None
    origin: str = ""


Document = Text | Chat | Prompt | Tokens


class _Unusable(Exception):
    """The cause and the remedy of a BadRecord."""


def documents(
    records: Iterable[Record | BadRecord], settings: SourceConfig, prefix: str = "data."
) -> Iterator[Document | BadRecord]:
    """Yields the document of each record, in the form that `settings.records` names.

    Empty texts and empty lists of tokens are left out. A BadRecord of the input is yielded as it is.

    Args:
      records: of one source.
      settings: records, the names of the fields, loss_on.
      prefix: of the settings in messages, as in "data.mixture[1].".

    Yields:
      Documents, and a BadRecord for each record that cannot be used.

    Raises:
      UserError: plain text, which has no fields, where `settings.records` is not "text".
    """
    make = _FORMS[settings.records]
    for record in records:
        if isinstance(record, BadRecord):
            yield record
            continue
        if isinstance(record.value, str) and settings.records != "text":
            raise UserError(
                f"{prefix}records={settings.records}: {record.origin} is plain text, which has no fields; set "
                f"{prefix}records=text, or give a source of records, such as .jsonl or .parquet files"
            )
        try:
            document = make(record, settings, prefix)
        except _Unusable as error:
            yield BadRecord(record.origin, *error.args)
        else:
            if document is not None:
                yield document


def _text(record: Record, settings: SourceConfig, prefix: str) -> Text | None:
    if isinstance(record.value, str):
        return Text(record.value, record.origin) if record.value else None
    (name,), (value,) = _fields(record.value, settings, prefix)
    text = _string(value, name, f'set {prefix}text_field, or remove the record (an empty string, "", is left out)')
    return Text(text, record.origin) if text else None


def _chat(record: Record, settings: SourceConfig, prefix: str) -> Chat:
    (name,), (value,) = _fields(record.value, settings, prefix)
    messages = _messages(value, name, f"{prefix}messages_field")
    _check_answers(messages, settings, prefix, name)
    return Chat(messages, _tools(record.value), origin=record.origin)


def _prompt(record: Record, settings: SourceConfig, prefix: str) -> Prompt | Chat | None:
    names, values = _fields(record.value, settings, prefix)
    lists = [not isinstance(value, str | bytes | None) for value in values]
    keys = [f"{prefix}{key}" for key in FIELDS["prompt"]]
    if all(lists):
        context, answers = (_messages(*each) for each in zip(values, names, keys, strict=True))
        _check_answers(answers, settings, prefix, names[1])
        return Chat(context + answers, _tools(record.value), len(context), record.origin)
    if any(lists) and None not in values:
        kinds = " and ".join(f"{name!r} is {_kind(value)}" for name, value in zip(names, values, strict=True))
        raise _Unusable(f"field {kinds}", "give two strings, or two lists of messages")
    prompt, completion = (
        _string(value, name, f"set {key}, or remove the record")
        for value, name, key in zip(values, names, keys, strict=True)
    )
    if not prompt and not completion:
        return None
    if not completion and settings.loss_on == "assistant":
        raise _Unusable(
            f"field {names[1]!r} is empty, so no token has a loss", f"remove the record, or set {prefix}loss_on=all"
        )
    return Prompt(prompt, completion, record.origin)


def _tokens(record: Record, settings: SourceConfig, prefix: str) -> Tokens | None:
    (name,), (value,) = _fields(record.value, settings, prefix)
    ids = _array(value, name, f"set {prefix}tokens_field, or remove the record")
    if ids.size and (ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= 2**31):
        odd = _first(value, lambda each: type(each) is not int or not 0 <= each < 2**31)
        raise _Unusable(f"field {name!r} holds {odd}, which is no id", "give ids of data.tokenizer")
    weights = None
    if settings.weights_field:
        weights = _weights(record.value, settings, prefix, len(ids))
    return Tokens(ids.astype(np.int32), weights, record.origin) if len(ids) else None


def _weights(value: Any, settings: SourceConfig, prefix: str, num_tokens: int) -> np.ndarray:
    name = settings.weights_field
    given = _find(value, name)
    if given is _ABSENT:
        raise _Unusable(
            f"has no field {name!r}, only {short(_names(value))}", f"set {prefix}weights_field, or leave it empty"
        )
    weights = _array(given, name, f"set {prefix}weights_field, or remove the record")
    if weights.size and weights.dtype.kind not in "iufb":
        odd = _first(given, lambda each: not isinstance(each, int | float))
        raise _Unusable(f"field {name!r} holds {odd}, which is no weight", "give one number per token")
    if len(weights) != num_tokens:
        raise _Unusable(f"field {name!r} has {len(weights)} weights for {num_tokens} tokens", "give one per token")
    with np.errstate(over="ignore"):  # infinite in float32
        weights = weights.astype(np.float32)
    bad = ~(np.isfinite(weights) & (weights >= 0))
    if bad.any():
        i = int(np.argmax(bad))
        raise _Unusable(f"field {name!r} has the weight {weights[i]} at token {i}", "give finite weights of at least 0")
    return weights


_FORMS: dict[str, Callable[[Record, SourceConfig, str], Document | None]] = {
    "text": _text,
    "chat": _chat,
    "prompt": _prompt,
    "tokens": _tokens,
}


def _find(value: Any, name: str) -> Any:
    """Returns a field by its name, "a.b" for field b of field a unless there is a field "a.b"; _ABSENT if it is not."""
    if name in value:
        return value[name]
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _ABSENT
        value = value[part]
    return value


def _names(value: Mapping[str, Any]) -> list[str]:
    """Returns the names of the fields, sorted; of those in a field as "a.b"."""
    return sorted(
        name
        for key, inner in value.items()
        for name in ([f"{key}.{each}" for each in inner] if isinstance(inner, Mapping) and inner else [key])
    )


def _fields(value: Any, settings: SourceConfig, prefix: str) -> tuple[list[str], list[Any]]:
    """Returns the names and values of the fields of the form."""
    names = [getattr(settings, key) for key in FIELDS[settings.records]]
    values = [_find(value, name) for name in names]
    for key, name, found in zip(FIELDS[settings.records], names, values, strict=True):
        if found is _ABSENT:
            remedy = _other_settings(value, settings, prefix) or f"set {prefix}{key}"
            raise _Unusable(f"has no field {name!r}, only {short(_names(value))}", remedy)
    return names, values


def _other_settings(value: Any, settings: SourceConfig, prefix: str) -> str:
    """Returns the settings, as in "set data.records=chat", under which a record has all fields of a form."""
    for form in sorted(FIELDS, key=lambda form: form != settings.records):
        keys = FIELDS[form]
        for names in (tuple(getattr(settings, key) for key in keys), *_USUAL[form]):
            if any(_find(value, name) is _ABSENT for name in names):
                continue
            changes = [f"{prefix}records={form}"] if form != settings.records else []
            for key, name in zip(keys, names, strict=True):
                changes += [f"{prefix}{key}={name}"] if getattr(settings, key) != name else []
            return f"set {' and '.join(changes)}"
    return ""


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__


def _string(value: Any, name: str, remedy: str) -> str:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise _Unusable(
                f"field {name!r} is not UTF-8 ({error.reason} at byte {error.start})", "convert or remove it"
            ) from error
    if not isinstance(value, str):
        raise _Unusable(f"field {name!r} is {_kind(value)}, not a string", remedy)
    _check_surrogates(value, name)
    return value


def _check_surrogates(value: Any, name: str) -> None:
    """Raises _Unusable for half a surrogate pair in a string, also one inside lists and objects."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise _Unusable(f"field {name!r} holds half a surrogate pair, not text", "remove it") from error
    elif isinstance(value, Mapping):
        for key, each in value.items():
            _check_surrogates(key, name)
            _check_surrogates(each, name)
    elif isinstance(value, list | tuple):
        for each in value:
            _check_surrogates(each, name)


def _messages(value: Any, name: str, key: str) -> tuple[dict[str, Any], ...]:
    """Returns messages with role and content, from a list of them or, as columns are stored, an object of lists."""
    if isinstance(value, Mapping) and value and all(isinstance(each, list | tuple) for each in value.values()):
        if len({len(each) for each in value.values()}) > 1:
            raise _Unusable(f"field {name!r} has lists of several lengths", "give one entry per message")
        value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise _Unusable(f"field {name!r} is {_kind(value)}, not a list of messages", f"set {key}, or remove the record")
    if not value:
        raise _Unusable(f"field {name!r} has no messages", "remove the record")
    _check_surrogates(value, name)
    return tuple(_message(message, f"{name}[{i}]") for i, message in enumerate(value))


def _message(message: Any, name: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise _Unusable(f"{name} is {_kind(message)}, not an object", 'write {"role": ..., "content": ...}')
    # Tables have null where a message lacks a key that another one has
    rest = {key: each for key, each in message.items() if each is not None}
    role, content = rest.pop("role", None), rest.pop("content", None)
    if role is None and "from" in rest:
        role, content = rest.pop("from"), rest.pop("value", None)
        role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
        if role not in _ROLES:
            known = ", ".join((*_SHAREGPT_ROLES, *_ROLES))
            raise _Unusable(f"{name} is from {short(role)}, which is no known role", f"use one of {known}")
    if content is None and rest.get("tool_calls"):
        content = ""
    for key, found in (("role", role), ("content", content)):
        if not isinstance(found, str):
            if found is None and key not in message:
                raise _Unusable(f"{name} has no {key}, only {short(sorted(message))}", f"add {key}, a string")
            raise _Unusable(f"{name} has a {key} that is {_kind(found)}, not a string", "write it as a string")
    return {"role": role, "content": content, **rest}


def _check_answers(messages: Sequence[dict[str, Any]], settings: SourceConfig, prefix: str, name: str) -> None:
    if settings.loss_on == "assistant" and not any(message["role"] == "assistant" for message in messages):
        raise _Unusable(
            f"field {name!r} has no message of the assistant, so no token has a loss",
            f"remove the record, or set {prefix}loss_on=all",
        )


def _tools(value: Any) -> tuple[dict[str, Any], ...] | None:
    """Returns the tools of a chat, from a list of objects or, as in tables, its JSON text."""
    tools = value.get(TOOLS)
    if tools is None or tools == "":
        return None
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            raise _Unusable(f"field {TOOLS!r} is a string that is not JSON", "give a list of objects") from error
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise _Unusable(f"field {TOOLS!r} is not a list of objects", "correct it, or remove the field")
    _check_surrogates(tools, TOOLS)
    return tuple(dict(tool) for tool in tools) or None


def _array(value: Any, name: str, remedy: str) -> np.ndarray:
    """Returns a list of numbers as an array of one dimension."""
    if not isinstance(value, list | tuple | np.ndarray):
        raise _Unusable(f"field {name!r} is {_kind(value)}, not a list of numbers", remedy)
    try:
        array = np.asarray(value)
    except (ValueError, OverflowError):  # lists of several lengths
        array = np.zeros((0, 0))
    if array.ndim != 1:
        raise _Unusable(f"field {name!r} is nested, not a list of numbers", remedy)
    return array


def _first(values: Any, is_odd: Callable[[Any], bool]) -> str:
    """Returns the first of the values that is odd, as shown in messages."""
    return short(next(filter(is_odd, np.asarray(values, object).tolist())))
