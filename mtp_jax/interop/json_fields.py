"""Reading of values in JSON files, with errors of one line that name the file and the field."""

from typing import Any

from mtp_jax.config import ModelConfig, UserError, key_hints, walk
from mtp_jax.errors import short

REMEDY = "correct it or fetch it again"  # for a file that cannot be used
FIELD_TYPES = key_hints(ModelConfig) | {"vocab_size": int}  # of our fields below ModelConfig
SETTINGS = {key: setting for key, _, setting in walk(ModelConfig())}  # of the same fields: constraints on values
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", dict: "an object", str: "a string"}


def imported_with(flag: str, argument: str) -> str:
    """Remedy for a folder that cannot be read as it is: an import, whose workdir every command accepts in its place."""
    command = f"python -m mtp_jax.tools.convert import --hf=FOLDER --workdir=DIR {flag}"
    return f"import it with `{command}` and give DIR in place of the folder (in Python: mtp_jax.load(..., {argument}))"


def bad(where: str, key: str, value: Any, remedy: str) -> UserError:
    """Returns the error for a value in a file."""
    return UserError(f"{where}: field {key!r}={short(value)} {remedy}")


def typed(where: str, key: str, value: Any, kind: type) -> Any:
    """Returns `value` as `kind`, where an integer is accepted for a float; raises UserError for another type."""
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, (int, float)) and not is_bool and -1e300 < value < 1e300:
        return float(value)
    if kind is not float and isinstance(value, kind) and is_bool == (kind is bool):
        return value
    raise bad(where, key, value, f"must be {_WORDS[kind]}; correct the file")
