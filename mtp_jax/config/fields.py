"""Metadata of the fields of the configuration: bounds of a value, and when it may change."""

import dataclasses
import functools
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mtp_jax.errors import UserError, short

T = TypeVar("T")
Number = int | float

# never: another value makes another run. resume: a run may continue with another value, since every step computes the
# same (training.num_steps also changes the schedules). new_run: the weights have the same meaning for every value, so a
# run may start from the weights of one with another value; fields that may change on resume may change here too.
# by_name: another value makes another run, whose state has the same form; a run continues with it if it is asked to by
# name (train.py --change=KEY), and its config.json records the change.
MayChange = Literal["never", "new_run", "by_name", "resume"]


@dataclass(frozen=True)
class Setting:
    """Metadata of one field.

    Attributes:
      at_least, at_most, above, below: bounds of a number, or of each number of a tuple; None: no such bound.
      when: the part of the model that must be in use for the bounds to apply ("mla", "gqa", "moe"); empty: always.
      may_change: see `MayChange`.
      was: the dotted key of the field in earlier versions, still accepted; empty: unchanged.
      renamed: (value in earlier versions, value now) of each renamed value; the old one is still accepted.
    """

    at_least: Number | None = None
    at_most: Number | None = None
    above: Number | None = None
    below: Number | None = None
    when: str = ""
    may_change: MayChange = "never"
    was: str = ""
    renamed: tuple[tuple[str, str], ...] = ()

    def problem(self, value: Any) -> str | None:
        """Returns the bound that `value` violates, as the end of a message; None if it is within all."""
        numbers = value if isinstance(value, tuple) else (value,)
        for number in numbers:
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                continue
            if isinstance(number, float) and not math.isfinite(number):
                return "must be finite"
            if self.at_least is not None and self.at_most is not None and isinstance(number, float):
                if not self.at_least <= number <= self.at_most:
                    return f"must lie between {_shown(self.at_least)} and {_shown(self.at_most)}"
            if self.at_least is not None and number < self.at_least:
                return f"must be at least {_shown(self.at_least)}"
            if self.above is not None and number <= self.above:
                return f"must be above {_shown(self.above)}"
            if self.at_most is not None and number > self.at_most:
                return f"must be at most {_shown(self.at_most)}"
            if self.below is not None and number >= self.below:
                return f"must stay below {_shown(self.below)}"
        return None


def setting(default: T, **metadata: Any) -> T:
    """Returns a dataclass field with a default and a `Setting` of `metadata`."""
    return field(default=default, metadata={"setting": Setting(**metadata)})


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Setting]]:
    """Yields (dotted key, value, metadata) of every value below a section (dataclass); in lists `sources[1].weight`."""
    for f in dataclasses.fields(section):
        key, value = prefix + f.name, getattr(section, f.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{key}.")
        elif isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value)):
            for i, item in enumerate(value):
                yield from walk(item, f"{key}[{i}].")
        else:
            yield key, value, f.metadata.get("setting", Setting())


def item_section(hint: Any) -> type | None:
    """Returns the section X of a type hint `tuple[X, ...]`, a list of sections; None for other hints."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) and isinstance(item, type) else None


def key_hints(root: type, prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> type hint of every value below a dataclass.

    A list of sections has its own key and those of its first section, `sources[0].weight`.
    """
    out: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(root).items():
        if dataclasses.is_dataclass(hint):
            out |= key_hints(typing.cast(type, hint), f"{prefix}{name}.")
            continue
        out[prefix + name] = hint
        if item := item_section(hint):
            out |= key_hints(item, f"{prefix}{name}[0].")
    return out


def value_of(section: Any, key: str) -> Any:
    """Returns the value of a dotted key below a section."""
    return functools.reduce(getattr, key.split("."), section)


def with_values(section: T, values: Mapping[str, Any]) -> T:
    """Returns `section` with the values of some dotted keys replaced."""
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    for key, value in values.items():
        name, _, rest = key.partition(".")
        if rest:
            nested.setdefault(name, {})[rest] = value
        else:
            own[name] = value
    inner = {name: with_values(getattr(section, name), below) for name, below in nested.items()}
    return dataclasses.replace(typing.cast(Any, section), **own, **inner)


def check_bounds(section: Any, in_use: Collection[str] = ()) -> None:
    """Checks every number below a section against the bounds of its field.

    Args:
      section: a dataclass, such as a Config.
      in_use: the conditions of `Setting.when` that hold.

    Raises:
      UserError: on the first value out of bounds, naming key, value and bound.
    """
    for key, value, found in walk(section):
        problem = found.problem(value) if not found.when or found.when in in_use else None
        if problem:
            raise UserError(f"{key}={short(value)}: {problem}")


def _shown(bound: Number) -> str:
    """Returns a bound in readable form: powers of two by their exponent."""
    power = math.log2(bound) if bound > 100 else 0.5
    return f"2^{power:.0f}" if power == round(power) else f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
