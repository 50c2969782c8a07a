"""Benchmark problems from local files, in the folder that the environment variable MTP_DATA_DIR names."""

import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from mtp_jax.config import UserError

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


def read_jsonl(name: str, fields: Sequence[str] = ()) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object a line, empty lines left out.

    Args:
      name: of the file, relative to MTP_DATA_DIR.
      fields: what every object must have.

    Raises:
      UserError: no such file, a file without objects, or a line that is no JSON object or lacks a field.
    """
    path = folder() / name
    if not path.is_file():
        raise UserError(f"{VARIABLE}={folder()}: has no {name}; put that file there or name another folder")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); replace it in {VARIABLE}") from error
    out = [_parse(line, f"{path}:{number}", fields) for number, line in enumerate(lines, 1) if line.strip()]
    if not out:
        raise UserError(f"{path}: is empty; replace it in {VARIABLE}")
    return out


def _parse(line: str, where: str, fields: Sequence[str]) -> dict[str, Any]:
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


def dataset(**splits: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Splits as lm_eval's `custom_dataset` returns them: a `datasets.Dataset` each."""
    import datasets  # of the extra that brings lm_eval

    return {name: datasets.Dataset.from_list([dict(row) for row in rows]) for name, rows in splits.items()}
