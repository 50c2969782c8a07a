"""Old names of config keys and values (`Setting.was`, `Setting.renamed`), accepted with a notice of the new name."""

import copy
import functools
import re
import sys
from collections.abc import Mapping
from typing import Any

import ml_collections

from mtp_jax.config.fields import UserError, walk
from mtp_jax.config.schema import Config

MAX_NAMES = 3  # in one notice

_warned: set[str] = set()


def old_names(root: type) -> dict[str, str]:
    """Returns old dotted key -> new one, for every renamed field below a dataclass."""
    return {found.was: key for key, _, found in walk(root()) if found.was}


def current_key(key: str, root: type = Config) -> str:
    """Returns the current name of a key, with indices of lists in brackets."""
    key = re.sub(r"\.(\d+)(?=\.|$)", r"[\1]", key)
    new = old_names(root).get(key)
    if new:
        _warn_renamed({key: new})
    return new or key


def renamed(values: Mapping[str, Any], root: type = Config, where: str = "config") -> dict[str, Any]:
    """Returns nested values with every old key under its new name, and every renamed value.

    Raises:
      UserError: a key under both names.
    """
    out, found = copy.deepcopy(dict(values)), {}
    for old, new in old_names(root).items():
        section = _below(out, old)
        if section is None or _name(old) not in section:
            continue
        found[old] = new
        value, target = section.pop(_name(old)), out
        for part in new.split(".")[:-1]:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"{part}={target!r} (in {where}): is a section; set one of its keys")
        if _name(new) in target:
            raise UserError(f"{old} and {new} (in {where}): two names of one key; use {new}")
        target[_name(new)] = value
    for key, _, setting in walk(root()):
        section = _below(out, key) or {}
        for was, now in setting.renamed:
            if section.get(_name(key)) == was:
                section[_name(key)] = found[f"{key}={was}"] = now
    _warn_renamed(found)
    return out


class Section(ml_collections.ConfigDict):
    """A ConfigDict that accepts the old names of keys too, for reading and writing, so that old config files run."""

    _old: dict[str, str] = {}
    _prefix = ""

    def accept_old(self, old: dict[str, str], prefix: str) -> None:
        """Accepts the old names (dotted keys -> new ones) of this section, whose own dotted key is `prefix`."""
        object.__setattr__(self, "_old", old)
        object.__setattr__(self, "_prefix", prefix)

    def __setitem__(self, key: str, value: Any) -> None:
        section, name = self._current(key)
        super(Section, section).__setitem__(name, value)

    def __getitem__(self, key: str) -> Any:
        section, name = self._current(key)
        return super(Section, section).__getitem__(name)

    def _current(self, key: str) -> tuple["Section", str]:
        new = self._old.get(f"{self._prefix}{key}")
        if new is None:
            return self, key
        _warn_renamed({f"{self._prefix}{key}": new})
        *parents, name = new.removeprefix(self._prefix).split(".")
        return functools.reduce(getattr, parents, self), name


def _warn_renamed(names: dict[str, str]) -> None:
    """Prints the new name of each old name once, in one line."""
    fresh = [f"{old} is now {new}" for old, new in names.items() if old not in _warned]
    if fresh:
        more = f" and {len(fresh) - MAX_NAMES} more have new names" if len(fresh) > MAX_NAMES else ""
        print(f"note: {', '.join(fresh[:MAX_NAMES])}{more}; the next release drops the old ones", file=sys.stderr)
    _warned.update(names)


def _name(key: str) -> str:
    return key.rpartition(".")[2]


def _below(values: dict[str, Any], key: str) -> dict[str, Any] | None:
    """Returns the section that holds a key; None if it is absent."""
    for part in key.split(".")[:-1]:
        found = values.get(part)
        if not isinstance(found, dict):
            return None
        values = found
    return values
