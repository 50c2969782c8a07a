"""From a config file and the command line to a `Config`: what is unknown or ill-typed is refused by name.

A config file is Python with a `get_config()` that returns an `ml_collections.ConfigDict`; `default_config()` gives it
one to start from. ConfigDict ends here. The config.json of a workdir is a config file as well.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import pathlib
import sys
import traceback
import types
import typing
from typing import Any, Literal

import ml_collections

from mtp_jax.config.fields import UserError
from mtp_jax.config.schema import Config


def default_config() -> ml_collections.ConfigDict:
    """Every key with its default, for a config file to change. Setting a key that does not exist raises."""
    return to_config_dict(Config())


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The locked ConfigDict of a Config; fields that may be None become typed placeholders."""
    out = ml_collections.ConfigDict(dataclasses.asdict(config))
    for key, (_, hint) in _leaves(Config).items():
        *parents, name = key.split(".")
        section = out
        for parent in parents:
            section = section[parent]
        if type(None) in typing.get_args(hint) and section[name] is None:
            kind = next(a for a in typing.get_args(hint) if a is not type(None))
            section[name] = ml_collections.config_dict.placeholder(kind)
    return out.lock()


def to_dict(config: Config) -> dict[str, Any]:
    """Nested plain dict, as written to a workdir's config.json."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], where: str) -> Config:
    """A Config from nested plain values.

    Args:
      values: any subset of the keys; the rest take their defaults.
      where: the file the values come from, named in errors.

    Raises:
      UserError: an unknown key (with the nearest real one) or a value of the wrong type.
    """
    leaves = _leaves(Config)
    for key, value in _flatten(values).items():
        if key not in leaves:
            is_section = any(leaf.startswith(key + ".") for leaf in leaves)
            if is_section and value == {}:
                continue
            raise _unknown_key(key, where)
    return _build(Config, values, "", where)


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Run a config file and apply command-line overrides.

    Args:
      path: a Python file with `get_config()`, or the config.json of a workdir.
      overrides: strings `--config.section.key=value`; tuples in Python syntax, `true`/`false` for booleans.

    Raises:
      UserError: no such file, a file that does not run, an unknown key, a value of the wrong type.
    """
    values = _run_config_file(path)
    from_dict(values, path)  # the file's own mistakes are reported before the command line's
    leaves = _leaves(Config)
    for override in overrides:
        key, value = _parse_override(override)
        if key not in leaves:
            raise _unknown_key(key, "the command line")
        _set(values, key, _from_text(value, leaves[key][1]))
    return from_dict(values, "the command line" if overrides else path)


def _run_config_file(path: str) -> dict[str, Any]:
    if not pathlib.Path(path).is_file():
        raise UserError(f"--config={path}: no such file; give a Python file with get_config(), as in configs/")
    if path.endswith(".json"):
        return _read_json(path)
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={path}: has no get_config()")
        config = module.get_config()
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = f" (line {frames[-1].lineno})" if frames else ""
        message = str(error).strip().strip("'\"").splitlines() or [type(error).__name__]
        if isinstance(error, SystemExit):
            message = [f"exits with {error.code!r}; return the config from get_config() instead"]
        raise UserError(f"{path}{line}: {message[0]}") from error
    if isinstance(config, ml_collections.ConfigDict):
        return config.to_dict()
    if isinstance(config, dict):
        return config
    raise UserError(f"{path}: get_config() returned {type(config).__name__}; return a ml_collections.ConfigDict")


def _read_json(path: str) -> dict[str, Any]:
    try:
        values = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"--config={path}: not JSON ({error}); give the config.json of a workdir") from error
    if not isinstance(values, dict) or "model_type" in values:
        raise UserError(f"--config={path}: not a config of a run; give the config.json of a workdir")
    return with_own_tokenizer(values, pathlib.Path(path).parent)


def with_own_tokenizer(values: dict[str, Any], workdir: pathlib.Path) -> dict[str, Any]:
    """A config.json's values; where the tokenizer they name is gone, as when folders were moved, the copy that an
    imported model brought into the workdir."""
    own, data = workdir / "hf" / "tokenizer.json", values.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(named, str) or named == "bytes" or pathlib.Path(named).expanduser().exists() or not own.is_file():
        return values
    print(f"data.tokenizer={named} is gone; using {own}", file=sys.stderr)
    return {**values, "data": {**values["data"], "tokenizer": str(own.absolute())}}


def _parse_override(override: str) -> tuple[str, str]:
    name, equals, value = override.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UserError(f"{override}: not understood; overrides read --config.section.key=value")
    return name[len("--config.") :], value


def _from_text(text: str, hint: Any) -> Any:
    """The value a command-line string stands for; what does not parse stays a string for the type check."""
    kinds = typing.get_args(hint) if _is_union(hint) else (hint,)
    if str in kinds or typing.get_origin(hint) is Literal:
        return text
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _leaves(cls: type, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted key -> (owning dataclass, type hint), for every key that holds a value."""
    out: dict[str, tuple[Any, Any]] = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        hint = hints[f.name]
        if dataclasses.is_dataclass(hint):
            out |= _leaves(typing.cast(type, hint), f"{prefix}{f.name}.")
        else:
            out[prefix + f.name] = (cls, hint)
    return out


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            out |= _flatten(value, f"{prefix}{key}.")
        else:
            out[f"{prefix}{key}"] = value
    return out


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, name = key.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
    values[name] = value


def _unknown_key(key: str, where: str) -> UserError:
    leaves = list(_leaves(Config))
    near = difflib.get_close_matches(key, leaves, 1, 0.0)
    same_name = [leaf for leaf in leaves if leaf.split(".")[-1] == key.split(".")[-1]]
    nearest = (same_name or near)[0]
    return UserError(f"{key}: no such config key (in {where}); did you mean {nearest}?")


def _build(cls: Any, values: dict[str, Any], prefix: str, where: str) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for f in dataclasses.fields(cls):
        if f.name not in values:
            continue
        hint, value, key = hints[f.name], values[f.name], prefix + f.name
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UserError(f"{key}={value!r} (in {where}): is a section; set one of its keys")
            arguments[f.name] = _build(hint, value, f"{key}.", where)
        else:
            arguments[f.name] = _typed(value, hint, key, where)
    return cls(**arguments)


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _typed(value: Any, hint: Any, key: str, where: str) -> Any:
    """`value` as the type `hint` asks for, or a UserError that says what was wanted."""
    if _is_union(hint):
        if value is None:
            return None
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        wanted = " or ".join(repr(c) for c in choices if c != "")
        raise UserError(f"{key}={value!r} (in {where}): must be {wanted}")
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        if isinstance(value, (tuple, list)):
            return tuple(_typed(v, item, key, where) for v in value)
        raise UserError(f"{key}={value!r} (in {where}): must be a tuple of {item.__name__}, as in (1, 2)")
    is_bool = isinstance(value, bool)
    if hint is float and isinstance(value, (int, float)) and not is_bool:
        return float(value)
    if isinstance(value, hint) and is_bool == (hint is bool):
        return value
    raise UserError(f"{key}={value!r} (in {where}): must be of type {hint.__name__}, not {type(value).__name__}")
