"""Fields of the configuration: what a value may be, and when it may change, as metadata of each dataclass field."""

import dataclasses
import functools
import math
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from mtp_jax.errors import UserError

T = TypeVar("T")
Number = int | float

# never: another value is another run. resume: a run may continue with another one, since no step computes anything else
# (training.num_steps alone stretches the schedules). new_run: weights mean the same whatever it is, so that a run may
# start from the weights of one that has another; what may change at a resume may change there too.
MayChange = Literal["never", "new_run", "resume"]


@dataclass(frozen=True)
class Setting:
    """Metadata of one field.

    Attributes:
      at_least, at_most, above, below: bounds of a number, or of each number of a tuple; None: no such bound.
      when: the part of the model that must be in use for the bounds to count ("mla", "gqa", "moe"); empty: always.
      may_change: see `MayChange`.
      was: the dotted key that the field had in earlier versions, still understood; empty: this one.
      renamed: (value in earlier versions, value now) of each value that had another name, still understood.
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
        """The bound that `value` breaks, as the end of a message; None if it keeps all."""
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
    """A dataclass field with a default and a `Setting` of `metadata`."""
    return field(default=default, metadata={"setting": Setting(**metadata)})


def walk(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Setting]]:
    """Dotted key, value and metadata of every value below a section (a dataclass); in lists: `sources[1].weight`."""
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
    """The section X where a type hint is `tuple[X, ...]`, a list of sections."""
    item = typing.get_args(hint)[0] if typing.get_origin(hint) is tuple else None
    return item if dataclasses.is_dataclass(item) and isinstance(item, type) else None


def key_hints(root: type, prefix: str = "") -> dict[str, Any]:
    """Dotted key -> type hint of every value below a dataclass; the keys of a list of sections are those of its first,
    `sources[0].weight`, beside that of the list."""
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
    """The value of a dotted key below a section."""
    return functools.reduce(getattr, key.split("."), section)


def with_values(section: T, values: Mapping[str, Any]) -> T:
    """`section` with other values of some dotted keys."""
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
    """Check every number below a section against the bounds of its field.

    Args:
      section: a dataclass, such as a Config.
      in_use: what of the conditions named by `Setting.when` holds.

    Raises:
      UserError: on the first value out of bounds, naming key, value and bound.
    """
    for key, value, found in walk(section):
        problem = found.problem(value) if not found.when or found.when in in_use else None
        if problem:
            raise UserError(f"{key}={value}: {problem}")


def _shown(bound: Number) -> str:
    """A bound as people read it: powers of two by their exponent."""
    power = math.log2(bound) if bound > 100 else 0.5
    return f"2^{power:.0f}" if power == round(power) else f"{bound:,}" if isinstance(bound, int) else f"{bound:g}"
