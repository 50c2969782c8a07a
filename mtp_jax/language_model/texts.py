"""Texts to be scored, as token ids and the place where what is predicted begins."""

from collections.abc import Callable

import numpy as np

from mtp_jax.config import UserError
from mtp_jax.data import Tokenizer


def checked(what: str, text: object) -> str:
    """`text`; raises UserError, which names it as `what`, unless it is a text that can be encoded."""
    if not isinstance(text, str):
        raise UserError(f"{what}: {text!r} is not a text; give a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        found = ascii(text[error.start])
        raise UserError(f"{what}: character {error.start} is {found}, half of a surrogate pair; remove it") from error
    return text


def pair(
    tokenizer: Tokenizer, encode: Callable[[str], np.ndarray], n: int, context: str, continuation: str
) -> tuple[np.ndarray, int]:
    """Token ids of a context with its continuation, int32[N], and where the continuation begins, 1 at least.

    Args:
      encode: the tokenizer's, which may remember contexts.
      n: the pair's number, for errors.

    Raises:
      UserError: an empty continuation; an empty context and a tokenizer with neither bos nor eos.
    """
    context, continuation = checked(f"pair {n}", context), checked(f"pair {n}", continuation)
    kept = context.rstrip()
    continuation = context[len(kept) :] + continuation
    if not continuation:
        raise UserError(f"pair {n}: its continuation is empty; give it at least one character")
    context_ids, whole = encode(kept), tokenizer.encode(kept + continuation)
    num_new = max(1, len(whole) - len(context_ids))  # it may be joined to the context's last token
    has_context = len(whole) > num_new  # without one, as where both are one token, something has to come before
    first = tokenizer.bos_id if tokenizer.bos_id is not None or has_context else tokenizer.eos_id
    if first is None and not has_context:
        raise UserError(f"pair {n}: nothing comes before its continuation, and the tokenizer has neither bos nor eos")
    ids = whole if first is None else np.concatenate([[first], whole])
    return ids.astype(np.int32), len(ids) - num_new


def whole(tokenizer: Tokenizer, n: int, text: str) -> tuple[np.ndarray, int]:
    """Token ids of a text of which everything is predicted, after bos (or eos), and 1.

    Raises:
      UserError: a tokenizer with neither bos nor eos.
    """
    first = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    if first is None:
        raise UserError(f"text {n}: the tokenizer has neither bos nor eos to begin with")
    return np.concatenate([[first], tokenizer.encode(checked(f"text {n}", text))]).astype(np.int32), 1


def windows(ids: np.ndarray, start: int, longest: int) -> list[tuple[np.ndarray, int]]:
    """The ids from `start` on in pieces that a model's context of `longest` tokens holds: each int32[<= longest + 1],
    as the last token is only predicted, with the place where what it predicts begins.

    Each token is predicted once. One piece, with the context's end, if the predicted tokens fit; else the first token
    of a later piece follows one token, and the last piece reaches back as far as it can.
    """
    out = []
    for at in range(start, len(ids), longest):
        end = min(at + longest, len(ids))
        window = ids[max(0, end - longest - 1) : end]
        out.append((window, len(window) - (end - at)))
    return out
