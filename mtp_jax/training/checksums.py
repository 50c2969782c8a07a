"""Checksums of the files of a checkpoint step, stored beside its folder.

Each of n processes takes every n-th of the sorted files, both when writing and when verifying.
"""

import hashlib
import json
import pathlib
import re
from typing import TypedDict

from mtp_jax.storage import read_json, write_text


class FileSum(TypedDict):
    size: int
    sha256: str


_NAME = re.compile(r"(\d+)\.checksums(?:\.\d+of(\d+))?\.(?:json|partial)")


def write(directory: pathlib.Path, step: int, index: int, count: int) -> None:
    """Writes size and sha256 of this process's share of the step's files, into a file that is created atomically.

    Args:
      directory: the folder that holds the step's folder.
      index: index of this process.
      count: number of processes.
    """
    folder = directory / str(step)
    files = sorted(p for p in folder.rglob("*") if p.is_file())[index::count]
    sums = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    path = directory / (f"{step}.checksums.json" if count == 1 else f"{step}.checksums.{index}of{count}.json")
    write_text(path, json.dumps(sums, indent=1) + "\n")


def verify(directory: pathlib.Path, step: int, index: int, count: int) -> tuple[str | None, bool]:
    """Returns (the problem in this process's share of the step's files or None, whether checksums exist)."""
    folder = directory / str(step)
    if not any(folder.iterdir()):
        return "its folder is empty", False
    try:
        sums = _read(directory, step)
    except ValueError as error:
        return f"its checksums cannot be read: {error}", True
    if sums is None:
        return None, False
    for name in sorted(sums)[index::count]:
        path, entry = folder / name, sums[name]
        if not path.is_file():
            return f"{name} is missing", True
        if path.stat().st_size != entry["size"]:
            return f"{name} has {path.stat().st_size} of {entry['size']} bytes", True
        if _sha256(path) != entry["sha256"]:
            return f"{name} is not what was written", True
    return None, True


def remove_orphans(directory: pathlib.Path) -> None:
    """Removes checksums of steps that no longer exist."""
    for path in directory.glob("*.checksums*"):
        match = _NAME.fullmatch(path.name)
        if match and not (directory / match[1]).exists():
            path.unlink(missing_ok=True)


def _read(directory: pathlib.Path, step: int) -> dict[str, FileSum] | None:
    """Returns the sums of all files, or None if a process has not written its own."""
    by_count: dict[int, list[pathlib.Path]] = {}
    for path in directory.glob(f"{step}.checksums*.json"):
        match = _NAME.fullmatch(path.name)
        if match:
            by_count.setdefault(int(match[2] or 1), []).append(path)
    for count, paths in by_count.items():
        if len(paths) == count:
            return {name: entry for path in paths for name, entry in read_json(path, "remove it").items()}
    return None


def _sha256(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
