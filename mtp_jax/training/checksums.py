"""Checksums of a checkpoint step's files, kept beside its folder.

Of several processes each takes every n-th of the sorted files, both when they are written and when they are verified.
"""

import hashlib
import json
import pathlib
import re
from typing import TypedDict

from mtp_jax.files import read_json, write_text


class FileSum(TypedDict):
    size: int
    sha256: str


_NAME = re.compile(r"(\d+)\.checksums(?:\.\d+of(\d+))?\.(?:json|partial)")


def write(directory: pathlib.Path, step: int, index: int, count: int) -> None:
    """Size and sha256 of this process's share of the step's files, into a file that appears complete or not at all.

    Args:
      directory: holds the step's folder.
      index, count: this process, of how many.
    """
    folder = directory / str(step)
    files = sorted(p for p in folder.rglob("*") if p.is_file())[index::count]
    sums = {str(p.relative_to(folder)): {"size": p.stat().st_size, "sha256": _sha256(p)} for p in files}
    path = directory / (f"{step}.checksums.json" if count == 1 else f"{step}.checksums.{index}of{count}.json")
    write_text(path, json.dumps(sums, indent=1) + "\n")


def verify(directory: pathlib.Path, step: int, index: int, count: int) -> tuple[str | None, bool]:
    """(what is wrong with this process's share of the step's files or None, whether there were checksums to tell)."""
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
    """Remove checksums of steps that are gone."""
    for path in directory.glob("*.checksums*"):
        match = _NAME.fullmatch(path.name)
        if match and not (directory / match[1]).exists():
            path.unlink(missing_ok=True)


def _read(directory: pathlib.Path, step: int) -> dict[str, FileSum] | None:
    """All files' sums, or None when some process has not written its own."""
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
