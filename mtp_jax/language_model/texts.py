"""Texts to score as token ids, with the index at which the predicted tokens begin."""

from collections.abc import Callable

import numpy as np

from mtp_jax.config import UserError
from mtp_jax.data import Tokenizer


def checked(what: str, text: object) -> str:
    """Returns `text`; raises UserError, which names it as `what`, unless it is a text that can be encoded."""
    if not isinstance(text, str):
        raise UserError(f"{what}: {text!r} is not a text; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise UserError(f"{what}: character {error.start} is {found}, half of a surrogate pair; remove it") from error
    return text


def pair(
    tokenizer: Tokenizer,
    encode: Callable[[str], np.ndarray],
    n: int,
    context: str,
    continuation: str,
    add_bos: bool = True,
) -> tuple[np.ndarray, int]:
    """Returns token ids of a context with its continuation, int32[N], and the start of the continuation, at least 1.

    Args:
      encode: the tokenizer's encode, possibly with a cache of contexts.
      n: index of the pair, for errors.
      add_bos: begin with the tokenizer's bos; False: only where the continuation has no token before it.

    Raises:
      UserError: an empty continuation; an empty context and a tokenizer with neither bos nor eos.
    """
    context, continuation = checked(f"pair {n}", context), checked(f"pair {n}", continuation)
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not continuation:
        raise UserError(f"pair {n}: its continuation is empty; give it at least one character")
    context_ids, whole = encode(kept), encode(kept + continuation)
    num_new = max(1, len(whole) - len(context_ids))  # its beginning may be joined to the context's last token
    has_context = len(whole) > num_new  # otherwise, as where both are one token, bos or eos must precede it
    first = tokenizer.bos_id if tokenizer.bos_id is not None or has_context else tokenizer.eos_id
    first = None if has_context and not add_bos else first
    if first is None and not has_context:
        raise UserError(f"pair {n}: nothing comes before its continuation, and the tokenizer has neither bos nor eos")
    ids = whole if first is None else np.concatenate([[first], whole])
    return ids.astype(np.int32), len(ids) - num_new


def whole(tokenizer: Tokenizer, n: int, text: str) -> tuple[np.ndarray, int]:
    """Returns token ids of a text of which every token is predicted, after bos (or eos), and the start 1.

    Raises:
      UserError: a tokenizer with neither bos nor eos.
    """
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise UserError(f"text {n}: the tokenizer has neither bos nor eos to begin with")
    return np.concatenate([[first], tokenizer.encode(checked(f"text {n}", text))]).astype(np.int32), 1


def windows(ids: np.ndarray, start: int, longest: int) -> list[tuple[np.ndarray, int]]:
    """Splits the ids from `start` on into windows for a model's context of `longest` tokens.

    Each window is (int32[<= longest + 1], start of its predicted tokens); its last token is only predicted. Each token
    is predicted once. If all predicted tokens fit, there is one window, with the end of the context; else the first
    token of a later window follows one token, and the last window starts as early as it can.
    """
    out = []
    for at in range(start, len(ids), longest):
        end = min(at + longest, len(ids))
        window = ids[max(0, end - longest - 1) : end]
        out.append((window, len(window) - (end - at)))
    return out
