"""Reading of JSON objects, and atomic replacement of files."""

import json
import os
import pathlib
from typing import Any

from mtp_jax.errors import UserError, first_line

MOST_LEVELS = 32  # nested objects and lists


def read_json(path: str | os.PathLike[str], remedy: str, name: str = "") -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      remedy: the end of the error message.
      name: name of the file in that message; its path by default.

    Raises:
      UserError: the file is missing, cannot be read, is not a JSON object, has a key twice, or is nested more than
        MOST_LEVELS deep.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"), object_pairs_hook=_unique)
        is_deep = _is_nested(values, MOST_LEVELS)
    except RecursionError:
        is_deep = True
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text
        raise UserError(f"{name or path}: cannot be read as JSON ({first_line(error)}); {remedy}") from error
    if is_deep:
        raise UserError(f"{name or path}: is nested deeper than {MOST_LEVELS} levels; {remedy}")
    if not isinstance(values, dict):
        raise UserError(f"{name or path}: holds a {type(values).__name__}, not a JSON object; {remedy}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Returns a JSON object; raises on equal keys, of which Python would silently keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
    return content


def _is_nested(value: Any, levels: int) -> bool:
    """Returns whether objects and lists are nested deeper than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_nested(each, levels - 1) for each in inner)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replaces a file atomically: a killed process leaves the old file or the new one."""
    path = pathlib.Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
