"""Plain text: parts of a file at blank lines."""

import io
from collections.abc import Iterable, Iterator
from typing import BinaryIO

from mtp_jax.config import SourceConfig
from mtp_jax.data.formats.opening import BadFile
from mtp_jax.data.records import BadRecord, Record, Records


def read(path: str, file: BinaryIO, settings: SourceConfig) -> Records:
    """Yields the documents of a UTF-8 text file; no character is changed but a byte order mark at its start dropped.

    The rest of a file that is not UTF-8 is one BadRecord.

    Raises:
      BadFile: a null character.
    """
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:  # newline="" keeps \r\n
        try:
            for number, text in enumerate(split_lines(_checked(lines), settings.max_document_chars), 1):
                yield Record(f"{path} record {number}", text)
        except UnicodeDecodeError as error:
            yield BadRecord(path, f"not UTF-8 ({error.reason})", "convert it or leave it out")


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


def _checked(lines: Iterable[str]) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if "\0" in line:
            raise BadFile(f"line {number} has a null character, as binary files have; remove it, or leave the file out")
        yield line
