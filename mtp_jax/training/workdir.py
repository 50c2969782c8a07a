"""The folder of a run: its config.json, the lease of its process, and the checks that a run may continue in it.

A workdir, local or a URL of an object store, holds config.json (the resolved config), data.json (fingerprints of the
documents and the tokenizer), metrics.jsonl, TensorBoard events, checkpoints/ and, while a run writes to it, lease.json.
Every process of the run must see it under the same path.
"""

import contextlib
import json
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
from etils import epath

from mtp_jax import storage
from mtp_jax.config import Config, UserError, from_dict, to_dict, walk, with_own_tokenizer
from mtp_jax.data import Corpus
from mtp_jax.lease import Lease, cannot_write
from mtp_jax.storage import read_json
from mtp_jax.training.metrics import METRICS_FILE
from mtp_jax.typing import JsonObject

CONFIG_FILE = "config.json"
DATA_FILE = "data.json"
CHECKPOINTS = "checkpoints"
HISTORY = "history"  # key of config.json: the changes that were asked for by name


def open_workdir(
    workdir: storage.AnyPath,
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
    path = storage.path(workdir, "--workdir")
    if storage.is_file(path):
        raise UserError(f"--workdir={workdir}: is a file; give a folder")
    _check_kinds(workdir, path)
    has_config = storage.is_file(path / CONFIG_FILE)
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
    if not is_new and any(name.isdecimal() for name in storage.names(path / CHECKPOINTS)):
        check_has_config(path)
    values = to_dict(config) | ({HISTORY: history} if history else {})
    try:
        storage.make_folder(path)
        storage.write_text(path / CONFIG_FILE, json.dumps(values, indent=2) + "\n")
    except OSError as error:
        raise cannot_write(f"--workdir={workdir}", error) from error


@contextlib.contextmanager
def hold(workdir: storage.AnyPath, is_main: bool = True) -> Iterator[Lease | None]:
    """Keeps the workdir to this run: the main process holds its lease (`Lease`). Collective.

    Yields:
      The lease; None on the other processes.

    Raises:
      UserError: another run has the workdir, or it cannot be written; on every process.
      StorageError: the object store fails.
    """
    import jax
    from jax.experimental import multihost_utils

    with contextlib.ExitStack() as stack:
        lease, refusal = None, None
        try:
            lease = stack.enter_context(Lease(workdir)) if is_main else None
        except (UserError, OSError) as error:
            refusal = error
        if jax.process_count() > 1 and not multihost_utils.broadcast_one_to_all(np.asarray(refusal is None)):
            refusal = refusal or UserError(f"--workdir={workdir}: was refused to the first process; see its error")
        if refusal is not None:
            raise refusal
        yield lease


def check_data(workdir: storage.AnyPath, corpus: Corpus, is_main: bool = True, is_new: bool = False) -> None:
    """Checks that the documents and the tokenizer are those the run began with, and records those of a new run.

    Args:
      is_main: whether this process writes; the others only check.
      is_new: the run starts from its beginning, so that any data replace those of an earlier attempt.

    Raises:
      UserError: they differ; the message names what does.
    """
    path = storage.path(workdir, "--workdir") / DATA_FILE
    found = "" if is_new else data_differences(workdir, corpus)
    if found:
        raise UserError(
            f"--workdir={workdir}: holds a run on other data: {found}; restore them, use another folder (with "
            f"--config.init_from={workdir} for its weights), or remove {path} to go on with the new ones"
        )
    if is_main and (is_new or not storage.is_file(path)):
        try:
            storage.write_text(path, json.dumps(corpus.identity, indent=1) + "\n")
        except OSError as error:
            raise cannot_write(f"--workdir={workdir}", error) from error


def data_differences(workdir: storage.AnyPath, corpus: Corpus) -> str:
    """Returns how documents and tokenizer differ from those of the run in `workdir`, in words; "" if they do not.

    Raises:
      UserError: data.json cannot be read.
    """
    path = storage.path(workdir, "--workdir") / DATA_FILE
    if not storage.is_file(path):  # a run of an earlier version, or one that has not begun
        return ""
    old, new = storage.read_json(path, "remove it to go on with the data as they are"), corpus.identity
    if old.get("tokenizer") != new["tokenizer"]:
        return f"the tokenizer {corpus.config.data.tokenizer} has other ids"
    sources, before = new.get("sources", {"": new}), old.get("sources", {"": old})
    if sources.keys() != before.keys():
        return f"the sources were {', '.join(before) or 'one'} and are {', '.join(sources) or 'one'}"
    differences = [_difference(name, before[name], part) for name, part in sources.items()]
    return ", ".join(filter(None, differences))


def _difference(name: str, old: dict[str, Any], new: dict[str, Any]) -> str:
    """Returns how the documents of a source differ from those of before, in words; "" if they do not."""
    if old.get("documents") == new["documents"]:
        return ""
    shown = [f"{each.get('num_documents')} documents of {each.get('num_bytes')} bytes" for each in (old, new)]
    were = f" ({old.get('origin')})" if old.get("origin") != new["origin"] else ""
    source = new["origin"].partition(" of Python")[0]
    return f"the text of {f'{name} ({source})' if name else source} was {shown[0]}{were} and is {shown[1]}"


def _check_kinds(workdir: storage.AnyPath, path: epath.Path) -> None:
    """Refuses a folder in the place of a file of the run, and a file in that of its checkpoints, before a step."""
    for name in (CONFIG_FILE, DATA_FILE, METRICS_FILE):
        if storage.is_local(path) and storage.is_dir(path / name):
            raise UserError(
                f"--workdir={workdir}: {name} in it is a folder, not a file; remove it, or use another workdir"
            )
    if storage.is_file(path / CHECKPOINTS):
        raise UserError(
            f"--workdir={workdir}: {CHECKPOINTS} in it is a file, not a folder; remove it, or use another workdir"
        )


def check_has_config(workdir: epath.Path) -> None:
    """Raises UserError if a workdir with checkpoints has no config.json, so that their run is unknown."""
    if not storage.is_file(workdir / CONFIG_FILE):
        raise UserError(
            f"--workdir={workdir}: has checkpoints but no {CONFIG_FILE}, so the run they belong to is unknown; "
            "restore the file or use another folder"
        )


def read_config(workdir: storage.AnyPath, name: str = "--workdir") -> Config:
    """Returns the config of the run in `workdir`.

    Args:
      name: the flag or argument with this value, for error messages.

    Raises:
      UserError: no such folder, no config.json, or one that is not JSON or not a config.
    """
    path = storage.path(workdir, name) / CONFIG_FILE
    if not storage.is_file(path):
        problem = "no such folder; give the folder of a run"
        if storage.is_file(path.parent):
            problem = "is a file; give the folder of a run"
        elif storage.is_dir(path.parent):
            problem = f"has no {CONFIG_FILE}; give the folder of a run"
        raise UserError(f"{name}={workdir}: {problem}")
    values = read_json(path, "restore it or use another --workdir")
    if "model_type" in values:
        raise UserError(f"{path.parent}: is a Hugging Face folder; import it first (mtp_jax.tools.convert import)")
    return from_dict(with_own_tokenizer(values, path.parent), str(path))


def changes(config: Config, workdir: storage.AnyPath, by_name: Collection[str] = ()) -> list[str]:
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


def _history(path: storage.AnyPath) -> list[JsonObject]:
    """Returns the changes by name that config.json records; none if it is not a list."""
    found = read_json(storage.path(path) / CONFIG_FILE, "restore it or use another --workdir").get(HISTORY)
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
