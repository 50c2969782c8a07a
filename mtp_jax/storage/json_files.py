"""JSON objects in files, checked for what Python's reader lets pass."""

import json
from typing import Any

from mtp_jax.errors import UserError, first_line
from mtp_jax.storage.files import AnyPath, read_text

MOST_LEVELS = 32  # nested objects and lists of a JSON file


def read_json(path: AnyPath, remedy: str, name: str = "") -> dict[str, Any]:
    """Returns the JSON object in a file.

    Args:
      remedy: the end of the error message.
      name: name of the file in that message; its path by default.

    Raises:
      UserError: the file is missing, cannot be read, is not a JSON object, has a key twice, or is nested more than
        MOST_LEVELS deep.
    """
    try:
        values = json.loads(read_text(path), object_pairs_hook=_unique)
        is_deep = is_nested(values, MOST_LEVELS)
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


def is_nested(value: Any, levels: int) -> bool:
    """Returns whether objects and lists are nested deeper than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(is_nested(each, levels - 1) for each in inner)
