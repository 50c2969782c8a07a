"""Conversion of a config file and command-line overrides to a `Config`; rejects unknown keys and wrong types by name.

A config file is a Python file with a `get_config()` that returns an `ml_collections.ConfigDict`, usually a modified
`default_config()`. No other module uses ConfigDict. The config.json of a workdir is a config file too.
"""

import ast
import dataclasses
import difflib
import importlib.util
import os
import re
import sys
import traceback
import types
import typing
from typing import Any, Literal, TypeVar

import ml_collections
from etils import epath

from mtp_jax import storage
from mtp_jax.config import shipped
from mtp_jax.config.aliases import Section, current_key, old_names, renamed
from mtp_jax.config.fields import UserError, item_section, key_hints
from mtp_jax.config.schema import Config
from mtp_jax.errors import first_line, short
from mtp_jax.storage import MOST_LEVELS, is_nested, read_json

T = TypeVar("T")


def default_config() -> ml_collections.ConfigDict:
    """Returns every key with its default, for a config file to change. Setting a key that does not exist raises."""
    return to_config_dict(Config())


def to_config_dict(config: Any) -> ml_collections.ConfigDict:
    """Returns the locked ConfigDict of a Config (or another dataclass of sections).

    Fields that may be None become typed placeholders, lists of sections tuples of dicts.
    """
    return _config_dict(config, "", old_names(type(config))).lock()


def _config_dict(section: Any, prefix: str, names: dict[str, str]) -> Section:
    out, hints = Section(), typing.get_type_hints(type(section))
    for name, value in ((f.name, getattr(section, f.name)) for f in dataclasses.fields(section)):
        if dataclasses.is_dataclass(value):
            value = _config_dict(value, f"{prefix}{name}.", names)
        elif item_section(hints[name]):
            value = tuple(dataclasses.asdict(item) for item in value)
        elif value is None:
            value = ml_collections.config_dict.placeholder(_without_none(hints[name]))
        out[name] = value
    out.accept_old({old: new for old, new in names.items() if old.rpartition(".")[0] == prefix[:-1]}, prefix)
    return out


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a nested plain dict, as written to a workdir's config.json."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any], where: str) -> Config:
    """Returns a Config from nested plain values; see `build`."""
    return build(Config, values, where)


def build(root: type[T], values: dict[str, Any], where: str) -> T:
    """Returns a dataclass of sections from nested plain values.

    Args:
      root: Config, or another frozen dataclass whose fields are values, sections or `tuple[section, ...]`.
      values: any subset of the keys, under their current or old names; the rest have their defaults.
      where: the file the values come from, named in errors.

    Raises:
      UserError: an unknown key (with the nearest existing one), a value of the wrong type, two names of one key.
    """
    return _Reader(root, where).section(root, renamed(values, root, where), "")


def load_config(path: str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Runs a config file and applies command-line overrides.

    Args:
      path: a Python file with `get_config()`, the name of a shipped config, or the config.json of a workdir.
      overrides: strings `--config.section.key=value`; tuples in Python syntax, `true`/`false` for booleans.

    Raises:
      UserError: no such file, a file that does not run, an unknown key, a value of the wrong type.
    """
    return override(from_dict(_run_config_file(path), path), overrides)


def override(config: T, overrides: list[str] | tuple[str, ...]) -> T:
    """Returns `config`, a dataclass of sections, with command-line overrides.

    Keys inside lists of sections are `--config.data.sources[0].weight=2`, or with `.0.`.

    Raises:
      UserError: an unknown key, an index outside the list, a value of the wrong type, two names of one key.
    """
    root, values = type(config), to_dict(config)
    reader = _Reader(root, "the command line")
    given_names: dict[str, str] = {}
    hints = key_hints(root)
    for text in overrides:
        given, value = _parse_override(text)
        key = current_key(given, root)
        hint = hints.get(re.sub(r"\[\d+\]", "[0]", key))
        if hint is None:
            raise reader.unknown(given)
        if given_names.setdefault(key, given) != given:
            raise UserError(f"{given_names[key]} and {given} (in {reader.where}): two names of one key; use {key}")
        _set(values, key, _from_text(value, hint))
    return build(root, values, reader.where) if overrides else config


def _run_config_file(path: str) -> dict[str, Any]:
    path = shipped.find(path)
    if not storage.is_file(storage.path(path, "--config")):
        raise UserError(f"--config={path}: no such file; {shipped.suggestion(path)}")
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
        message = first_line(error).strip("'\"")
        if isinstance(error, SystemExit):
            message = f"exits with {error.code!r}; return the config from get_config() instead"
        raise UserError(f"{path}{line}: {message}") from error
    if isinstance(config, dict) and is_nested(config, MOST_LEVELS):
        raise UserError(
            f"{path}: get_config() returned a dict nested deeper than {MOST_LEVELS} levels; return a config"
        )
    if isinstance(config, ml_collections.ConfigDict):
        return config.to_dict()
    if isinstance(config, dict):
        return config
    raise UserError(f"{path}: get_config() returned {type(config).__name__}; return a ml_collections.ConfigDict")


def _read_json(path: str) -> dict[str, Any]:
    values = read_json(path, "give the config.json of a workdir", f"--config={path}")
    if "model_type" in values:
        raise UserError(f"--config={path}: not a config of a run; give the config.json of a workdir")
    return with_own_tokenizer(values, storage.path(path).parent)


def with_own_tokenizer(values: dict[str, Any], workdir: epath.Path) -> dict[str, Any]:
    """Returns the values of a config.json, with the workdir's own tokenizer where the named one does not exist.

    The record of earlier changes ("history") is left out. An imported model brings a copy of its tokenizer into the
    workdir; folders may have been moved since.
    """
    values = {key: value for key, value in values.items() if key != "history"}
    data = values.get("data")
    named = data.get("tokenizer") if isinstance(data, dict) else None
    if not isinstance(named, str) or named == "bytes" or storage.exists(storage.path(os.path.expanduser(named))):
        return values
    names = (name for name in ("tokenizer.json", "tokenizer.model") if storage.is_file(workdir / "hf" / name))
    if (name := next(names, None)) is None:
        return values
    own = workdir / "hf" / name
    print(f"data.tokenizer={named} is gone; using {own}", file=sys.stderr)
    return {**values, "data": {**values["data"], "tokenizer": str(own)}}


def _parse_override(override: str) -> tuple[str, str]:
    name, equals, value = override.partition("=")
    if not name.startswith("--config.") or not equals:
        raise UserError(f"{override}: not understood; overrides read --config.section.key=value")
    return name[len("--config.") :], value


def _from_text(text: str, hint: Any) -> Any:
    """Returns the value of a command-line string; one that does not parse stays a string for the type check."""
    kind = _without_none(hint)
    if kind is str or typing.get_origin(kind) is Literal:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):  # the last two: brackets or signs nested deeply
        return text


def _set(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets an existing key; raises UserError for an index beyond its list."""
    *parents, name = key.replace("[", ".").replace("]", "").split(".")
    node: Any = values
    for parent in parents:
        if parent.isdigit() and int(parent) >= len(node):
            list_key = key[: key.index("[")]
            raise UserError(f"{key}={value!r}: {list_key} has {len(node)} entries; set {list_key} as a whole")
        node = node[int(parent) if parent.isdigit() else parent]
    node[name] = value


def _without_none(hint: Any) -> Any:
    """Returns the type X of `X | None`; any other hint unchanged."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return next(a for a in typing.get_args(hint) if a is not type(None)) if is_union else hint


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Converts plain values to the types of the dataclass `root`, with errors that name the key and its file."""

    root: type
    where: str

    def section(self, cls: type[T], values: Any, prefix: str) -> T:
        if isinstance(values, ml_collections.ConfigDict):  # inside a list, where ConfigDict keeps it
            values = values.to_dict()
        if not isinstance(values, dict):
            raise UserError(f"{prefix[:-1]}={short(values)} (in {self.where}): is a section; set one of its keys")
        hints = typing.get_type_hints(cls)
        for name in values:
            if name not in hints:
                raise self.unknown(f"{prefix}{name}")
        for f in dataclasses.fields(typing.cast(Any, cls)):
            if f.name not in values and f.default is f.default_factory is dataclasses.MISSING:
                raise UserError(f"{prefix}{f.name} (in {self.where}): is missing; set it")
        return cls(**{name: self.value(value, hints[name], f"{prefix}{name}") for name, value in values.items()})

    def value(self, value: Any, hint: Any, key: str) -> Any:
        """Returns `value` as the type `hint`, or raises a UserError that states the expected type."""
        kind = _without_none(hint)
        if value is None and kind is not hint:
            return None
        if dataclasses.is_dataclass(kind):
            return self.section(typing.cast(type, kind), value, f"{key}.")
        if typing.get_origin(kind) is Literal:
            choices = typing.get_args(kind)
            if value in choices:
                return value
            wanted = "must be " + " or ".join(repr(c) for c in choices if c != "")
        elif typing.get_origin(kind) is tuple:
            item = typing.get_args(kind)[0]
            if isinstance(value, (tuple, list)):
                return tuple(self.value(v, item, f"{key}[{i}]") for i, v in enumerate(value))
            example = "[{...}, {...}]" if dataclasses.is_dataclass(item) else "(1, 2)"
            wanted = f"must be a tuple of {item.__name__}, as in {example}"
        else:
            is_bool = isinstance(value, bool)
            if kind is float and isinstance(value, (int, float)) and not is_bool:
                try:
                    return float(value)
                except OverflowError:
                    raise UserError(f"{key}={short(value)} (in {self.where}): must be finite") from None
            if isinstance(value, kind) and is_bool == (kind is bool):
                return value
            wanted = f"must be of type {kind.__name__}, not {type(value).__name__}"
        raise UserError(f"{key}={short(value)} (in {self.where}): {wanted}")

    def unknown(self, key: str) -> UserError:
        """Returns the error for a key that does not exist, with the nearest one that does."""
        keys = list(key_hints(self.root))
        near = difflib.get_close_matches(key, keys, 1, 0.0)
        same_name = [known for known in keys if known.split(".")[-1] == key.split(".")[-1]]
        return UserError(f"{key}: no such config key (in {self.where}); did you mean {(same_name or near)[0]}?")
