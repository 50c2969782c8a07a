"""JSON objects from files, and files that are written as a whole."""

import json
import os
import pathlib
from typing import Any

from mtp_jax.errors import UserError, first_line


def read_json(path: str | os.PathLike[str], remedy: str, name: str = "") -> dict[str, Any]:
    """The JSON object that a file holds.

    Args:
      remedy: the end of the error's message.
      name: of the file in that message; its path by default.

    Raises:
      UserError: a file that is not there or cannot be read, is not JSON, or holds something else.
    """
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # ValueError: not JSON, or not text at all
        raise UserError(f"{name or path}: cannot be read as JSON ({first_line(error)}); {remedy}") from error
    if not isinstance(values, dict):
        raise UserError(f"{name or path}: holds a {type(values).__name__}, not a JSON object; {remedy}")
    return values


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Replace a file as a whole, so that a kill leaves the old one or the new one."""
    path = pathlib.Path(path)
    partial = path.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
