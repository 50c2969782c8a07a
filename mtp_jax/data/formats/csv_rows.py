"""Comma- and tab-separated values, with the names of the columns in the first row."""

import csv
import io
from typing import BinaryIO

from mtp_jax.config import SourceConfig
from mtp_jax.data.formats.opening import BadFile, split_suffix
from mtp_jax.data.records import BadRecord, Record, Records

_LONGEST = 2**31 - 1  # characters of a field


def read(path: str, file: BinaryIO, settings: SourceConfig) -> Records:
    """Yields the rows of a UTF-8 file; every value is a text, and a quoted one may contain line ends.

    Raises:
      BadFile: no names of columns, two columns of one name, or quotes that do not match.
      UnicodeDecodeError: not UTF-8.
    """
    csv.field_size_limit(_LONGEST)
    delimiter = "\t" if split_suffix(path)[0] == ".tsv" else ","
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as lines:
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            names = next(rows, None)
            if not names:
                raise BadFile("has no first row with the names of its columns; add one")
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise BadFile(f"has two columns of the name {twice!r}; rename one")
            line = rows.line_num + 1
            for row in rows:
                origin, line = f"{path} line {line}", rows.line_num + 1
                if not row:
                    continue
                if len(row) != len(names):
                    problem = f"has {len(row)} values for {len(names)} columns"
                    yield BadRecord(origin, problem, "quote values that contain the delimiter, or remove the row")
                    continue
                yield Record(origin, dict(zip(names, row, strict=True)))
        except csv.Error as error:
            raise BadFile(f"line {rows.line_num} is not valid ({error}); correct its quotes") from error
