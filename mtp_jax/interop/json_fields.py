"""Values of JSON files, read and refused in one line that names the file and the field."""

import json
import pathlib
from typing import Any

from mtp_jax.config import ModelConfig, UserError, key_hints
from mtp_jax.typing import JsonObject

FIELD_TYPES = key_hints(ModelConfig) | {"vocab_size": int}  # of our keys below ModelConfig
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", dict: "an object", str: "a string"}
_MAX_NESTING = 32


def read_object(path: pathlib.Path) -> JsonObject:
    """The JSON object of a file.

    Raises:
      UserError: it cannot be read, is not JSON, is no object, has a key twice, or is nested beyond what such files are.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_unique)
        is_deep = _is_nested(values, _MAX_NESTING)
    except RecursionError:
        is_deep = True
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text at all
        raise UserError(
            f"{path}: cannot be read as JSON ({error}); correct it or fetch it again".replace("\n", " ")
        ) from error
    if is_deep:
        raise UserError(f"{path}: is nested deeper than {_MAX_NESTING} levels; correct it or fetch it again")
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds a {type(values).__name__}, not an object; correct it or fetch it again")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> JsonObject:
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


def short(value: Any) -> str:
    """A value as errors show it: one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def bad(where: str, key: str, value: Any, remedy: str) -> UserError:
    """The error for a value of a file."""
    return UserError(f"{where}: field {key!r}={short(value)} {remedy}")


def typed(where: str, key: str, value: Any, kind: type) -> Any:
    """`value` as `kind` (an integer will do for a float), or a UserError."""
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, (int, float)) and not is_bool and -1e300 < value < 1e300:
        return float(value)
    if kind is not float and isinstance(value, kind) and is_bool == (kind is bool):
        return value
    raise bad(where, key, value, f"must be {_WORDS[kind]}; correct the file")
