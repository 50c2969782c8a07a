"""Paths on local disks and in object stores, and files and folders that appear complete or not at all.

A path is an `etils.epath.Path`: a local one, absolute, or a URL (`gs://BUCKET/NAME`). An object store has neither
folders nor a rename: a file is one object that is put at once, and a folder counts as complete when the file that is
written last (config.json) is there. `lease.Lease` keeps a folder to one process.
"""

from mtp_jax.storage.files import (
    PACKAGES,
    AnyPath,
    StorageError,
    copy,
    errors,
    exists,
    glob,
    is_dir,
    is_file,
    is_local,
    is_url,
    make_folder,
    names,
    open_read,
    path,
    read_bytes,
    read_text,
    reason,
    remove,
    size,
    version,
    write_bytes,
    write_text,
    writing,
)
from mtp_jax.storage.fresh import COMPLETE, fresh_folder, refuse_existing
from mtp_jax.storage.json_files import MOST_LEVELS, is_nested, read_json
