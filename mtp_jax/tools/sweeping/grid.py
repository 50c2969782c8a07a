"""Grid of a sweep's runs: the product of its --over flags, each run with a name and a resolved config.

--over='mtp.kind=none,parallel,sequential'                     one key
--over='mtp.kind,mtp.depth=(none,1),(parallel,1),(parallel,3)' keys that vary together
--over='mtp.weight_values=(0.3,0.1),(0.3,0.3)'                 values that are tuples
--over='data.files="a/*.txt,b/*.txt","c/*.txt"'                a text with a comma, quoted
"""

import hashlib
import itertools
import re
from dataclasses import dataclass

from mtp_jax.config import Config, UserError, current_key, load_config, to_dict
from mtp_jax.mtp import reads
from mtp_jax.training.workdir import flat

FORMS = "write KEY=VALUE,VALUE or KEY,KEY=(VALUE,VALUE),(VALUE,VALUE)"
MAX_VALUE, MAX_NAME = 40, 200  # characters; file names may have 255


@dataclass(frozen=True)
class SweepRun:
    """A run: the name of its folder, its overrides for train.py, and the resulting config."""

    name: str
    overrides: tuple[str, ...]
    config: Config


def expand(config_file: str, fixed: list[str], overs: list[str]) -> list[SweepRun]:
    """Returns the runs of a sweep in order; the last --over varies fastest.

    A run without multi-token prediction ignores the other mtp keys: they are in neither its overrides nor its name, and
    the run occurs once for any number of their values.

    Args:
      config_file: as for train.py.
      fixed: `--config.section.key=value` for every run.
      overs: the --over flags.

    Raises:
      UserError: a flag cannot be parsed, a config cannot be resolved, or a run occurs twice.
    """
    swept = [parse_over(text) for text in overs]
    keys = [key for over in swept for key in over[0]]
    _check_keys(keys, fixed)
    runs: dict[str, SweepRun] = {}
    for parts in itertools.product(*swept):
        chosen = {key: value for part in parts for key, value in part.items()}
        config = load_config(config_file, fixed + _flags(chosen))
        used = {key: value for key, value in chosen.items() if reads(config.mtp.kind, key)}
        config = load_config(config_file, fixed + _flags(used))
        name = run_name(list(used), keys, config)
        if name in runs and len(used) == len(chosen):
            raise UserError(f"--over: lists {name} twice; give each value once")
        runs.setdefault(name, SweepRun(name, (*fixed, *_flags(used)), config))
    return list(runs.values())


def parse_over(text: str) -> list[dict[str, str]]:
    """Parses one --over flag into its settings, each a mapping from keys to values.

    Raises:
      UserError: the flag cannot be parsed.
    """
    left, equals, right = text.partition("=")
    keys = [current_key(key.strip()) for key in left.split(",")]
    if not equals or not all(keys):
        raise UserError(f"--over={text}: not understood; {FORMS}")
    out = []
    for item in _split(right, text):
        values = [item]
        if len(keys) > 1:
            values = _split(item[1:-1], text) if item[0] + item[-1] == "()" else []
            if len(values) != len(keys):
                raise UserError(f"--over={text}: {item} is not one value in parentheses for each of {left}; {FORMS}")
        out.append(dict(zip(keys, map(_unquoted, values), strict=True)))
    return out


def run_name(keys: list[str], all_keys: list[str], config: Config) -> str:
    """Returns a name as `kind=parallel,depth=3,seed=0`: the run's values of `keys`, each with the last part of its key
    if that is unique in `all_keys`. The name does not depend on other runs, so an extended sweep finds its folders."""
    last = [key.split(".")[-1] for key in all_keys]
    short = {key: name if last.count(name) == 1 else key for key, name in zip(all_keys, last, strict=True)}
    values = flat(to_dict(config))
    name = ",".join(f"{short[key]}={_name_of_value(values[key])}" for key in keys) or "run"
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}-{_digest(name)}"


def _check_keys(keys: list[str], fixed: list[str]) -> None:
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"--over: varies {key} twice; give all of its values in one place")
        for override in fixed:
            if override.startswith(f"--config.{key}="):
                raise UserError(f"{override}: --over varies {key}; give it in one place only")


def _flags(chosen: dict[str, str]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in chosen.items()]


def _split(text: str, flag: str) -> list[str]:
    """Splits at commas outside parentheses, brackets and quotes."""
    parts, level, quote = [""], 0, ""
    for char in text:
        at_start = not parts[-1].strip() or parts[-1].rstrip()[-1] in "([,"
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"" and at_start:
            quote = char
        elif char in "([":
            level += 1
        elif char in ")]":
            level -= 1
        elif char == "," and level == 0:
            parts.append("")
            continue
        parts[-1] += char
        if level < 0:
            break
    if level or quote:
        raise UserError(f"--over={flag}: parentheses or quotes do not match; {FORMS}")
    parts = [part.strip() for part in parts]
    if not all(parts):
        raise UserError(f"--over={flag}: has an empty value; an empty text is written ''")
    return parts


def _unquoted(value: str) -> str:
    is_quoted = len(value) > 1 and value[0] == value[-1] and value[0] in "'\""
    return value[1:-1] if is_quoted else value


def _name_of_value(value: object) -> str:
    """Returns a value as part of a folder's name; values that had to be changed or shortened get a digest."""
    if isinstance(value, tuple):
        return "_".join(map(_name_of_value, value)) or "empty"
    text = str(value).lower() if value is None or isinstance(value, bool) else str(value)
    safe = re.sub(r"[^A-Za-z0-9._+-]+", "_", text)
    return (safe or "empty") if safe == text and len(safe) <= MAX_VALUE else f"{safe[-MAX_VALUE:]}-{_digest(text)}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:6]
