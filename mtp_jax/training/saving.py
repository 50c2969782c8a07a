"""Steps that are saved by orbax in the background, and the steps at which to do so, sooner after a save that failed."""

import contextlib
import functools
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import jax
import orbax.checkpoint as ocp

from mtp_jax import storage
from mtp_jax.config import CheckpointConfig
from mtp_jax.training import checksums, chunked_checkpoint
from mtp_jax.training.checkpoint_folder import (
    COMMITTED,
    INTEGRITY,
    STATE,
    CheckpointError,
    Folder,
    NonFiniteState,
    agreed,
    attempt,
    of_first_process,
    report,
)
from mtp_jax.typing import PyTree

LAST_SAVE_DELAYS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between the attempts of a save that must succeed
BARRIER_SECONDS = 300.0  # that a process which has written its part of a step waits for the others
_BUGS = (AttributeError, TypeError, NameError, AssertionError)  # not of the store


@dataclass
class SaveSchedule:
    """Decides when to save; the same on every process, because it counts steps.

    After the n-th failure in a row the next attempt is `every / 16 * 2^(n-1)` steps later, between 1 and `every`.

    Attributes:
      every: number of steps between two saves.
      num_failures: number of saves that failed since the last one that succeeded.
    """

    every: int
    num_failures: int = field(default=0, init=False)
    _retry: int | None = field(default=None, init=False)

    def is_due(self, step: int) -> bool:
        return step % self.every == 0 or (self._retry is not None and step >= self._retry)

    def started(self) -> None:
        self._retry = None

    def failed(self, step: int) -> None:
        """Counts a failure that was noticed at `step`."""
        wait = min(self.every, max(1, self.every // 16) << min(self.num_failures, 31))
        self.num_failures += 1
        self._retry = step + wait

    def succeeded(self) -> None:
        self.num_failures = 0


class Saver:
    """Saves into one folder. Calls are collective: every process of the run makes them, in the same order.

    Attributes:
      directory: the folder, created by the first save.
    """

    def __init__(
        self,
        directory: storage.AnyPath,
        config: CheckpointConfig | None = None,
        last_save_delays: Sequence[float] = LAST_SAVE_DELAYS,
        barrier_seconds: float = BARRIER_SECONDS,
    ):
        """Opens a folder; creates nothing.

        Args:
          directory: a local path or a URL.
          config: how often to save, how many checkpoints to keep, and whether `save` returns before files are written;
            None: read-only.
          last_save_delays: seconds between the attempts of a save that must succeed.
          barrier_seconds: that a process which has written its part of a step waits for the others. A save that fails
            on one of several processes fails on the others after this time.

        Raises:
          UserError: a URL that contains one of `*?[`, which orbax takes for a pattern.
        """
        self._folder = Folder(directory)
        self.directory = self._folder.path
        self._config, self._last_save_delays, self._barrier_seconds = config, last_save_delays, barrier_seconds
        self._schedule = SaveSchedule(config.every if config else 1)
        self._checkpointer: ocp.AsyncCheckpointer | None = None  # made by the first save, and anew after a failed one
        self._num_opened = 0  # times that it was made
        self._newest = -1  # committed step, known once the folder was prepared
        self._attempted: int | None = None  # last step given to `save`
        self._is_writing = False  # `_attempted`, in the background
        self._failure = ""  # of `_attempted`

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error_type: type[BaseException] | None, *_: object) -> None:
        try:
            if error_type is None:
                self.wait()
        finally:
            self.close()

    def is_due(self, step: int) -> bool:
        """Returns whether to save at `step`: at a multiple of config.every, or sooner after a failed save."""
        if self._is_writing and jax.process_count() == 1:
            assert self._checkpointer is not None
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
        self._finish(step)
        for delay in (0.0, *(self._last_save_delays if must_succeed else ())):
            if step == self._attempted and not self._failure:
                break
            time.sleep(delay)
            self._start(step, state)
            if must_succeed or not self._config.async_save:
                self._finish(step)
        if must_succeed:
            self.wait()

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
        self._folder.close()

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
            found, problem = attempt(self._prepare, self._folder.describe, _BUGS)
            if problem:
                return self._fail(step, problem)
            self._newest = max(of_first_process(found or []), default=-1)
            self._checkpointer = self._open()
        if is_retry and self._newest == step:  # committed before the error that was reported
            self._failure = ""
            return
        if self._newest >= step:
            raise CheckpointError(
                f"{self.directory}: cannot save step {step}: it has step {self._newest}; "
                "continue from that one or use another folder"
            )
        items = {STATE: ocp.args.StandardSave(state), INTEGRITY: ocp.args.JsonSave(checksums.to_json(leaves))}
        checkpointer, path = self._checkpointer, self._folder.for_orbax(step)
        _, problem = attempt(
            lambda: checkpointer.save(path, args=ocp.args.Composite(**items)), self._folder.describe, _BUGS
        )
        self._is_writing = not problem
        if problem:
            self._fail(step, problem)

    def _prepare(self) -> list[int]:
        """Prepares the folder for the first save, or for one after a failure; returns the steps in it."""
        if jax.process_index() == 0:
            storage.make_folder(self.directory)
            self._folder.remove_leftovers()
        return self._folder.steps()

    def _open(self) -> ocp.AsyncCheckpointer:
        """Returns a checkpointer whose processes wait for each other for `barrier_seconds` at most.

        The names of its barriers are new ones: processes that differ in whether they have reached a barrier could not
        use its name again.
        """
        self._num_opened += 1
        number, wait = self._num_opened, ocp.multihost.get_barrier_sync_fn()

        def barrier(*, key: str, timeout_ms: int) -> None:
            wait(key=f"{key}_{number}", timeout_ms=min(timeout_ms, round(1000 * self._barrier_seconds)))

        options = ocp.options.AsyncOptions(barrier_sync_fn=barrier)
        return ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(), async_options=options)

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
        if problem := agreed(self._folder.describe(error) if error else ""):
            self._fail(now or self._attempted, problem)
            return
        self._newest, self._failure = self._attempted, ""
        self._schedule.succeeded()
        if jax.process_index() == 0:
            try:
                for step in self._folder.steps()[: -self._config.keep]:
                    self._folder.remove(step)
            except OSError as raised:
                report(f"{self.directory}: cannot remove an old checkpoint ({self._folder.describe(raised)})")

    def _fail(self, now: int, problem: str) -> None:
        """Reports a failed save and removes what it left; the next attempt opens the folder anew."""
        self._failure = f"{self.directory}: cannot save step {self._attempted}: {problem}"
        self._schedule.failed(now)
        report(f"{self._failure}; it will be tried again")
        checkpointer, self._checkpointer = self._checkpointer, None
        with contextlib.suppress(Exception):  # of the store that has just failed
            if checkpointer is not None:
                checkpointer.close()
        with contextlib.suppress(Exception):
            if jax.process_index() == 0:
                self._folder.remove_leftovers()


def write_streamed(
    directory: storage.AnyPath,
    step: int,
    state: dict[str, PyTree],
    progress: Callable[[int], None] = lambda num_elements: None,
) -> None:
    """Writes a checkpoint of leaves that are read in parts (`chunked_checkpoint.save`).

    Only one process may call this.

    Raises:
      CheckpointError: the checkpoint cannot be written.
    """
    _quiet_orbax()
    with contextlib.closing(Folder(directory)) as folder:
        path = folder.for_orbax(step)
        try:
            storage.make_folder(folder.path)
            leaves = chunked_checkpoint.save(path / STATE, state, progress)
            with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
                checkpointer.save(path / INTEGRITY, args=ocp.args.JsonSave(checksums.to_json(leaves)))
            storage.write_text(path / COMMITTED, "committed")
        except (OSError, ValueError) as error:
            storage.remove(path)
            raise CheckpointError(f"{folder.path}: cannot save step {step}: {folder.describe(error)}") from error


@functools.cache
def _quiet_orbax() -> None:
    """Drops orbax's warnings, and the tracebacks of failed saves: those that orbax logs, whose exceptions it raises
    too, those of the writes that failed beside the one that orbax raises, and those that tensorstore prints when a
    write ends after the event loop in which orbax waited for it."""
    folder, hook = f"{os.sep}orbax{os.sep}", sys.unraisablehook

    def is_wanted(record: logging.LogRecord) -> bool:
        return record.levelno < logging.WARNING or folder not in record.pathname

    def is_retrieved(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, ValueError) and "never retrieved" in record.getMessage())

    def show(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            hook(unraisable)

    logging.getLogger("absl").addFilter(is_wanted)
    logging.getLogger("asyncio").addFilter(is_retrieved)
    sys.unraisablehook = show
