"""The folder of a run: its config.json, and the check that a run may continue in it.

A workdir holds config.json (the resolved config), metrics.jsonl, TensorBoard events and checkpoints/. Every process
of the run must see it under the same path.
"""

import json
import os
import pathlib
from collections.abc import Collection
from typing import Any

from mtp_jax.config import Config, UserError, from_dict, to_dict, walk, with_own_tokenizer
from mtp_jax.storage import read_json, write_text
from mtp_jax.typing import JsonObject

CONFIG_FILE = "config.json"
CHECKPOINTS = "checkpoints"
HISTORY = "history"  # key of config.json: the changes that were asked for by name


def open_workdir(
    workdir: str | os.PathLike[str],
    config: Config,
    is_main: bool = True,
    *,
    is_new: bool = False,
    by_name: Collection[str] = (),
    step: int = 0,
) -> None:
    """Writes config.json into `workdir`, or checks that the existing one belongs to the same run.

    Args:
      workdir: the run's folder.
      config: the resolved config. A continued run may change the fields marked may_change="resume", which updates
        config.json.
      is_main: whether this process writes; the others only check.
      is_new: the run starts from its beginning, so that any config replaces that of an earlier attempt.
      by_name: keys marked may_change="by_name" that may change too; config.json records these changes.
      step: the step that the run continues from, for the record.

    Raises:
      UserError: `workdir` is a file or cannot be written; its config.json is invalid, or missing beside checkpoints; or
        it belongs to another run, with the keys that differ and both values.
    """
    path = pathlib.Path(workdir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--workdir={workdir}: is a file; give a folder")
    has_config = (path / CONFIG_FILE).exists()
    history: list[JsonObject] = []
    changed: list[str] = []
    if has_config and is_new:
        changed = _differences(read_config(workdir), config)
    elif has_config:
        changed = changes(config, workdir, by_name)
        history = _history(path) + _named(read_config(workdir), config, step)
    if not is_main:
        return
    if changed:
        print(f"{'starting over' if is_new else 'continuing'} with {', '.join(changed)}")
    if not is_new and not has_config and any(p.name.isdigit() for p in (path / CHECKPOINTS).glob("*")):
        raise UserError(
            f"--workdir={workdir}: has checkpoints but no {CONFIG_FILE}, so the run they belong to is unknown; "
            "restore the file or use another folder"
        )
    values = to_dict(config) | ({HISTORY: history} if history else {})
    _write(path, json.dumps(values, indent=2) + "\n")


def read_config(workdir: str | os.PathLike[str]) -> Config:
    """Returns the config of the run in `workdir`.

    Raises:
      UserError: no such folder, no config.json, or one that is not JSON or not a config.
    """
    path = pathlib.Path(workdir) / CONFIG_FILE
    if not path.parent.is_dir():
        raise UserError(f"--workdir={workdir}: no such folder")
    if not path.is_file():
        raise UserError(f"--workdir={workdir}: has no {CONFIG_FILE}; give the folder of a run")
    values = read_json(path, "restore it or use another --workdir")
    if "model_type" in values:
        raise UserError(f"{path.parent}: is a Hugging Face folder; import it first (mtp_jax.tools.convert import)")
    return from_dict(with_own_tokenizer(values, path.parent), str(path))


def changes(config: Config, workdir: str | os.PathLike[str], by_name: Collection[str] = ()) -> list[str]:
    """Returns the differences of `config` from the run in `workdir`, as `key old -> new`.

    Args:
      by_name: keys marked may_change="by_name" that may differ.

    Raises:
      UserError: its config.json cannot be used, or belongs to another run: a key differs that may not change.
    """
    saved = read_config(workdir)
    old, new = _values(saved), _values(config)
    kinds = {key: setting.may_change for c in (saved, config) for key, _, setting in walk(c)}
    allowed = {key for key, kind in kinds.items() if kind == "resume" or (kind == "by_name" and key in by_name)}
    bound = [key for key in old | new if old.get(key) != new.get(key) and key not in allowed]
    if bound:
        shown = ", ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in bound)
        flags = " ".join(f"--change={key}" for key in bound)
        can_change = all(kinds[key] == "by_name" for key in bound)
        remedy = f"set them back, go on with the new value by {flags}" if can_change else "set them back"
        raise UserError(
            f"--workdir={workdir}: holds another run: {shown}; {remedy}, or start from its weights in another folder "
            f"with --config.init_from={workdir}"
        )
    return _differences(saved, config)


def _values(config: Config) -> dict[str, Any]:
    return {key: value for key, value, _ in walk(config)}


def _differences(saved: Config, config: Config) -> list[str]:
    old, new = _values(saved), _values(config)
    return [f"{key} {old.get(key)!r} -> {new.get(key)!r}" for key in old | new if old.get(key) != new.get(key)]


def _named(saved: Config, config: Config, step: int) -> list[JsonObject]:
    """Returns the record of the changes that were asked for by name."""
    old = _values(saved)
    return [
        {"step": step, "key": key, "old": old[key], "new": value}
        for key, value, setting in walk(config)
        if setting.may_change == "by_name" and value != old[key]
    ]


def _history(path: pathlib.Path) -> list[JsonObject]:
    """Returns the changes by name that config.json records; none if it is not a list."""
    found = read_json(path / CONFIG_FILE, "restore it or use another --workdir").get(HISTORY)
    return found if isinstance(found, list) else []


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested config values to `section.key` -> value; those of a list of sections to `section.list[0].key`."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{key}.")
        elif isinstance(value, (list, tuple)) and any(isinstance(item, dict) for item in value):
            for i, item in enumerate(value):
                out |= flat(item, f"{prefix}{key}[{i}].")
        else:
            out[prefix + key] = value
    return out


def _write(path: pathlib.Path, text: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_text(path / CONFIG_FILE, text)
    except OSError as error:
        raise UserError(f"--workdir={path}: cannot be written ({error.strerror}); use another folder") from error
