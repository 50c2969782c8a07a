"""JSON: one object per line, an array of objects, or objects that follow each other. In UTF-8."""

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator
from json.decoder import WHITESPACE  # type: ignore[attr-defined]
from typing import Any, BinaryIO

from mtp_jax.config import SourceConfig
from mtp_jax.data.formats.opening import BadFile
from mtp_jax.data.records import FIELDS, BadRecord, Record, Records

_CHUNK = 1 << 20  # bytes read at once
_DECODER = json.JSONDecoder()


def read_lines(path: str, file: Iterable[bytes], settings: SourceConfig) -> Records:
    """Yields the object of each line that is not blank."""
    # bytes, so that lines end at \n only: str.splitlines would also split at U+2028 inside a string
    for number, line in enumerate(file, 1):
        if (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip():
            yield object_of(f"{path} line {number}", line, settings, is_first=number == 1)


def read(path: str, file: BinaryIO, settings: SourceConfig) -> Records:
    """Yields the objects of a .json file: the elements of its array, its lines, or its one object.

    A file of lines is read line by line, so a line that cannot be used is a BadRecord. The objects of an array are
    decoded one by one, in memory for one of them.

    Raises:
      BadFile: a file that is none of these.
      UnicodeDecodeError: an array or an object that is not UTF-8.
    """
    lines: list[bytes] = []
    while not lines or (lines[-1] and not lines[-1].removeprefix(codecs.BOM_UTF8).strip()):
        lines.append(file.readline(_CHUNK))  # a line without an end may be an array of any size
    first = lines[-1].removeprefix(codecs.BOM_UTF8).strip()
    if not first.startswith(b"["):
        if not lines[-1].endswith(b"\n"):
            lines[-1] += file.readline()
        if not _is_incomplete(lines[-1]):
            yield from read_lines(path, itertools.chain(lines, file), settings)
            return
    number = 0
    try:
        for number, value in enumerate(_values(_Text(b"".join(lines), file)), 1):
            yield _record(f"{path} record {number}", value, settings)
    except json.JSONDecodeError as error:
        raise BadFile(
            f"not JSON after record {number} ({error.msg}); give an array of objects, or one object per line"
        ) from error
    except RecursionError as error:
        raise BadFile(f"objects or lists of record {number + 1} are nested too deeply; remove it") from error
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # an integer of more digits than Python reads
        raise BadFile(f"a number of record {number + 1} has too many digits; write it as a string") from error


def _record(origin: str, value: Any, settings: SourceConfig) -> Record | BadRecord:
    if isinstance(value, dict):
        return Record(origin, value)
    fields = ", ".join(f"{json.dumps(getattr(settings, key))}: ..." for key in FIELDS[settings.records])
    return BadRecord(origin, "not a JSON object", f"write {{{fields}}}, or remove it")


def object_of(origin: str, content: bytes, settings: SourceConfig, is_first: bool = True) -> Record | BadRecord:
    """Returns the JSON object of a line or a record in bytes.

    Args:
      is_first: whether it is the first of a file, which may begin with a byte order mark.
    """
    try:
        value = json.loads(content.decode("utf-8-sig" if is_first else "utf-8").rstrip("\r\n"))
    except json.JSONDecodeError as error:
        if content.startswith(codecs.BOM_UTF8):
            return BadRecord(
                origin, "begins with a byte order mark, as where files were joined", "remove these three bytes"
            )
        return BadRecord(origin, f"not JSON ({error.msg} at column {error.colno})", "correct or remove it")
    except UnicodeDecodeError as error:
        return BadRecord(origin, f"not UTF-8 ({error.reason} at byte {error.start})", "convert or remove it")
    except RecursionError:
        return BadRecord(origin, "objects or lists are nested too deeply", "remove it")
    except ValueError:  # an integer of more digits than Python reads
        return BadRecord(origin, "a number has too many digits", "write it as a string, or remove it")
    return _record(origin, value, settings)


def _is_incomplete(line: bytes) -> bool:
    """Returns whether a line is the beginning of an object that goes on in the next one."""
    try:
        text = line.decode("utf-8-sig").rstrip()
        json.loads(text)
    except json.JSONDecodeError as error:
        return error.pos >= len(text)
    except (ValueError, RecursionError):
        pass
    return False


class _Text:
    """The text of a file from `at` on, decoded as far as it was needed."""

    def __init__(self, first: bytes, file: BinaryIO):
        self._file, self._is_last = file, False
        self._decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self._text, self._at = self._decode(first), 0

    def next(self) -> str:
        """Returns the next character that is not whitespace, without consuming it; "" at the end."""
        while True:
            self._at = WHITESPACE.match(self._text, self._at).end()
            if self._at < len(self._text) or self._is_last:
                return self._text[self._at : self._at + 1]
            self._read()

    def skip(self) -> None:
        """Consumes one character."""
        self._at += 1

    def value(self) -> Any:
        """Consumes and returns the next value. Raises JSONDecodeError, RecursionError or ValueError."""
        self.next()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError:
                if self._is_last:
                    raise
            else:
                if end < len(self._text) or self._is_last:  # else it may go on in the next chunk
                    self._at = end
                    return value
            self._read()

    def error(self, problem: str) -> json.JSONDecodeError:
        """Returns an error at the current place."""
        return json.JSONDecodeError(problem, self._text, self._at)

    def _read(self) -> None:
        rest = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK, len(rest)))  # a long value is not decoded again for each small chunk
        self._is_last = not chunk
        self._text, self._at = rest + self._decode(chunk, final=self._is_last), 0


def _values(text: _Text) -> Iterator[Any]:
    """Yields the elements of an array, or values that follow each other."""
    if text.next() != "[":
        while text.next():
            yield text.value()
        return
    text.skip()
    if text.next() == "]":
        text.skip()
    else:
        yield text.value()
        while (mark := text.next()) == ",":
            text.skip()
            yield text.value()
        if mark != "]":
            raise text.error("Expecting ',' delimiter" if mark else "The array has no end")
        text.skip()
    if text.next():
        raise text.error("Text after the end of the array")
