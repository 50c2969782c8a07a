"""Messages of a chat: dicts with a role and a content, which is a text or a list of parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mtp_jax.errors import UserError, short

Message = Mapping[str, Any]  # role, content, and what else a template reads (tool_calls, reasoning_content)
_REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning, the standard one first


class ChatError(UserError):
    """A chat, or a prompt with its completion, that cannot be rendered or encoded."""


def messages_of(messages: object) -> list[dict[str, Any]]:
    """Returns messages as plain dicts, without keys whose value is None, and with reasoning under its standard names.

    Raises:
      ChatError: no messages, or one without a role or with a content that is neither a text nor a list.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence) or not messages:
        raise ChatError(
            f"messages: {short(messages)} is not a list of messages; give [{{'role': ..., 'content': ...}}]"
        )
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ChatError(f"message {i}: {short(message)} is not a message; give {{'role': ..., 'content': ...}}")
        plain = {name: value for name, value in plain_values(message).items() if value is not None}
        if not isinstance(plain.get("role"), str):
            raise ChatError(f"message {i}: role={short(plain.get('role'))} must be a text such as 'user'; add it")
        if not isinstance(plain.get("content", ""), str | list):
            raise ChatError(
                f"message {i}: content={short(plain['content'])} must be a text or a list of parts; correct it"
            )
        if len(plain) == 1:
            raise ChatError(f"message {i}: has no content; add it, or remove the message")
        reasoning = next((plain[name] for name in _REASONING if name in plain), None)
        if reasoning is not None:
            plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
        out.append(plain)
    return out


def plain_values(value: Any) -> Any:
    """Returns a copy of JSON values: a template must not get at methods of other objects."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        return {plain_values(name): plain_values(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(each) for each in value]
    for kind in (str, int, float):  # subclasses of these
        if isinstance(value, kind):
            return kind.__str__(value) if kind is str else kind(value)
    raise ChatError(f"messages: {short(value)} is a {type(value).__name__}; give texts, numbers, lists and dicts only")


def last_text_part(parts: list[Any]) -> int | None:
    """Returns the index of the last part of a content that has a text; None if there is none."""
    found = [n for n, part in enumerate(parts) if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return found[-1] if found else None


def text_content(message: Mapping[str, Any]) -> str:
    """Returns the content of a message, or the text of its last part; "" if it has neither."""
    content = message.get("content", "")
    if isinstance(content, str):
        return content
    last = last_text_part(content)
    return "" if last is None else content[last]["text"]


def with_content(message: Mapping[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Returns a message with `change` of its `_text_content`."""
    content = message.get("content", "")
    changed: Any = change(text_content(message))
    if isinstance(content, list):
        last = last_text_part(content)
        part = {"type": "text", "text": changed}
        at = len(content) if last is None else last
        changed = [*content[:at], part, *content[at + 1 :]]
    return {**message, "content": changed}
