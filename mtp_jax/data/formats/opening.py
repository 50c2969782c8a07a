"""Opening of files: decompression by suffix, and the kind of content by its first bytes."""

import bz2
import contextlib
import gzip
import io
import lzma
import os
import re
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from mtp_jax import storage

COMPRESSIONS = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "Zstandard"}
_HEAD = 1 << 16
_KINDS = [  # the first bytes, the kind, its suffix or ""
    (rb"\x1f\x8b", "gzip", ".gz"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "bzip2", ".bz2"),
    (rb"\xfd7zXZ\x00", "xz", ".xz"),
    (rb"(\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)", "Zstandard", ".zst"),
    (rb"PAR1", "Parquet", ".parquet"),
    (rb"ARROW1\x00\x00", "Arrow", ".arrow"),
    (rb"\xff\xff\xff\xff", "Arrow", ".arrow"),  # a stream, without the name
    (rb"FEA1", "Feather V1", ""),
    (rb"PK\x03\x04", "zip", ""),
    (rb"%PDF-", "PDF", ""),
    (rb"\xff\xfe|\xfe\xff", "UTF-16", ""),
]


class BadFile(Exception):
    """A file that cannot be read as what it is. The text is `cause; remedy`; `read_files` adds the path."""


def split_suffix(path: str) -> tuple[str, str]:
    """Returns the suffix of the content and that of its compression in lower case: (".json", ".gz"), (".txt", "")."""
    rest, suffix = os.path.splitext(os.path.basename(path).lower())
    if suffix not in COMPRESSIONS:
        return suffix, ""
    return os.path.splitext(rest)[1], suffix


@contextlib.contextmanager
def opened(path: str) -> Iterator[BinaryIO]:
    """Yields a file to read bytes from, decompressed if its suffix is that of a compression.

    Raises:
      BadFile: a compression that is not that of the suffix.
      OSError: a file that cannot be read; StorageError for an object store.
    """
    _, compression = split_suffix(path)
    with contextlib.closing(_buffered(storage.open_read(path), path)) as file:
        if not compression:
            yield cast(BinaryIO, file)
            return
        kind = kind_of(file)
        if kind != COMPRESSIONS[compression]:
            found = "is empty" if not file.peek(1) else f"is {kind}" if kind else "is not compressed"
            remedy = "compress it again" if found == "is empty" else "rename it"
            raise BadFile(f"{found}, although its name ends in {compression}; {remedy}")
        with contextlib.closing(_buffered(_decompressed(file, compression))) as content:
            yield cast(BinaryIO, content)


def kind_of(file: BinaryIO | io.BufferedReader) -> str:
    """Returns the kind of a file's content by its first bytes, as in "gzip" or "Parquet"; "" for any other."""
    kind, _ = _kind_and_suffix(file)
    return kind


def refuse_binary(file: BinaryIO, compression: str) -> None:
    """Raises BadFile for binary content, which would be read as text.

    Args:
      file: at its beginning, where it still is afterwards.
      compression: suffix of the compression that was removed from it; "" if there was none.
    """
    kind, suffix = _kind_and_suffix(file)
    if kind == "Parquet" and not compression:  # any text may begin with these four letters
        file.seek(-4, os.SEEK_END)
        kind = kind if file.read(4) == b"PAR1" else ""
        file.seek(0)
    inside = f"holds, inside its {compression}," if compression else "is"
    if kind and suffix and not compression:
        raise BadFile(f"{inside} {kind}, not text; rename it to end in {suffix}")
    if kind:
        raise BadFile(f"{inside} {kind}, not text; convert it, or leave it out")
    if b"\0" in cast(io.BufferedReader, file).peek(1):
        raise BadFile(f"{inside} binary: it has null bytes; convert it to UTF-8 text, or leave it out")


def _kind_and_suffix(file: BinaryIO | io.BufferedReader) -> tuple[str, str]:
    head = cast(io.BufferedReader, file).peek(16)
    return next(((kind, suffix) for magic, kind, suffix in _KINDS if re.match(magic, head)), ("", ""))


def _decompressed(file: io.BufferedReader, suffix: str) -> Any:
    if suffix == ".gz":
        return gzip.GzipFile(fileobj=file)
    if suffix == ".bz2":
        return bz2.BZ2File(file)
    if suffix == ".xz":
        return lzma.LZMAFile(file)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")


def _buffered(file: Any, path: str = "") -> io.BufferedReader:
    if path and not storage.is_local(path):
        file = _Object(file, path)
    return io.BufferedReader(file, _HEAD)


class _Object(io.RawIOBase):
    """An object of an object store; errors of its client while it is read are StorageErrors."""

    def __init__(self, file: BinaryIO, path: str):
        self._file, self._path = file, path

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        with storage.errors(self._path):
            content = self._file.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def close(self) -> None:
        self._file.close()
        super().close()
