"""JSON objects from files, and files that are written as a whole."""

import json
import os
import pathlib
from typing import Any

from mtp_jax.errors import UserError, first_line

MOST_LEVELS = 32  # of objects and lists within each other


def read_json(path: str | os.PathLike[str], remedy: str, name: str = "") -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      remedy: the end of the error's message.
      name: of the file in that message; its path by default.

    Raises:
      UserError: a file that is not there or cannot be read, is not JSON, has a key twice, is nested beyond what such
        files are, or holds something else.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
        is_deep = _is_nested(values, MOST_LEVELS)
    except RecursionError:
        is_deep = True
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text at all
        raise UserError(f"{name or path}: cannot be read as JSON ({first_line(error)}); {remedy}") from error
    if is_deep:
        raise UserError(f"{name or path}: is nested deeper than {MOST_LEVELS} levels; {remedy}")
    if not isinstance(values, dict):
        raise UserError(f"{name or path}: holds a {type(values).__name__}, not a JSON object; {remedy}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object, where Python would take the last of equal keys without a word."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} is there twice")
    return content


def _is_nested(value: Any, levels: int) -> bool:
    """True where objects and lists lie in each other deeper than that."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_nested(each, levels - 1) for each in inner)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file as a whole, so that a kill leaves the old one or the new one."""
    path = pathlib.Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
