"""Cache of prepared data: one folder per entry, created atomically."""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

from mtp_jax import storage
from mtp_jax.config import DataConfig, UserError
from mtp_jax.errors import first_line, warn_once

CHECKSUMS = ".checksums.json"
_ALL_BYTES, _SAMPLE = 64 * 2**20, 2**16


def root(data: DataConfig) -> pathlib.Path:
    """Returns data.cache_dir, else $MTP_JAX_CACHE, else ~/.cache/mtp_jax.

    Raises:
      UserError: a URL.
    """
    text = data.cache_dir or os.environ.get("MTP_JAX_CACHE") or "~/.cache/mtp_jax"
    if storage.is_url(text):
        raise UserError(f"data.cache_dir={text}: tokens are mapped into memory, which needs a local folder; name one")
    storage.path(text, "data.cache_dir")  # raises UserError if it is no path
    return pathlib.Path(text).expanduser()


def key_of(*parts: object) -> str:
    """Returns a key for `parts` (JSON values), a hash of them."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def entry(folder: pathlib.Path, key: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Returns the folder `folder/key`, built by the first process that needs it.

    `build` fills a temporary folder, which is renamed when complete, so a process that is killed or races another never
    leaves an incomplete entry. The lock only avoids building twice: on file systems without locks the rename is enough.

    An entry is compared with its checksums each time: all of a file of up to 64 MiB, samples of a larger one, or all of
    every file if $MTP_JAX_VERIFY_CACHE is 1. A corrupt entry is reported, set aside as NAME.corrupt and built again.

    Raises:
      UserError: the cache cannot be written. An OSError of `build` for another reason is raised as it is.
    """
    final = folder / key
    if os.path.isdir(final) and _problem(final) is None:  # of a name that is too long, pathlib raises
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{key}.lock"):
            if final.is_dir() and (problem := _problem(final)) is not None:
                warn_once(f"{final}: is corrupt ({problem}); it is set aside and built again")
                shutil.rmtree(f"{final}.corrupt", ignore_errors=True)
                final.rename(f"{final}.corrupt")
            if not final.is_dir():
                _build(final, build)
    except OSError as error:
        # Reading a source fails for reasons of its own
        is_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        if not is_full and not str(error.filename or "").startswith(str(folder)):
            raise
        reason = error.strerror or type(error).__name__
        raise UserError(f"data.cache_dir={folder.parent}: cannot be written ({reason}); name another folder") from error
    return final


def _build(final: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        build(temporary)
        (temporary / CHECKSUMS).write_text(json.dumps(_sums(temporary)))
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _problem(final: pathlib.Path) -> str | None:
    """Returns the first difference of an entry from its checksums; None if there is none, or no checksums, as in
    entries of earlier versions.
    """
    path = final / CHECKSUMS
    if not path.is_file():
        return None
    try:
        wanted = json.loads(path.read_text(encoding="utf-8"))
        found = _sums(final, is_full=os.environ.get("MTP_JAX_VERIFY_CACHE") == "1")
        for name in sorted(wanted.keys() | found.keys()):
            if name not in found or name not in wanted:
                return f"{name} is {'missing' if name in wanted else 'not of this entry'}"
            if any(wanted[name][key] != value for key, value in found[name].items()):
                return f"{name} is not what was written"
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        return f"{CHECKSUMS}: {first_line(error)}"
    return None


def _sums(folder: pathlib.Path, is_full: bool = True) -> dict[str, dict[str, int | str]]:
    """Returns size, hash of samples and, if `is_full`, hash of all bytes of every file by its name."""
    out: dict[str, dict[str, int | str]] = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_file() or path == folder / CHECKSUMS:
            continue
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            sums: dict[str, int | str] = {"size": size, "samples": _hash_of_samples(file, size)}
            if is_full:
                file.seek(0)
                sums["all"] = hashlib.file_digest(file, "blake2b").hexdigest()
        out[str(path.relative_to(folder))] = sums
    return out


def _hash_of_samples(file: BinaryIO, size: int) -> str:
    """Returns a hash of all bytes of a file of up to _ALL_BYTES, else of blocks at equal distances."""
    digest = hashlib.blake2b(digest_size=16)
    step = _SAMPLE if size <= _ALL_BYTES else -(-size // (_ALL_BYTES // _SAMPLE))
    for start in range(0, size, step):
        file.seek(start)
        digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
