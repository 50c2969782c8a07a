"""Values of JSON files, read and refused in one line that names the file and the field."""

from typing import Any

from mtp_jax.config import ModelConfig, UserError, key_hints, walk

REMEDY = "correct it or fetch it again"  # of a file that cannot be used
FIELD_TYPES = key_hints(ModelConfig) | {"vocab_size": int}  # of our keys below ModelConfig
SETTINGS = {key: setting for key, _, setting in walk(ModelConfig())}  # of our keys: what their values may be
_WORDS = {int: "an integer", float: "a finite number", bool: "true or false", dict: "an object", str: "a string"}


def imported_with(flag: str, argument: str) -> str:
    """The remedy where a folder cannot be read as it is: an import, whose workdir every command takes in its place."""
    command = f"python -m mtp_jax.tools.convert import --hf=FOLDER --workdir=DIR {flag}"
    return f"import it with `{command}` and give DIR in place of the folder (in Python: mtp_jax.load(..., {argument}))"


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
