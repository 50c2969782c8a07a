"""Checkpoints of version 0.0, which have checksums of their files beside them; the next release drops them.

checkpoints/
  500.checksums.json        {file: {size, sha256}} of the files of 500
  500.checksums.0of2.json   the same from process 0 of 2, each of which wrote its share
"""

import hashlib
import re

import orbax.checkpoint as ocp
from etils import epath

from mtp_jax import storage
from mtp_jax.training import checksums


def list_leaves(directory: epath.Path, step: int, item: epath.Path) -> list[checksums.Leaf]:
    """Returns the leaves of a step whose files are those that were written; their own checksums are unknown.

    Args:
      directory: the folder of the checkpoints.
      item: the folder of the arrays of the step.

    Raises:
      ValueError: the checksums are incomplete or cannot be read, or a file differs from them.
    """
    parts: dict[int, list[str]] = {}
    for name in storage.names(directory):
        if match := re.fullmatch(rf"{step}\.checksums(?:\.\d+of(\d+))?\.json", name):
            parts.setdefault(int(match[1] or 1), []).append(name)
    whole = next((names for count, names in parts.items() if len(names) == count), None)
    if whole is None:
        raise ValueError("it has no list of its arrays: saving was interrupted, or an earlier version wrote it")
    files = {key: value for name in whole for key, value in storage.read_json(directory / name, "remove it").items()}
    if not files:
        raise ValueError("its checksums list no files")
    for name, entry in files.items():
        try:
            is_same = hashlib.sha256(storage.read_bytes(directory / str(step) / name)).hexdigest() == entry["sha256"]
        except (OSError, LookupError, TypeError) as error:
            raise ValueError(f"{name} is missing or its checksum cannot be read") from error
        if not is_same:
            raise ValueError(f"{name} is not what was written")
    tree = ocp.PyTreeCheckpointHandler().metadata(item).tree
    return [
        checksums.Leaf(path, tuple(leaf.shape), str(leaf.dtype), None) for path, leaf in checksums.flatten(tree).items()
    ]
