"""Benchmark problems from local files, in the folder that the variable MTP_DATA_DIR names, or one below it."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from mtp_jax.config import UserError
from mtp_jax.typing import JsonObject

VARIABLE = "MTP_DATA_DIR"


def folder() -> pathlib.Path:
    """The folder that holds the benchmarks' files.

    Raises:
      UserError: MTP_DATA_DIR is not set, or not a folder.
    """
    value = os.environ.get(VARIABLE, "")
    if not value:
        raise UserError(f"{VARIABLE}: is not set; set it to the folder that holds the benchmarks' files")
    path = pathlib.Path(value)
    if not path.is_dir():
        raise UserError(f"{VARIABLE}={value}: is not a folder; set it to the one that holds the benchmarks' files")
    return path


def find(name: str) -> pathlib.Path:
    """A file's path, in the folder or in one directly below it.

    Raises:
      UserError: no such file.
    """
    found = [path for path in (folder() / name, *sorted(folder().glob(f"*/{name}"))) if path.is_file()]
    if not found:
        raise UserError(f"{VARIABLE}={folder()}: has no {name}; put that file there or name another folder")
    return found[0]


def read_text(name: str) -> str:
    """The content of a file.

    Raises:
      UserError: no such file, or one that cannot be read as UTF-8.
    """
    return _text(find(name))


def _text(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); replace it in {VARIABLE}") from error


def read_json(name: str) -> JsonObject:
    """The object of a .json file.

    Raises:
      UserError: no such file, or not a JSON object.
    """
    return _parse(read_text(name), str(find(name)), ())


def read_jsonl(name: str, fields: Sequence[str] = ()) -> list[JsonObject]:
    """The objects of a file with one JSON object a line, empty lines left out.

    Args:
      name: of the file, relative to MTP_DATA_DIR.
      fields: what every object must have.

    Raises:
      UserError: no such file, a file without objects, or a line that is no JSON object or lacks a field.
    """
    path = find(name)
    return list(_objects(path, path.stat().st_mtime_ns, tuple(fields)))


@functools.lru_cache(maxsize=4)  # MMLU asks for its two files once for each of 57 subjects
def _objects(path: pathlib.Path, changed: int, fields: tuple[str, ...]) -> list[JsonObject]:
    del changed  # of the key: a file that has changed is read anew
    lines = _text(path).split("\n")
    out = [_parse(line, f"{path}:{number}", fields) for number, line in enumerate(lines, 1) if line.strip()]
    if not out:
        raise UserError(f"{path}: is empty; replace it in {VARIABLE}")
    return out


def _parse(line: str, where: str, fields: Sequence[str]) -> JsonObject:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: is not JSON ({error}); replace the file") from error
    if not isinstance(value, dict):
        raise UserError(f"{where}: is not a JSON object; replace the file")
    missing = [name for name in fields if name not in value]
    if missing:
        raise UserError(f"{where}: has no field {missing[0]!r}; replace the file by the benchmark's own")
    return value


def from_files(
    *, splits: Mapping[str, str], where: Mapping[str, object] | None = None, **metadata: object
) -> JsonObject:
    """`custom_dataset` of a yaml task whose `dataset_kwargs` name a .jsonl file for each split.

    Args:
      where: fields and the values that a problem must have to belong to the task.
      metadata: the task's own, which the harness passes on.

    Raises:
      UserError: as `read_jsonl`, or no problem has these values.
    """
    del metadata
    wanted = dict(where or {})
    rows = {split: read_jsonl(name, tuple(wanted)) for split, name in splits.items()}
    kept = {split: [r for r in each if all(r[f] == v for f, v in wanted.items())] for split, each in rows.items()}
    for split, each in kept.items():
        if not each:
            raise UserError(f"{find(splits[split])}: has no problem with {wanted}; replace the file")
    return dataset(**kept)


def dataset(**splits: Sequence[Mapping[str, object]]) -> JsonObject:
    """Splits as lm_eval's `custom_dataset` returns them: a `datasets.Dataset` each."""
    import datasets  # of the extra that brings lm_eval

    return {name: datasets.Dataset.from_list([dict(row) for row in rows]) for name, rows in splits.items()}
