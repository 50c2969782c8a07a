"""ArrayRecord: records of bytes, which are JSON objects or texts in UTF-8."""

import json
import os
import re
from collections.abc import Iterator
from typing import BinaryIO

from mtp_jax import storage
from mtp_jax.config import SourceConfig
from mtp_jax.data.formats import json_values
from mtp_jax.data.formats.opening import BadFile
from mtp_jax.data.records import BadRecord, Record, Records
from mtp_jax.errors import first_line

_READ_AT_ONCE = 64  # records


def read(path: str, file: BinaryIO, settings: SourceConfig) -> Records:
    """Yields the records of an ArrayRecord file: JSON objects if the first one is, else texts.

    Raises:
      BadFile: a file in an object store, one of a TFDS dataset, records of another encoding, a corrupt file.
    """
    del file  # the library opens a local file by its name
    folder = os.path.dirname(path) or "."
    if storage.is_file(os.path.join(folder, "dataset_info.json")):
        raise BadFile(f"is part of a TFDS dataset; give its folder as the source: data.source={folder}")
    if not storage.is_local(path):
        raise BadFile("ArrayRecord files are read from local disks only; copy it to one")
    is_json = False
    for number, content in enumerate(_contents(path), 1):
        if number == 1:
            is_json = _is_json(content)
        yield _record(f"{path} record {number}", content, is_json, settings)


def _contents(path: str) -> Iterator[bytes]:
    from array_record.python import array_record_module

    try:
        reader = array_record_module.ArrayRecordReader(path, "readahead_buffer_size:0,max_parallelism:0")
        if not reader.ok():
            raise BadFile("is not an ArrayRecord file, or a truncated one; copy or write it again")
        for start in range(0, reader.num_records(), _READ_AT_ONCE):
            yield from reader.read(start, min(start + _READ_AT_ONCE, reader.num_records()))
        reader.close()
    except (RuntimeError, ValueError, IndexError) as error:
        raise BadFile(f"is a corrupt ArrayRecord file ({first_line(error)}); copy or write it again") from error


def _is_json(content: bytes) -> bool:
    if re.search(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f]", content):
        raise BadFile("its records are binary, neither JSON nor text; write JSON objects, or give a TFDS folder")
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _record(origin: str, content: bytes, is_json: bool, settings: SourceConfig) -> Record | BadRecord:
    if is_json:
        return json_values.object_of(origin, content, settings)
    try:
        return Record(origin, content.decode())
    except UnicodeDecodeError as error:
        return BadRecord(origin, f"not UTF-8 ({error.reason} at byte {error.start})", "convert or remove it")
