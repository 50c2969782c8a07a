"""Documents as text: the files to read, and their division into documents."""

import ast
import codecs
import glob
import io
import json
import os
import pathlib
import random
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.errors import short

_NOT_SOURCE = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
_JSON_LINES = (".jsonl", ".ndjson")


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


def match_files(files: str) -> list[str]:
    """Returns the files that match `data.files`, sorted within each pattern, each once.

    Args:
      files: comma-separated globs, local ones and URLs, or a Python tuple of them as text; ** matches any number of
        folders.

    Raises:
      UserError: no pattern, a pattern that matches no file, or one that names a folder.
    """
    paths: dict[str, None] = {}
    for pattern in _patterns(files):
        if storage.is_url(pattern):
            storage.path(pattern, "data.files")  # raises UserError if it cannot be served
            found = storage.glob(pattern)
            if not found:
                raise UserError(f"data.files={pattern}: matches no object; for a folder, write {pattern}/**")
            paths |= dict.fromkeys(found)
            continue
        expanded = os.path.expanduser(pattern)
        found = [expanded] if os.path.lexists(expanded) else sorted(glob.glob(expanded, recursive=True))
        if found == [expanded] and os.path.isdir(expanded):
            raise UserError(f"data.files={pattern}: is a folder; use {os.path.join(pattern, '**', '*.txt')}")
        for path in found:
            if os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path):  # read without an end
                raise UserError(f"data.files={pattern}: {path} is a device or a pipe, not a file; leave it out")
        found = [path for path in found if not os.path.isdir(path)]
        if not found:
            raise UserError(f"data.files={pattern}: matches no file (from {os.getcwd()})")
        paths |= dict.fromkeys(found)
    return list(paths)


def _patterns(files: str) -> list[str]:
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
                f"data.files={files}: not a tuple of strings, which a first ( or [ announces; for a file of this name "
                f"write ./{text}, or use comma-separated globs"
            )
    patterns = [pattern for pattern in patterns if pattern]
    if not patterns:
        raise UserError("data.files is empty: data.source=text_files needs globs, as in data.files='books/**/*.txt'")
    return patterns


def python_documents(paths: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Yields (path, text) of each file that is UTF-8; the library has a few in other encodings on purpose."""
    for path in paths:
        try:
            text = pathlib.Path(path).read_bytes().decode()
        except (UnicodeDecodeError, FileNotFoundError, PermissionError):
            continue
        if text:
            yield path, text


def text_documents(paths: Sequence[str], text_field: str, max_document_chars: int) -> Iterator[tuple[str, str]]:
    """Yields (origin, text) of each document: the lines of a .jsonl, parts of any other file.

    Args:
      text_field: the field of a .jsonl that holds the text.
      max_document_chars: the longest part, see `split_lines`.

    Raises:
      UserError: a file that cannot be read or is not UTF-8; a line that is not a JSON object with the field.
    """
    for path in paths:
        try:
            if path.endswith(_JSON_LINES):
                yield from _json_documents(path, text_field)
            else:
                # newline="" keeps \r\n, so no character is changed
                with io.TextIOWrapper(storage.open_read(path), encoding="utf-8", newline="") as file:
                    for i, text in enumerate(split_lines(file, max_document_chars)):
                        yield f"{path}:{i}", text
        except UnicodeDecodeError as error:
            raise UserError(f"data.files: {path}: not UTF-8 ({error.reason}); convert it or leave it out") from error
        except OSError as error:
            raise UserError(
                f"data.files: {path}: cannot be read ({storage.reason(error)}); repair it, or remove it from data.files"
            ) from error


def split_lines(lines: Iterable[str], max_chars: int) -> Iterator[str]:
    """Splits lines into documents of at most `max_chars`, after blank lines or else at line ends.

    A longer line is one document. The concatenated documents equal the concatenated lines: no character is lost.
    """
    document: list[str] = []  # lines; those before `boundary` end with a blank one
    size, boundary = 0, 0
    for line in lines:
        if document and size + len(line) > max_chars:
            at = boundary or len(document)
            yield "".join(document[:at])
            document, boundary = document[at:], 0
            size = sum(map(len, document))
            if document and size + len(line) > max_chars:  # the lines after the blank one are too long by themselves
                yield "".join(document)
                document, size = [], 0
        document.append(line)
        size += len(line)
        if not line.strip():
            boundary = len(document)
    if document:
        yield "".join(document)


def _json_documents(path: str, text_field: str) -> Iterator[tuple[str, str]]:
    # bytes, so that lines end at \n only: str.splitlines would also split at U+2028 inside a string
    with storage.open_read(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"data.files: {path} line {number}"
            try:
                value = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n"))
            except json.JSONDecodeError as error:
                if line.startswith(codecs.BOM_UTF8):
                    raise UserError(
                        f"{where}: begins with a byte order mark, as where files were joined; remove these three bytes"
                    ) from error
                raise UserError(
                    f"{where}: not JSON ({error.msg} at column {error.colno}); correct the line or remove it"
                ) from error
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{where}: not UTF-8 ({error.reason} at byte {error.start}); convert the file or remove the line"
                ) from error
            except RecursionError as error:
                raise UserError(f"{where}: objects or lists are nested too deeply; remove the line") from error
            except ValueError as error:  # an integer of more digits than Python reads
                raise UserError(f"{where}: a number has too many digits; write it as a string or remove it") from error
            if not isinstance(value, dict):
                raise UserError(f"{where}: not a JSON object, as in {{{json.dumps(text_field)}: ...}}")
            if text_field not in value:
                raise UserError(
                    f"{where}: has no field {text_field!r}, only {short(sorted(value))}; set data.text_field"
                )
            text = value[text_field]
            if not isinstance(text, str):
                kind = "null" if text is None else type(text).__name__
                raise UserError(
                    f"{where}: field {text_field!r} is {kind}, not a string; set data.text_field, or remove the line "
                    '(an empty string, "", is left out)'
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{where}: field {text_field!r} holds half a surrogate pair, not text; remove it"
                ) from error
            if text:
                yield f"{path}:{number}", text


def synthetic_documents(num_documents: int, seed: int) -> Iterator[str]:
    """Yields short texts with dependencies at every distance: sums, copies, reversals, counting, repeated words."""
    kinds = (_sums, _copies, _reversals, _counting, _refrain)
    for i in range(num_documents):
        rng = random.Random(f"{seed}/{i}")
        yield kinds[rng.randrange(len(kinds))](rng)


def _word(rng: random.Random) -> str:
    return "".join(rng.choice("abcdefghij") for _ in range(rng.randint(2, 8)))


def _sums(rng: random.Random) -> str:
    pairs = [(rng.randint(0, 99), rng.randint(0, 99)) for _ in range(rng.randint(4, 24))]
    return "".join(f"{a} + {b} = {a + b}\n" for a, b in pairs)


def _copies(rng: random.Random) -> str:
    words = [_word(rng) for _ in range(rng.randint(4, 24))]
    return "".join(f"copy {w}: {w}\n" for w in words)


def _reversals(rng: random.Random) -> str:
    words = [_word(rng) for _ in range(rng.randint(4, 24))]
    return "".join(f"reverse {w}: {w[::-1]}\n" for w in words)


def _counting(rng: random.Random) -> str:
    start, step = rng.randint(0, 99), rng.randint(1, 9)
    return "count: " + " ".join(str(start + step * i) for i in range(rng.randint(8, 48))) + "\n"


def _refrain(rng: random.Random) -> str:
    line = " ".join(_word(rng) for _ in range(rng.randint(2, 6)))
    return f"{line}\n" * rng.randint(3, 12)
