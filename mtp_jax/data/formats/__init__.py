"""Readers of files, one file per format, each a generator of records in the order of the file.

    text.py          plain text, divided into documents     json_values.py   .jsonl, .ndjson, .json
    csv_rows.py      .csv, .tsv                             parquet.py       .parquet
    arrow.py         .arrow, .feather
    array_record.py  .arrayrecord, .array_record            opening.py       decompression, kinds of content

A reader takes the path, the file opened for reading and the settings of the source, and keeps no state outside itself.
It yields a BadRecord for a record that cannot be used, and raises BadFile for a file that cannot.
"""

import lzma
import os
import re
import zlib
from collections.abc import Callable, Iterable
from typing import BinaryIO

from mtp_jax import storage
from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data.formats import array_record, arrow, csv_rows, json_values, parquet, text
from mtp_jax.data.formats.opening import COMPRESSIONS, BadFile, opened, refuse_binary, split_suffix
from mtp_jax.data.records import Records
from mtp_jax.errors import first_line

Reader = Callable[[str, BinaryIO, SourceConfig], Records]

TEXTS: dict[str, Reader] = {  # may be compressed; files of any other suffix are plain text
    ".jsonl": json_values.read_lines,
    ".ndjson": json_values.read_lines,
    ".json": json_values.read,
    ".csv": csv_rows.read,
    ".tsv": csv_rows.read,
}
BINARIES: dict[str, Reader] = {
    ".parquet": parquet.read,
    ".arrow": arrow.read,
    ".feather": arrow.read,
    ".arrayrecord": array_record.read,
    ".array_record": array_record.read,
}


def read_files(paths: Iterable[str], settings: SourceConfig, prefix: str = "data.") -> Records:
    """Yields the records of files, each as what the end of its name states, in any letter case.

    Args:
      paths: local paths and URLs.
      settings: max_document_chars, and the names of the fields, which decide the columns to read.
      prefix: of the settings in messages, as in "data.mixture[1].".

    Yields:
      Records, and a BadRecord for each that cannot be used.

    Raises:
      UserError: a file that cannot be read, is truncated or corrupt, not UTF-8, or not of the format of its name.
      StorageError: the object store fails.
    """
    for path in paths:
        try:
            yield from _records(path, settings)
        except storage.StorageError:
            raise
        except BadFile as error:
            raise UserError(f"{prefix}files: {path}: {error}") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{prefix}files: {path}: not UTF-8 ({error.reason}); convert it or leave it out") from error
        except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
            _, compression = split_suffix(path)
            if compression and getattr(error, "errno", None) is None:  # those of the system have a number
                raise UserError(
                    f"{prefix}files: {path}: is a truncated or corrupt {COMPRESSIONS[compression]} file "
                    f"({first_line(error)}); compress or copy it again"
                ) from error
            reason = storage.reason(error) if isinstance(error, OSError) else first_line(error)
            raise UserError(
                f"{prefix}files: {path}: cannot be read ({reason}); repair it, or remove it from {prefix}files"
            ) from error


def _records(path: str, settings: SourceConfig) -> Records:
    suffix, compression = split_suffix(path)
    # TFDS writes NAME-train.array_record-00000-of-00001
    suffix = re.sub(r"-\d+-of-\d+$", "", suffix)
    if suffix in BINARIES and compression:
        raise BadFile(f"a compressed {suffix} file is not read; decompress it (the format compresses by itself)")
    if suffix in (".tfrecord", ".tfrecords"):
        folder = os.path.dirname(path) or "."
        raise BadFile(f"TFRecord files are not read; give a TFDS dataset by its folder, as in data.source={folder}")
    with opened(path) as file:
        if suffix in BINARIES:
            yield from BINARIES[suffix](path, file, settings)
        else:
            refuse_binary(file, compression)
            yield from TEXTS.get(suffix, text.read)(path, file, settings)
