"""Cache of prepared data: one folder per entry, created atomically."""

import contextlib
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator

from mtp_jax.config import DataConfig, UserError


def root(data: DataConfig) -> pathlib.Path:
    """Returns data.cache_dir, else $MTP_JAX_CACHE, else ~/.cache/mtp_jax."""
    return pathlib.Path(data.cache_dir or os.environ.get("MTP_JAX_CACHE") or "~/.cache/mtp_jax").expanduser()


def key_of(*parts: object) -> str:
    """Returns a key for `parts` (JSON values), a hash of them."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def entry(folder: pathlib.Path, key: str, build: Callable[[pathlib.Path], None]) -> pathlib.Path:
    """Returns the folder `folder/key`, built by the first process that needs it.

    `build` fills a temporary folder, which is renamed when complete, so a process that is killed or races another never
    leaves an incomplete entry. The lock only avoids building twice: on file systems without locks the rename is enough.

    Raises:
      UserError: the cache cannot be written.
    """
    final = folder / key
    if final.is_dir():
        return final
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f".{key}.lock"):
            if not final.is_dir():
                _build(final, build)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise UserError(f"data.cache_dir={folder.parent}: cannot be written ({reason}); name another folder") from error
    return final


def _build(final: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
    temporary = final.with_name(f".{final.name}-{uuid.uuid4().hex}")
    temporary.mkdir()
    try:
        build(temporary)
        try:
            temporary.rename(final)
        except OSError:
            if not final.is_dir():  # else another process was first, with the same content
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextlib.contextmanager
def _locked(path: pathlib.Path) -> Iterator[None]:
    with open(path, "a") as file:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
