"""Files and folders on local disks and in object stores, read and written; a file is replaced atomically."""

import contextlib
import errno
import functools
import importlib.util
import logging
import math
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from mtp_jax.errors import UserError, first_line

os.environ.setdefault("EPATH_USE_TF", "false")  # the same client of object stores with and without TensorFlow
from etils import epath  # noqa: E402

AnyPath = str | os.PathLike[str]
PACKAGES = {"gs": "gcsfs", "s3": "s3fs"}  # scheme -> the package that serves it
_PART = 16 * 2**20  # bytes copied at once


class StorageError(OSError):
    """A file or object that cannot be read or written for a reason outside the run. One line. Exit code 1."""

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}" if self.filename else str(self.strerror)


def path(text: AnyPath, name: str = "") -> epath.Path:
    """Returns a path: a local one, absolute, or a URL.

    Args:
      text: a local path, `gs://BUCKET/NAME` or `s3://BUCKET/NAME`.
      name: the flag or setting with this value, for error messages.

    Raises:
      UserError: an empty name, or one with a null character; a URL of another scheme, without a bucket or with a single
        slash, or of a scheme whose package is not installed.
    """
    text = os.fspath(text)
    shown = f"{name}={text}" if name else text
    if not text and name:
        raise UserError(f"{shown}: is empty; give a path")
    if "\0" in text:
        raise UserError(f"{shown}: has a null character; remove it")
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):(/+)([^/]*)", text)
    if match is None or (match[1] not in PACKAGES and match[2] == "/"):
        return epath.Path(pathlib.Path(text).absolute())
    scheme, slashes, bucket = match.groups()
    if scheme not in PACKAGES:
        known = " or ".join(f"{each}://" for each in PACKAGES)
        raise UserError(f"{shown}: {scheme}:// is not supported; use a local path, {known}")
    if slashes != "//" or not bucket:
        raise UserError(f"{shown}: is not a URL of a bucket; write {scheme}://BUCKET/NAME")
    if importlib.util.find_spec(PACKAGES[scheme]) is None:
        raise UserError(f"{shown}: {scheme}:// needs a package: pip install {PACKAGES[scheme]}")
    _set_up(scheme)
    return epath.Path(text)


def is_local(path: AnyPath) -> bool:
    """Returns whether a path is one of the local file system, network mounts included."""
    return "://" not in os.fspath(path)


def is_url(text: AnyPath) -> bool:
    """Returns whether a text that a user gave is a URL, of whatever scheme."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", os.fspath(text)) is not None


@contextlib.contextmanager
def errors(path: AnyPath) -> Iterator[None]:
    """Turns the exceptions of an object store's client into StorageError; those of the local file system pass.

    Clients raise exceptions of their own, of aiohttp and of their authentication libraries, which are not OSErrors.
    FileNotFoundError, FileExistsError and UserError pass.
    """
    try:
        yield
    except (FileNotFoundError, FileExistsError, StorageError, UserError):
        raise
    except Exception as error:
        if is_local(path):
            raise
        raise StorageError(errno.EIO, first_line(error)[:300], os.fspath(path)) from error


def reason(error: OSError) -> str:
    """Returns the reason of an OSError, without its path."""
    return error.strerror or first_line(error)


def exists(path: AnyPath) -> bool:
    """Returns whether a file or folder exists; a name that is too long does not. Raises StorageError."""
    with errors(path):
        return epath.Path(path).exists()


def is_file(path: AnyPath) -> bool:
    """Returns whether a file exists. Raises StorageError."""
    if is_local(path):
        return os.path.isfile(path)
    with errors(path):
        return bool(_fs(path).isfile(os.fspath(path)))


def is_dir(path: AnyPath) -> bool:
    """Returns whether a folder exists; in an object store, whether an object is below it. Raises StorageError."""
    with errors(path):
        return epath.Path(path).is_dir()


def names(folder: AnyPath) -> list[str]:
    """Returns the names of the files and folders in a folder, sorted; [] if there is none. Raises OSError."""
    try:
        if is_local(folder):
            return sorted(os.listdir(folder))
        with errors(folder):
            found = _fs(folder).ls(os.fspath(folder), detail=False)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP) or isinstance(
            error, FileNotFoundError
        ):
            return []
        raise
    own = os.fspath(folder).partition("://")[2].rstrip("/")
    return sorted({each.rstrip("/").rpartition("/")[2] for each in found if each.rstrip("/") != own})


def size(path: AnyPath) -> int:
    """Returns the size of a file in bytes. Raises OSError."""
    if is_local(path):
        return os.stat(path).st_size
    with errors(path):
        return int(_fs(path).info(os.fspath(path))["size"])


def version(path: AnyPath) -> list[int | str]:
    """Returns values that change if a file is replaced: size and modification time, or generation. Raises OSError."""
    if is_local(path):
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    with errors(path):
        found = _fs(path).info(os.fspath(path))
    kept = (found.get(key) for key in ("size", "generation", "etag", "ETag", "LastModified"))
    return [value if isinstance(value, int) else str(value) for value in kept if value is not None]


def glob(pattern: str) -> list[str]:
    """Returns the URLs of the objects that a URL with wildcards matches, sorted; ** matches any number of folders.

    An object of exactly this name is the only match. Raises StorageError.
    """
    with errors(pattern):
        fs, scheme = _fs(pattern), pattern.partition("://")[0]
        if fs.isfile(pattern):
            return [pattern]
        found = fs.glob(pattern, detail=True)
    return sorted(f"{scheme}://{name}" for name, info in found.items() if info["type"] == "file")


def open_read(path: AnyPath) -> BinaryIO:
    """Opens a file for reading bytes; of an object, what is read is fetched in blocks. Raises OSError."""
    if is_local(path):
        return open(path, "rb")
    with errors(path):
        return cast(BinaryIO, _fs(path).open(os.fspath(path), "rb"))


def read_bytes(path: AnyPath, start: int = 0, stop: int | None = None) -> bytes:
    """Returns the bytes [start, stop) of a file, of an object by one ranged request. Raises OSError."""
    if is_local(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read() if stop is None else file.read(stop - start)
    with errors(path):
        if start == 0 and stop is None:
            return bytes(_fs(path).cat_file(os.fspath(path)))
        if stop is not None and stop <= start:
            return b""
        return bytes(_fs(path).cat_file(os.fspath(path), start=start, end=stop))


def read_text(path: AnyPath) -> str:
    """Returns the text of a UTF-8 file. Raises OSError, or UnicodeDecodeError."""
    return read_bytes(path).decode("utf-8")


def write_bytes(path: AnyPath, content: bytes) -> None:
    """Replaces a file atomically: a killed process leaves the old file or the new one. Raises OSError."""
    if not is_local(path):
        try:
            with errors(path):
                _fs(path).pipe_file(os.fspath(path), content)
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "no such bucket", os.fspath(path)) from error
        return
    final = pathlib.Path(path)
    partial = final.with_name(f".{final.name}.partial")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, final)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_text(path: AnyPath, text: str) -> None:
    """Replaces a file with a text in UTF-8, atomically. Raises OSError."""
    write_bytes(path, text.encode("utf-8"))


def make_folder(folder: AnyPath) -> None:
    """Creates a folder and its parents; nothing in an object store. Raises OSError."""
    if is_local(folder):
        with contextlib.suppress(FileNotFoundError):
            os.lstat(folder)  # a path too long for the system raises OSError; os.makedirs recurses into its parents
        os.makedirs(folder, exist_ok=True)


def remove(path: AnyPath) -> None:
    """Removes a file or a folder with everything in it, if there is one. Raises OSError."""
    if not is_local(path):
        with errors(path):  # not by `rm`, which takes brackets in a name for a pattern
            own = os.fspath(path).partition("://")[2]
            for each in _fs(path).find(os.fspath(path)):
                if each == own or each.startswith(f"{own}/"):
                    with contextlib.suppress(FileNotFoundError):
                        _fs(path).rm_file(each)
    elif os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        pathlib.Path(path).unlink(missing_ok=True)


@contextlib.contextmanager
def writing(path: AnyPath) -> Iterator[BinaryIO]:
    """Yields a new file to write bytes to in order; on disk, or one object, when the block ends without an error.

    Raises OSError; FileExistsError if a local file is there.
    """
    if is_local(path):
        with open(path, "xb") as local:
            yield local
            local.flush()
            os.fsync(local.fileno())
        return
    with errors(path):
        file = _fs(path).open(os.fspath(path), "wb", block_size=_PART, autocommit=False)
    try:
        yield file
    except BaseException:
        with contextlib.suppress(Exception):
            file.close()
            file.discard()
        raise
    with errors(path):
        file.close()
        file.commit()


def copy(source: AnyPath, target: AnyPath, most: float = math.inf) -> bool:
    """Copies a file to a new one. Returns False, and leaves nothing, if it is over `most` bytes.

    The bytes are counted while they are read: the size that a device reports is 0. Raises OSError.
    """
    count = 0
    with contextlib.suppress(_TooLarge), open_read(source) as file, writing(target) as output:
        while part := file.read(_PART):
            count += len(part)
            if count > most:
                raise _TooLarge
            output.write(part)
    if count > most:
        remove(target)
    return count <= most


class _TooLarge(Exception):
    pass


def _fs(path: AnyPath) -> Any:
    """Returns the fsspec file system of a URL."""
    import fsspec

    return fsspec.filesystem(os.fspath(path).partition("://")[0])


@functools.cache
def _set_up(scheme: str) -> None:
    """Configures the client of a scheme before its first use, as long as the user has not."""
    from fsspec import config

    # Another process may have written since a folder was listed
    config.conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)
    # Failures are reported in one line where they matter; the client would print a traceback for each retry, also
    # through a handler that some library has given to the root logger
    client = logging.getLogger(PACKAGES[scheme])
    client.addHandler(logging.NullHandler())
    client.propagate = False
