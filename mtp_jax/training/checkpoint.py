"""Checkpoints, written and read by orbax and verified by checksums.

    checkpoints/
      500/state/...             orbax; written under 500.orbax-checkpoint-tmp and renamed when complete
      500.checksums.json        sha256 of every file of 500, written after it is committed
      500.checksums.0of2.json   the same from process 0 of 2, each of which hashes its share of the files
      400.broken/               a step that failed verification, renamed when a run restarted from an older one

orbax restores a flipped byte without an error and takes an empty folder for the newest step; the checksums detect both.
Every process must see the folder (a local disk for one host; NFS, Lustre or a mounted bucket for several).
"""

import os
import pathlib
import re
import shutil
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from mtp_jax.config import CheckpointConfig
from mtp_jax.errors import first_line
from mtp_jax.training import checksums, chunked_checkpoint
from mtp_jax.typing import PyTree

ITEM = "state"
_POLL_SECONDS = 0.02


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be saved or restored. The message is one line. Exit code 1."""


class Checkpoints(AbstractContextManager["Checkpoints"]):
    """The checkpoints in one folder.

    Calls are collective: every process of the run makes them, in the same order.

    Attributes:
      directory: the folder, created by the first save.
    """

    def __init__(self, directory: str | os.PathLike[str], config: CheckpointConfig | None = None):
        """Opens a folder; creates nothing.

        Args:
          config: how many checkpoints to keep, and whether `save` returns before files are written; None: read-only.
        """
        self.directory = pathlib.Path(directory).absolute()
        self._config = config
        # Created by the first save, after corrupt steps were renamed.
        self._manager: ocp.CheckpointManager | None = None
        self._last_saved: int | None = None
        self._hashing: _Hashing | None = None

    def __exit__(self, *_: object) -> None:
        self.close()

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first, valid or not."""
        return sorted(int(p.name) for p in self.directory.glob("*") if p.name.isdigit() and p.is_dir())

    def save(self, step: int, state: dict[str, PyTree]) -> None:
        """Writes `state` as `step` and removes the oldest steps beyond config.keep.

        Does nothing if `step` is the last one that this object saved.

        Args:
          step: the number of steps done.
          state: a dict of pytrees of arrays; `restore_part` reads some of them.

        Raises:
          CheckpointError: the folder holds a step this new or newer, or the files cannot be written (an asynchronous
            save reports that at the next `save` or `wait`).
        """
        if step == self._last_saved:
            return
        self.wait()
        try:
            manager = self._open_manager()
            saved = manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state)))
        except Exception as error:
            raise CheckpointError(f"{self.directory}: cannot save step {step}: {_first_line(error)}") from error
        if not saved:
            raise CheckpointError(
                f"{self.directory}: cannot save step {step}: it has step {max(self.steps())}; "
                "continue from that one or use another folder"
            )
        self._last_saved = step
        self._hashing = _Hashing(self.directory, step)
        if self._config is not None and not self._config.async_save:
            self.wait()

    def restore_latest(
        self, abstract_state: dict[str, PyTree], step: int | None = None
    ) -> tuple[int, dict[str, PyTree]] | None:
        """Returns the newest valid step, or the given one, as (step, state), or None if there are no steps.

        A step that fails verification is reported on stderr and skipped; the folder of one newer than the restored step
        is renamed to `<step>.broken`, so that training can save that step again.

        Args:
          abstract_state: ShapeDtypeStructs with shardings. The mesh and process count may differ from those that saved;
            floating-point arrays are cast to these dtypes.
          step: the step to restore; newer ones are renamed like corrupt ones.

        Raises:
          CheckpointError: no step is valid (or `step` is not), or the newest valid one belongs to another model.
        """
        self.wait()
        if not self.steps():
            return None
        steps = None if step is None else [step]
        restored, state, broken = self._restore_newest(abstract_state, partial=False, steps=steps)
        self._move_aside(broken if step is None else [each for each in self.steps() if each > step])
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
        found = self.steps()
        if not found or step not in (None, *found):
            wanted = "has no checkpoints" if step is None else f"has no step {step}; it has {found or 'none'}"
            raise CheckpointError(f"{self.directory}: {wanted}")
        return self._restore_newest(abstract, partial=True, steps=None if step is None else [step])[:2]

    def open_part(self, names: tuple[str, ...]) -> tuple[int, dict[str, PyTree]]:
        """Returns (step, named parts) of the newest valid step as `chunked_checkpoint.StoredArray`s, read on indexing.

        Raises:
          CheckpointError: no step, or no valid one.
        """
        self.wait()
        for step in reversed(self.steps()):
            problem, _ = self._problem(step)
            if problem is None:
                saved = self._saved_tree(step)
                wanted = {name: saved[name] for name in names if saved.get(name)}
                opened = chunked_checkpoint.open_arrays(self.directory / str(step) / ITEM, wanted)
                return step, {name: opened.get(name, {}) for name in names}
        raise CheckpointError(f"{self.directory}: has no valid checkpoint; it has steps {self.steps() or 'none'}")

    def saved_part(self, names: tuple[str, ...], step: int | None = None) -> dict[str, PyTree] | None:
        """Returns shapes and dtypes of the named parts as saved: nested dicts of ShapeDtypeStructs.

        Args:
          step: the step; None: the newest whose metadata can be read.

        Returns:
          The parts, or None if there is no such step.
        """
        for candidate in [step] if step is not None else reversed(self.steps()):
            try:
                saved = self._saved_tree(candidate)
            except Exception:  # restoring the step reports the error
                continue
            part = {name: saved.get(name, {}) for name in names}
            return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), part)
        return None

    def wait(self) -> None:
        """Waits until the last save and its checksums are on disk.

        Raises:
          CheckpointError: the save failed.
        """
        hashing, self._hashing = self._hashing, None
        if self._manager is not None:
            try:
                self._manager.wait_until_finished()
                self._manager.check_for_errors()
            except Exception as error:
                raise CheckpointError(f"{self.directory}: saving failed: {_first_line(error)}") from error
        if hashing is not None:
            hashing.finish()
            if _process()[0] == 0:
                checksums.remove_orphans(self.directory)

    def close(self) -> None:
        """Waits for the last save and ends orbax's threads."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                self._manager.close()
                self._manager = None

    def _open_manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            assert self._config is not None, "opened to read"
            options = ocp.CheckpointManagerOptions(
                max_to_keep=self._config.keep,
                enable_async_checkpointing=self._config.async_save,
                cleanup_tmp_directories=True,  # of interrupted saves
            )
            self.directory.mkdir(parents=True, exist_ok=True)
            if _process()[0] == 0:
                checksums.remove_orphans(self.directory)
            self._manager = ocp.CheckpointManager(self.directory, options=options)
        return self._manager

    def _restore_newest(
        self, abstract: dict[str, PyTree], partial: bool, steps: list[int] | None = None
    ) -> tuple[int, dict[str, PyTree], list[int]]:
        """Returns (step, state, corrupt newer steps) of the newest valid one of `steps` (None: all)."""
        broken: list[int] = []
        for step in reversed(self.steps() if steps is None else steps):
            problem, is_checked = self._problem(step)
            if problem is None:
                try:
                    self._check_fits(step, abstract, partial)
                    return step, self._restore(step, abstract, partial), broken
                except CheckpointError:
                    raise
                except Exception as error:
                    if is_checked:  # the files are as written, so an older step would fail alike
                        raise CheckpointError(f"{self.directory / str(step)}: {_first_line(error)}") from error
                    problem = _first_line(error)
                    self._report_broken(step, problem)
            broken.append(step)
        raise CheckpointError(
            f"{self.directory}: none of its checkpoints is valid (steps {broken}, see above); "
            "restore one from a copy, or remove them to start over"
        )

    def _restore(self, step: int, abstract: dict[str, PyTree], partial: bool) -> dict[str, PyTree]:
        abstract = jax.tree.map(_placed, abstract)
        arguments = ocp.args.PyTreeRestore(
            item=abstract,
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
            partial_restore=partial,
        )
        return ocp.PyTreeCheckpointHandler().restore(epath.Path(self.directory / str(step) / ITEM), args=arguments)

    def _saved_tree(self, step: int) -> PyTree:
        return ocp.PyTreeCheckpointHandler().metadata(epath.Path(self.directory / str(step) / ITEM)).tree

    def _problem(self, step: int) -> tuple[str | None, bool]:
        """Returns (the problem of the step or None, whether checksums were compared), the same on all processes."""
        problem, is_checked = checksums.verify(self.directory, step, *_process())
        if problem is None and not is_checked:
            if _process()[0] == 0:
                _report(f"checkpoint {self.directory / str(step)} has no checksums (killed first?); used if it reads")
            try:
                self._saved_tree(step)
            except Exception as error:
                problem = f"its description cannot be read: {_first_line(error)}"
        index, count = _process()
        finder = index
        if count > 1:
            is_valid = multihost_utils.process_allgather(np.asarray(problem is None))
            finder = int(np.argmin(is_valid))
            if problem is None and not is_valid.all():
                problem = f"process {finder} found a fault"
        if problem is not None and index in (0, finder):
            self._report_broken(step, problem)
        return problem, is_checked

    def _report_broken(self, step: int, problem: str) -> None:
        _report(f"checkpoint {self.directory / str(step)} is corrupt ({problem}); looking for an older one")

    def _check_fits(self, step: int, abstract: dict[str, PyTree], partial: bool) -> None:
        """Compares names and shapes of the saved leaves with those of `abstract`."""
        saved = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(self._saved_tree(step))}
        wanted = {_name(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
        missing = [n for n in wanted if n not in saved]
        extra = [] if partial else [n for n in saved if n not in wanted]
        differing = [n for n in wanted if n in saved and tuple(saved[n]) != tuple(wanted[n])]
        problems = [f"has no {missing[0]}{_and_more(missing)}"] if missing else []
        problems += [f"has {extra[0]}{_and_more(extra)}, which this run has not"] if extra else []
        problems += [f"{n} is {saved[n]}, this run's is {wanted[n]}{_and_more(differing)}" for n in differing[:1]]
        if problems:
            raise CheckpointError(f"{self.directory / str(step)}: is of another model: {'; '.join(problems)}")

    def _move_aside(self, broken: list[int]) -> None:
        if broken and self._config is not None and _process()[0] == 0:
            for step in broken:
                _rename_broken(self.directory, step)
        if broken and _process()[1] > 1:
            multihost_utils.sync_global_devices("corrupt checkpoints renamed")
        if broken:
            self._last_saved = None
            if self._manager is not None:
                self._manager.reload()


def write_streamed(
    directory: pathlib.Path,
    step: int,
    state: dict[str, PyTree],
    progress: Callable[[int], None] = lambda num_elements: None,
) -> None:
    """Writes a checkpoint of leaves that are read in parts (`chunked_checkpoint.save`), with its checksums.

    Only one process may call this.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    directory = pathlib.Path(directory).absolute()
    try:
        chunked_checkpoint.save(directory / str(step) / ITEM, state, progress)
        checksums.write(directory, step, 0, 1)
    except (OSError, ValueError) as error:
        shutil.rmtree(directory / str(step), ignore_errors=True)
        found = re.search(r"OS error \d+: \w+ ([^\]]+)", str(error))  # of the file system, at the end of a long line
        reason = found[1] if found else _first_line(error)
        raise CheckpointError(f"{directory}: cannot save step {step}: {reason}") from error


class _Hashing(threading.Thread):
    """Hashes this process's share of a step's files in the background, once the step is committed."""

    def __init__(self, directory: pathlib.Path, step: int):
        super().__init__(name="checkpoint_checksums", daemon=True)
        self._directory, self._step = directory, step
        self._save_is_over = threading.Event()
        self._error: Exception | None = None
        self.start()

    def run(self) -> None:
        folder = self._directory / str(self._step)
        while not folder.exists() and not self._save_is_over.wait(_POLL_SECONDS):
            pass
        try:
            if folder.exists():
                checksums.write(self._directory, self._step, *_process())
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Waits for the checksums; called when orbax has written the step or failed."""
        self._save_is_over.set()
        self.join()
        if self._error is not None:
            raise CheckpointError(f"{self._directory}: checksums of step {self._step}: {_first_line(self._error)}")


def _process() -> tuple[int, int]:
    return jax.process_index(), jax.process_count()


def _report(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """Returns the leaf, on the first device if it has no sharding; orbax would use the devices that saved it."""
    if leaf.sharding is not None:
        return leaf
    first = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=first)


def _first_line(error: BaseException) -> str:
    return first_line(error)[:300]


def _name(path: jax.tree_util.KeyPath) -> str:
    """Returns a path that spells dict keys, fields and indices alike: the container types differ on disk."""
    return "/".join(str(next(getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a))) for k in path)


def _and_more(items: list[str]) -> str:
    return f" (and {len(items) - 1} more)" if len(items) > 1 else ""


def _rename_broken(directory: pathlib.Path, step: int) -> None:
    target, number = directory / f"{step}.broken", 0
    while target.exists():
        number += 1
        target = directory / f"{step}.broken.{number}"
    (directory / str(step)).rename(target)
    _report(f"checkpoint {step} is now {target}")
    checksums.remove_orphans(directory)
