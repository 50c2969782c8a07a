"""Folders that appear complete or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterator

from etils import epath

from mtp_jax.errors import UserError, warn_once
from mtp_jax.storage.files import AnyPath, StorageError, is_file, is_local, names, path, remove

COMPLETE = "config.json"  # the file of a folder that is written last


def refuse_existing(target: AnyPath) -> None:
    """Raises UserError if `target` exists and is not an empty folder."""
    final = path(target)
    found = names(final)
    if found and not is_local(final) and COMPLETE not in found:
        raise UserError(
            f"{target}: is being written, or was left by a process that was killed (it has no {COMPLETE}); remove it, "
            "or give another folder"
        )
    if found or is_file(final):
        raise UserError(f"{target}: exists already; give a folder that does not")


@contextlib.contextmanager
def fresh_folder(target: AnyPath, num_bytes: int = 0) -> Iterator[epath.Path]:
    """Yields a folder to fill, which is complete at `target` when the block ends and removed if the block fails.

    On a local disk the folder is next to the target until then, as .NAME.partial-XXXXXXXX, and is renamed. A killed
    process leaves it behind; the next one reports it. In an object store it is the target, and the block must write
    config.json last: a folder without it is not complete.

    Args:
      num_bytes: number of bytes to be written; refused at once if the disk has less free space.

    Raises:
      UserError: target exists and is not empty, its parent cannot be written, or the disk is full.
      StorageError: the object store fails.
    """
    refuse_existing(target)
    final = path(target)
    if is_local(final):
        with _renamed_folder(target, num_bytes) as partial:
            yield partial
        return
    try:
        yield final
    except BaseException:
        with contextlib.suppress(OSError):
            remove(final)
        raise


@contextlib.contextmanager
def _renamed_folder(target: AnyPath, num_bytes: int) -> Iterator[epath.Path]:
    final = pathlib.Path(target).resolve()
    prefix = f".{final.name}.partial-"
    for left in (name for name in names(final.parent) if name.startswith(prefix)):
        warn_once(f"{final.parent / left} is being written, or was left by a process that was killed; remove it then")
    partial = final.parent / f"{prefix}{uuid.uuid4().hex[:8]}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(final.parent).free
        if num_bytes > free:
            raise UserError(
                f"{target}: needs {num_bytes / 2**30:.1f} GiB and the disk has {free / 2**30:.1f}; free some or give "
                "another folder"
            )
        partial.mkdir()
        yield epath.Path(partial)
        if final.exists():  # empty; kept, as a process may have it as its current folder
            for each in sorted(partial.iterdir(), key=lambda path: (path.name == COMPLETE, path.name)):
                os.replace(each, final / each.name)
        else:
            os.rename(partial, final)
    except StorageError:
        raise
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}), and nothing was left there; give another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
