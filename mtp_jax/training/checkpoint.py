"""Checkpoints, written and read by orbax and verified by checksums of their arrays.

    checkpoints/                  a local folder or a URL
      500/commit_success.txt      written last by orbax: without it, 500 is not a checkpoint
      500/state/...               the arrays
      500/integrity/metadata      every array's name, shape, dtype and checksum (`checksums`)
      400.corrupt/                a step that failed verification, renamed when a run restarted from an older one
      450.superseded/             a step newer than the one that a run was told to restart from

orbax restores a flipped byte without an error. Checksums are computed on the devices, when an array is saved and again
when it was restored, so no file is read twice and the mesh and number of processes may differ.
Every process must see the folder (a local disk for one host; NFS, Lustre or an object store for several).
"""

import contextlib
import functools
import glob
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax.traverse_util import unflatten_dict
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from mtp_jax import storage
from mtp_jax.config import CheckpointConfig, UserError
from mtp_jax.errors import EXIT_UNUSABLE, and_more, first_line
from mtp_jax.training import checksums, chunked_checkpoint, file_checksums
from mtp_jax.training.saving import LAST_SAVE_DELAYS, SaveSchedule
from mtp_jax.typing import PyTree

ITEM, INTEGRITY = "state", "integrity"
_COMMITTED = atomicity.COMMIT_SUCCESS_FILE
_STORE_FAILURES = ("UNAVAILABLE", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "UNAUTHENTICATED")

_T = TypeVar("_T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be saved or restored. The message is one line. Exit code 1."""


class UnusableCheckpoint(CheckpointError):
    """A checkpoint that is missing, corrupt or of another model: the same command fails the same. Exit code 2."""

    exit_code = EXIT_UNUSABLE


class NonFiniteState(CheckpointError):
    """A state with NaN or infinite values, which is not saved. The message names the first such array."""


class _Corrupt(ValueError):
    """A step that fails verification."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints in one folder.

    Calls are collective: every process of the run makes them, in the same order.

    Attributes:
      directory: the folder, created by the first save.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        config: CheckpointConfig | None = None,
        last_save_delays: Sequence[float] = LAST_SAVE_DELAYS,
    ):
        """Opens a folder; creates nothing.

        Args:
          directory: a local path or a URL.
          config: how often to save, how many checkpoints to keep, and whether `save` returns before files are written;
            None: read-only.
          last_save_delays: seconds between the attempts of a save that must succeed.

        Raises:
          UserError: a URL that contains one of `*?[`, which orbax takes for a pattern.
        """
        self.directory = storage.path(directory)
        self._is_local = storage.is_local(self.directory)
        if glob.has_magic(os.fspath(self.directory)) and not self._is_local:
            raise UserError(f"{self.directory}: contains one of * ? [; use another name")
        self._config, self._last_save_delays = config, last_save_delays
        self._schedule = SaveSchedule(config.every if config else 1)
        self._checkpointer: ocp.AsyncCheckpointer | None = None  # made by the first save, and anew after a failed one
        self._link: tempfile.TemporaryDirectory[str] | None = None
        self._newest = -1  # committed step, known once the folder was prepared
        self._attempted: int | None = None  # last step given to `save`
        self._is_writing = False  # `_attempted`, in the background
        self._failure = ""  # of `_attempted`

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self.wait()
        finally:
            self.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first, valid or not."""
        return [step for step in self._numbered() if storage.is_file(self.directory / str(step) / _COMMITTED)]

    def is_due(self, step: int) -> bool:
        """Returns whether to save at `step`: at a multiple of config.every, or sooner after a failed save."""
        if self._is_writing and jax.process_count() == 1 and self._checkpointer is not None:
            try:
                self._checkpointer.check_for_errors()
            except Exception as error:
                self._finish(step, error)
        return self._schedule.is_due(step)

    def save(self, step: int, state: dict[str, PyTree], must_succeed: bool = False) -> None:
        """Writes `state` as `step` and removes the oldest steps beyond config.keep.

        Does nothing if `step` is the last one that this object saved. A save that fails, because of the store or a full
        disk, is reported in one line on stderr (an asynchronous one at a later call) and removes no earlier step.

        Args:
          step: the number of steps done.
          state: a dict of pytrees of arrays; `restore_part` reads some of them.
          must_succeed: wait until the step is on disk; if that fails, try again after each of `last_save_delays`.

        Raises:
          NonFiniteState: an array is not finite; nothing is written.
          CheckpointError: the folder holds a step this new or newer, or the save must succeed and has failed.
        """
        assert self._config is not None, "opened to read"
        if step == self._attempted and self._is_writing and not must_succeed:
            return
        self._finish(step)
        if step != self._attempted or self._failure:
            self._start(step, state)
        if must_succeed or not self._config.async_save:
            self._finish(step)
        for delay in self._last_save_delays if must_succeed else ():
            if not self._failure:
                break
            time.sleep(delay)
            self._start(step, state)
            self._finish(step)
        if must_succeed:
            self.wait()

    def restore_latest(
        self, abstract_state: dict[str, PyTree], step: int | None = None
    ) -> tuple[int, dict[str, PyTree]] | None:
        """Returns the newest valid step, or the given one, as (step, state); None if there are no steps.

        A step that fails verification is reported on stderr and skipped. The folders of steps newer than the restored
        one are renamed, so that training can save these steps again: to `<step>.corrupt`, or to `<step>.superseded` if
        `step` is given.

        Args:
          abstract_state: ShapeDtypeStructs with shardings. The mesh and process count may differ from those that saved;
            arrays are cast to these dtypes after they were verified.
          step: the step to restore.

        Raises:
          CheckpointError: no step is valid, or `step` is not; the newest valid one belongs to another model.
        """
        self.wait()
        found = _of_first_process(self.steps())
        if not found and step is None:
            return None
        restored, state = self._newest_valid(
            self._chosen(step), lambda each: self._restore(each, abstract_state, False)
        )
        newer = [each for each in found if each > restored]
        if newer and self._config is not None:
            if _process()[0] == 0:
                suffix = "corrupt" if step is None else "superseded"
                _report(f"{self.directory}: steps {newer} are renamed to {[f'{each}.{suffix}' for each in newer]}")
                for each in reversed(newer):
                    self._move_aside(each, suffix)
            _agreed("")  # the others wait until they are renamed
            self._newest, self._attempted = restored, None
        return restored, state

    def restore_part(self, step: int | None, abstract: dict[str, PyTree]) -> tuple[int, dict[str, PyTree]]:
        """Returns (step, part of the state) of `step`, or of the newest valid step if None; reads nothing else.

        Args:
          step: the step, or None.
          abstract: ShapeDtypeStructs of the leaves to read, a subset of those saved (`saved_part`), under the names
            they have in the state ("params", ...). A leaf without a sharding is placed on the first device.

        Raises:
          CheckpointError: no such step, no valid step, or a leaf that is missing or has another shape.
        """
        self.wait()
        return self._newest_valid(self._chosen(step), lambda each: self._restore(each, abstract, True))

    def open_part(self, names: tuple[str, ...]) -> tuple[int, dict[str, PyTree]]:
        """Returns (step, named parts) of the newest valid step as `chunked_checkpoint.StoredArray`s, read on indexing.

        All of their chunks are read once to verify them.

        Raises:
          CheckpointError: no step, or no valid one.
        """
        self.wait()

        def opened(step: int) -> dict[checksums.Path, chunked_checkpoint.StoredArray]:
            folder, found = self._orbax_root() / str(step) / ITEM, {}
            for leaf in self._listed(step):
                if leaf.path[0] in names:
                    found[leaf.path] = chunked_checkpoint.open_array(folder, leaf.path)
                    _compare(leaf, found[leaf.path].sums())
            return found

        steps = self._chosen(None)
        step, found = self._newest_valid(steps, lambda step: self._together(lambda: opened(step)))
        return step, {name: {} for name in names} | unflatten_dict(found)

    def saved_part(self, names: tuple[str, ...], step: int | None = None) -> dict[str, PyTree] | None:
        """Returns shapes and dtypes of the named parts as saved: nested dicts of ShapeDtypeStructs.

        Args:
          step: the step; None: the newest whose list of leaves can be read.

        Returns:
          The parts, or None if there is no such step.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                listed = self._listed(candidate)
            except (OSError, ValueError):  # restoring the step reports the error
                continue
            part = {leaf.path: _abstract(leaf) for leaf in listed if leaf.path[0] in names}
            return {name: {} for name in names} | unflatten_dict(part)
        return None

    def wait(self) -> None:
        """Waits until the last save is on disk.

        Raises:
          CheckpointError: it failed.
        """
        self._finish()
        if self._failure:
            raise CheckpointError(self._failure)

    def close(self) -> None:
        """Waits for the last save, reports it if it failed, and ends orbax's threads."""
        self._finish()
        if self._checkpointer is not None:
            self._checkpointer.close()
            self._checkpointer = None
        elif self._failure:  # writes that were under way may have added files since
            self._clean_up()
        if self._link is not None:
            self._link.cleanup()
            self._link = None

    # ---- saving

    def _prepare(self) -> list[int]:
        """Prepares the folder for the first save, or for one after a failure; returns the steps in it."""
        if _process()[0] == 0:
            storage.make_folder(self.directory)
            self._remove_leftovers()
        return self.steps()

    def _attempt(self, action: Callable[[], _T]) -> tuple[_T | None, str]:
        """Returns the result of an action, and the reason if the store made it fail on some process."""
        result, problem = None, ""
        try:
            result = action()
        except (AttributeError, TypeError, NameError, AssertionError):  # not of the store
            raise
        except Exception as error:
            problem = self._first_line(error)
        return result, _agreed(problem)

    def _start(self, step: int, state: dict[str, PyTree]) -> None:
        """Begins to write `step`, or reports why that is not possible."""
        try:
            leaves = checksums.list_leaves(state)
        except checksums.NonFinite as error:
            raise NonFiniteState(f"{self.directory}: step {step} is not saved: {error} is not finite") from error
        is_retry, self._attempted = step == self._attempted, step
        self._schedule.started()
        if self._checkpointer is None:
            _quiet_orbax()
            found, problem = self._attempt(self._prepare)
            if problem:
                return self._fail(step, problem)
            self._newest = max(_of_first_process(found or []), default=-1)
            self._checkpointer = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        if is_retry and self._newest == step:  # committed before the error that was reported
            self._failure = ""
            return
        if self._newest >= step:
            raise CheckpointError(
                f"{self.directory}: cannot save step {step}: it has step {self._newest}; "
                "continue from that one or use another folder"
            )
        arguments = ocp.args.Composite(
            state=ocp.args.StandardSave(state), integrity=ocp.args.JsonSave(checksums.to_json(leaves))
        )
        checkpointer, path = self._checkpointer, self._orbax_root() / str(step)
        _, problem = self._attempt(lambda: checkpointer.save(path, args=arguments))
        self._is_writing = not problem
        if problem:
            self._fail(step, problem)

    def _finish(self, now: int | None = None, error: Exception | None = None) -> None:
        """Waits for the step that is being written and removes the oldest; reports a failure, noticed at step `now`."""
        if not self._is_writing:
            return
        assert self._checkpointer is not None and self._attempted is not None and self._config is not None
        self._is_writing = False
        try:
            self._checkpointer.wait_until_finished()
        except Exception as raised:
            error = error or raised
        if problem := _agreed(self._first_line(error) if error else ""):
            self._fail(now or self._attempted, problem)
            return
        self._newest, self._failure = self._attempted, ""
        self._schedule.succeeded()
        if _process()[0] == 0:
            try:
                for step in self.steps()[: -self._config.keep]:
                    self._remove(step)
            except OSError as raised:
                _report(f"{self.directory}: cannot remove an old checkpoint ({self._first_line(raised)})")

    def _fail(self, now: int, problem: str) -> None:
        """Reports a failed save and removes what it left; the next attempt opens the folder anew."""
        self._failure = f"{self.directory}: cannot save step {self._attempted}: {problem}"
        self._schedule.failed(now)
        if _process()[0] == 0:
            _report(f"{self._failure}; it will be tried again")
        checkpointer, self._checkpointer = self._checkpointer, None
        with contextlib.suppress(Exception):  # of the store that has just failed
            if checkpointer is not None:
                checkpointer.close()
        self._clean_up()

    def _clean_up(self) -> None:
        """Removes what a failed save left, if the store allows it."""
        with contextlib.suppress(Exception):
            if _process()[0] == 0:
                self._remove_leftovers()

    def _remove_leftovers(self) -> None:
        """Removes saves that did not end, and sets aside other folders that have the name of a step."""
        for name in storage.names(self.directory):
            if name.endswith(atomicity.TMP_DIR_SUFFIX):
                storage.remove(self.directory / name)
        for step in sorted(set(self._numbered()) - set(self.steps())):
            path = self.directory / str(step)
            if not self._is_local or not storage.names(path):  # in an object store a save is under its final name
                storage.remove(path)
            else:
                self._move_aside(step, "corrupt")

    def _remove(self, step: int) -> None:
        """Removes a step, such that it is not a checkpoint while that takes place."""
        path = self.directory / str(step)
        if self._is_local:
            path = path.rename(self.directory / f"{step}{atomicity.TMP_DIR_SUFFIX}")
        else:
            storage.remove(path / _COMMITTED)
        storage.remove(path)

    def _move_aside(self, step: int, suffix: str) -> None:
        path, target, number = self.directory / str(step), self.directory / f"{step}.{suffix}", 0
        while storage.exists(target):
            number += 1
            target = self.directory / f"{step}.{suffix}.{number}"
        if not self._is_local:  # renaming copies the objects one by one
            storage.remove(path / _COMMITTED)
        with storage.errors(path):
            path.rename(target)

    # ---- restoring

    def _chosen(self, step: int | None) -> list[int]:
        """Returns the steps to try, oldest first."""
        found = _of_first_process(self.steps())
        if not found or step not in (None, *found):
            wanted = "has no checkpoints" if step is None else f"has no step {step}; it has {found or 'none'}"
            raise UnusableCheckpoint(f"{self.directory}: {wanted}")
        return found if step is None else [step]

    def _newest_valid(self, steps: list[int], read: Callable[[int], _T]) -> tuple[int, _T]:
        """Returns the newest step that `read` does not find corrupt, and what it returned."""
        problems: list[tuple[int, _Corrupt]] = []
        for step in reversed(steps):
            try:
                value = read(step)
            except _Corrupt as error:
                problems.append((step, error))
                continue
            for corrupt, problem in problems if _process()[0] == 0 else ():
                _report(f"checkpoint {self.directory / str(corrupt)} is corrupt: {problem}")
            return step, value
        raise UnusableCheckpoint(
            f"{self.directory}: none of its checkpoints is valid (steps {steps}; {problems[0][0]}: {problems[0][1]}"
            f"{and_more(problems)}); restore one from a copy, or remove them to start over"
        )

    def _together(self, read: Callable[[], _T]) -> _T:
        """Returns read().

        Raises:
          _Corrupt: `read` failed on some process.
          CheckpointError: the same, because the store failed: the files may be valid.
        """
        value, problem = None, ""
        try:
            value = read()
        except OSError as error:
            is_corrupt = isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
            problem = self._first_line(error) if is_corrupt else f"UNAVAILABLE: {self._first_line(error)}"
        except Exception as error:  # orbax and tensorstore raise errors of any type for corrupt bytes
            problem = self._first_line(error)
        problem = _agreed(problem)
        if problem.startswith(_STORE_FAILURES):
            raise CheckpointError(f"{self.directory}: cannot be read: {problem}; try again")
        if problem:
            raise _Corrupt(problem)
        return value  # type: ignore[return-value]

    def _listed(self, step: int) -> list[checksums.Leaf]:
        """Returns the list of leaves that was stored with a step."""
        try:
            text = storage.read_text(self.directory / str(step) / INTEGRITY / "metadata")  # JsonSave's file name
        except FileNotFoundError:
            return file_checksums.list_leaves(self.directory, step, self._orbax_root() / str(step) / ITEM)
        return checksums.from_json(text)

    def _restore(self, step: int, abstract: dict[str, PyTree], is_part: bool) -> dict[str, PyTree]:
        """Reads a step in the dtypes in which it was saved, verifies and casts it."""
        listed = {leaf.path: leaf for leaf in self._together(lambda: self._listed(step))}
        self._check_fits(step, listed, checksums.flatten(abstract), is_part)

        def saved(path: jax.tree_util.KeyPath, leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            # Without a sharding orbax would use the devices that saved it.
            sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            return jax.ShapeDtypeStruct(
                leaf.shape, jnp.dtype(listed[checksums.leaf_path(path)].dtype), sharding=sharding
            )

        item = jax.tree_util.tree_map_with_path(saved, abstract)
        arguments = ocp.args.PyTreeRestore(
            item=item, restore_args=ocp.checkpoint_utils.construct_restore_args(item), partial_restore=True
        )
        folder = self._orbax_root() / str(step) / ITEM
        state = self._together(lambda: ocp.PyTreeCheckpointHandler().restore(folder, args=arguments))
        for leaf in checksums.list_leaves(state, check_finite=False):
            _compare(listed[leaf.path], leaf.sums)
        return jax.tree.map(lambda leaf, want: leaf.astype(want.dtype), state, abstract)

    def _check_fits(
        self, step: int, saved: dict[checksums.Path, checksums.Leaf], wanted: dict[checksums.Path, Any], is_part: bool
    ) -> None:
        """Compares names and shapes of the saved leaves with those of the run."""
        names = {path: "/".join(path) for path in (*saved, *wanted)}
        missing = [names[path] for path in wanted if path not in saved]
        extra = [] if is_part else [names[path] for path in saved if path not in wanted]
        differing = [path for path in wanted if path in saved and saved[path].shape != tuple(wanted[path].shape)]
        problems = [f"has no {missing[0]}{and_more(missing)}"] if missing else []
        problems += [f"has {extra[0]}{and_more(extra)}, which this run has not"] if extra else []
        for path in differing[:1]:
            shapes = f"is {saved[path].shape}, this run's is {tuple(wanted[path].shape)}"
            problems.append(f"{names[path]} {shapes}{and_more(differing)}")
        if problems:
            raise UnusableCheckpoint(f"{self.directory / str(step)}: is of another model: {'; '.join(problems)}")

    # ---- paths

    def _numbered(self) -> list[int]:
        """Returns the numbers that are names in the folder."""
        names = storage.names(self.directory)
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,9}", name))

    def _orbax_root(self) -> epath.Path:
        """Returns the folder under a name that orbax does not take for a pattern: through a link, where it has to."""
        if not glob.has_magic(os.fspath(self.directory)):
            return self.directory
        if self._link is None:
            self._link = tempfile.TemporaryDirectory(prefix="mtp_jax_checkpoints_")
            os.symlink(self.directory, os.path.join(self._link.name, "link"))
        return epath.Path(self._link.name) / "link"

    def _first_line(self, error: BaseException) -> str:
        line = first_line(error).replace(os.fspath(self._orbax_root()), os.fspath(self.directory))
        found = re.search(r": ([^:[]+) \[\w+='", line)  # of the file system, at the end of a long line
        return (found[1] if found else line)[:300]


def write_streamed(
    directory: str | os.PathLike[str],
    step: int,
    state: dict[str, PyTree],
    progress: Callable[[int], None] = lambda num_elements: None,
) -> None:
    """Writes a checkpoint of leaves that are read in parts (`chunked_checkpoint.save`).

    Only one process may call this.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    checkpoints = Checkpoints(directory)
    folder = checkpoints._orbax_root() / str(step)
    try:
        storage.make_folder(checkpoints.directory)
        leaves = chunked_checkpoint.save(folder / ITEM, state, progress)
        with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
            checkpointer.save(folder / INTEGRITY, args=ocp.args.JsonSave(checksums.to_json(leaves)))
        storage.write_text(folder / _COMMITTED, "committed")
    except (OSError, ValueError) as error:
        storage.remove(folder)
        raise CheckpointError(
            f"{checkpoints.directory}: cannot save step {step}: {checkpoints._first_line(error)}"
        ) from error
    finally:
        checkpoints.close()


def _compare(leaf: checksums.Leaf, sums: checksums.Sums | None) -> None:
    if leaf.sums is not None and sums != leaf.sums:
        raise _Corrupt(f"{leaf.name} is not what was written")


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _agreed(problem: str) -> str:
    """Returns, on every process, the problem of the first process that has one; "" if none has."""
    if jax.process_count() == 1:
        return problem
    mine = np.zeros(512, np.uint8)
    encoded = problem.encode()[: mine.size]
    mine[: len(encoded)] = list(encoded)
    lines = multihost_utils.process_allgather(mine)
    return next((bytes(line).rstrip(b"\0").decode(errors="replace") for line in lines if line.any()), "")


def _of_first_process(steps: list[int]) -> list[int]:
    """Returns the steps that the first process sees; a shared file system may show others to another one."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.resize(np.asarray(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)]


@functools.cache
def _quiet_orbax() -> None:
    """Drops the tracebacks of failed saves: those that orbax logs, whose exceptions it raises too, those of the writes
    that failed beside the one that orbax raises, and those that tensorstore prints when a write ends after the event
    loop in which orbax waited for it."""
    folder, hook = f"{os.sep}orbax{os.sep}", sys.unraisablehook

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or folder not in record.pathname

    def is_retrieved(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, ValueError) and "never retrieved" in record.getMessage())

    def report(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logging.getLogger("absl").addFilter(is_wanted)
    logging.getLogger("asyncio").addFilter(is_retrieved)
    sys.unraisablehook = report


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _abstract(leaf: checksums.Leaf) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype))
