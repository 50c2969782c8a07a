"""Steps that are read and verified by the checksums of their arrays.

orbax restores a flipped byte without an error. Checksums are computed on the devices, when an array is saved and again
when it was restored, so no file is read twice and the mesh and number of processes may differ.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from mtp_jax import storage
from mtp_jax.errors import and_more
from mtp_jax.training import checksums, chunked_checkpoint, file_checksums
from mtp_jax.training.checkpoint_folder import (
    INTEGRITY,
    STATE,
    CheckpointError,
    Folder,
    UnusableCheckpoint,
    attempt,
    of_first_process,
    report,
)
from mtp_jax.typing import PyTree

_STORE_FAILURES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED")

_T = TypeVar("_T")


class _Corrupt(ValueError):
    """A step that fails verification."""


def newest_valid(folder: Folder, step: int | None, read: Callable[[int], _T]) -> tuple[int, _T]:
    """Returns the newest step that `read` does not find corrupt, and what it returned.

    Args:
      step: the only step to try; None: all.
      read: one of the functions below, of a step.

    Raises:
      CheckpointError: no such step, or none that is valid.
    """
    found = of_first_process(folder.steps())
    if not found or step not in (None, *found):
        wanted = "has no checkpoints" if step is None else f"has no step {step}; it has {found or 'none'}"
        raise UnusableCheckpoint(f"{folder.path}: {wanted}")
    steps = found if step is None else [step]
    problems: list[tuple[int, _Corrupt]] = []
    for each in reversed(steps):
        try:
            value = read(each)
        except _Corrupt as error:
            problems.append((each, error))
            continue
        for corrupt, problem in problems:
            report(f"checkpoint {folder.path / str(corrupt)} is corrupt: {problem}")
        return each, value
    raise UnusableCheckpoint(
        f"{folder.path}: none of its checkpoints is valid (steps {steps}; {problems[0][0]}: {problems[0][1]}"
        f"{and_more(problems)}); restore one from a copy, or remove them to start over"
    )


def restore(folder: Folder, step: int, abstract: dict[str, PyTree], is_part: bool) -> dict[str, PyTree]:
    """Reads a step in the dtypes in which it was saved, verifies and casts it.

    Args:
      abstract: ShapeDtypeStructs. A leaf without a sharding is placed on the first device.
      is_part: whether the step may have more leaves.
    """
    listed = {leaf.path: leaf for leaf in _together(folder, lambda: list_leaves(folder, step))}
    _check_fits(f"{folder.path / str(step)}", listed, checksums.flatten(abstract), is_part)

    def saved(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        # Without a sharding orbax would use the devices that saved it.
        sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(listed[checksums.leaf_path(path)].dtype), sharding=sharding)

    item = jax.tree_util.tree_map_with_path(saved, abstract)
    arguments = ocp.args.PyTreeRestore(
        item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
    )
    item_folder = folder.for_orbax(step) / STATE
    state = _together(folder, lambda: ocp.PyTreeCheckpointHandler().restore(item_folder, args=arguments))
    for leaf in checksums.list_leaves(state, check_finite=False):
        _compare(listed[leaf.path], leaf.sums)
    return jax.tree.map(lambda leaf, want: leaf.astype(want.dtype), state, abstract)


def open_arrays(
    folder: Folder, step: int, names: tuple[str, ...]
) -> dict[checksums.Path, chunked_checkpoint.StoredArray]:
    """Opens the arrays of the named parts of a step, after a pass over their chunks that verifies them."""

    def opened() -> dict[checksums.Path, chunked_checkpoint.StoredArray]:
        found = {}
        for leaf in list_leaves(folder, step):
            if leaf.path[0] in names:
                found[leaf.path] = chunked_checkpoint.open_array(folder.for_orbax(step) / STATE, leaf.path)
                _compare(leaf, found[leaf.path].sums())
        return found

    return _together(folder, opened)


def list_leaves(folder: Folder, step: int) -> list[checksums.Leaf]:
    """Returns the list of leaves that was stored with a step. Raises OSError or ValueError."""
    try:
        text = storage.read_text(folder.path / str(step) / INTEGRITY / "metadata")  # JsonSave's file name
    except FileNotFoundError:
        return file_checksums.list_leaves(folder.path, step, folder.for_orbax(step) / STATE)
    return checksums.from_json(text)


def _together(folder: Folder, read: Callable[[], _T]) -> _T:
    """Returns read().

    Raises:
      _Corrupt: `read` failed on some process.
      CheckpointError: the same, because the store failed: the files may be valid.
    """

    def describe(error: Exception) -> str:  # orbax and tensorstore raise errors of any type for corrupt bytes
        is_corrupt = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
        is_unavailable = isinstance(error, OSError) and not is_corrupt
        return "UNAVAILABLE: " * is_unavailable + folder.describe(error)

    value, problem = attempt(read, describe)
    if problem.startswith(_STORE_FAILURES):
        raise CheckpointError(f"{folder.path}: cannot be read: {problem}; try again")
    if problem:
        raise _Corrupt(problem)
    return value  # type: ignore[return-value]


def _compare(leaf: checksums.Leaf, sums: checksums.Sums | None) -> None:
    if leaf.sums is not None and sums != leaf.sums:
        raise _Corrupt(f"{leaf.name} is not what was written")


def _check_fits(
    shown: str, saved: dict[checksums.Path, checksums.Leaf], wanted: dict[checksums.Path, Any], is_part: bool
) -> None:
    """Compares names and shapes of the saved leaves with those of the run."""
    missing = ["/".join(path) for path in wanted if path not in saved]
    extra = ["/".join(path) for path in saved if path not in wanted and not is_part]
    differing = [
        f"{leaf.name} is {leaf.shape}, this run's is {tuple(wanted[path].shape)}"
        for path, leaf in saved.items()
        if path in wanted and leaf.shape != tuple(wanted[path].shape)
    ]
    problems = [f"has no {missing[0]}{and_more(missing)}"] if missing else []
    problems += [f"has {extra[0]}{and_more(extra)}, which this run has not"] if extra else []
    problems += [f"{differing[0]}{and_more(differing)}"] if differing else []
    if problems:
        raise UnusableCheckpoint(f"{shown}: is of another model: {'; '.join(problems)}")
