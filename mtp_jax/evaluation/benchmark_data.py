"""Benchmark problems from local files, in the folder that the variable MTP_DATA_DIR names or one directly below it."""

import functools
import json
import os
import pathlib
from collections.abc import Mapping, Sequence

from mtp_jax.config import UserError
from mtp_jax.typing import JsonObject

VARIABLE = "MTP_DATA_DIR"


def folder() -> pathlib.Path:
    """Returns the folder of the benchmarks' files.

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
    """Returns a file's path, in the folder or in one directly below it.

    Raises:
      UserError: no such file.
    """
    found = [path for path in (folder() / name, *sorted(folder().glob(f"*/{name}"))) if path.is_file()]
    if not found:
        raise UserError(f"{VARIABLE}={folder()}: has no {name}; put that file there or name another folder")
    return found[0]


def read_text(name: str) -> str:
    """Returns the content of a file.

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
    """Returns the object of a .json file.

    Raises:
      UserError: no such file, or not a JSON object.
    """
    return _parse(read_text(name), str(find(name)), ())


def read_jsonl(name: str, fields: Sequence[str] = ()) -> list[JsonObject]:
    """Returns the objects of a file with one JSON object per line, without empty lines.

    Args:
      name: name of the file, relative to MTP_DATA_DIR.
      fields: required fields of every object.

    Raises:
      UserError: no such file, a file without objects, or a line that is not a JSON object or lacks a field.
    """
    path = find(name)
    return list(_objects(path, path.stat().st_mtime_ns, tuple(fields)))


@functools.lru_cache(maxsize=4)  # MMLU reads its two files once for each of 57 subjects
def _objects(path: pathlib.Path, changed: int, fields: tuple[str, ...]) -> list[JsonObject]:
    del changed  # part of the key only: a changed file is read again
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
    """Reads one .jsonl file per split: the `custom_dataset` of a yaml task whose `dataset_kwargs` name the files.

    Args:
      splits: file name of each split.
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
    """Returns splits in the form of lm_eval's `custom_dataset`: a `datasets.Dataset` each."""
    import datasets  # installed with lm_eval by the optional extra

    return {name: datasets.Dataset.from_list([dict(row) for row in rows]) for name, rows in splits.items()}
