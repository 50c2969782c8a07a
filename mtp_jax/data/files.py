"""Names of files: those of the standard library, and those that data.files matches."""

import ast
import glob
import os
import pathlib
import sysconfig
from collections.abc import Iterable

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.data.records import Record, Records

_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def stdlib_files() -> list[str]:
    """Returns the files of the running interpreter's standard library, without its tests, sorted.

    Raises:
      UserError: an interpreter without .py files.
    """
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [s for s in subfolders if s not in _NOT_SOURCE]
        paths += [os.path.join(folder, name) for name in names if name.endswith(".py")]
    if not paths:
        raise UserError(f"data.source=python_source: no .py files in {root}; use data.source=text_files or synthetic")
    return sorted(paths)


def match_files(files: str, prefix: str = "data.") -> list[str]:
    """Returns the files that match `data.files`, sorted within each pattern, each once.

    Args:
      files: comma-separated globs, local ones and URLs, or a Python tuple of them as text; ** matches any number of
        folders.
      prefix: of the setting in messages, as in "data.mixture[1].".

    Raises:
      UserError: no pattern, a pattern that matches no file, or one that names a folder.
    """
    name = f"{prefix}files"
    paths: dict[str, None] = {}
    for pattern in _patterns(files, name):
        if storage.is_url(pattern):
            storage.path(pattern, name)  # raises UserError if it cannot be served
            found = storage.glob(pattern)
            if not found:
                raise UserError(f"{name}={pattern}: matches no object; for a folder, write {pattern}/**")
            paths |= dict.fromkeys(found)
            continue
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if found == [expanded] and os.path.isdir(expanded):
            raise UserError(f"{name}={pattern}: is a folder; use {os.path.join(pattern, '**', '*.txt')}")
        for path in found:
            if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):  # read without an end
                raise UserError(f"{name}={pattern}: {path} is a device or a pipe, not a file; leave it out")
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise UserError(f"{name}={pattern}: matches no file (from {os.getcwd()})")
        paths |= dict.fromkeys(found)
    return list(paths)


def _patterns(files: str, name: str) -> list[str]:
    text = files.strip()
    if not text.startswith(("(", "[")):
        patterns = [pattern.strip() for pattern in text.split(",")]
    else:
        try:
            patterns = list(ast.literal_eval(text))
            is_tuple = all(isinstance(pattern, str) for pattern in patterns)
        except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
            is_tuple = False
        if not is_tuple:
            raise UserError(
                f"{name}={files}: not a tuple of strings, which a first ( or [ announces; for a file of this name "
                f"write ./{text}, or use comma-separated globs"
            )
    patterns = [pattern for pattern in patterns if pattern]
    if not patterns:
        raise UserError(f"{name} is empty: data.source=text_files needs globs, as in data.files='books/**/*.txt'")
    return patterns


def python_records(paths: Iterable[str]) -> Records:
    """Yields the text of each file that is UTF-8; the library has a few in other encodings on purpose."""
    for path in paths:
        try:
            yield Record(path, pathlib.Path(path).read_bytes().decode())
        except (UnicodeDecodeError, FileNotFoundError, PermissionError):
            continue
