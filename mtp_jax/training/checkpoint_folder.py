"""The folder of the checkpoints of a run: its steps, the errors, and what several processes agree on.

    checkpoints/                  a local folder or a URL
      500/commit_success.txt      written last by orbax: without it, 500 is not a checkpoint
      500/state/...               the arrays
      500/integrity/metadata      every array's name, shape, dtype and checksum (`checksums`)
      400.corrupt/                a step that failed verification, renamed when a run restarted from an older one
      450.superseded/             a step newer than the one that a run was told to restart from

Every process must see the folder (a local disk for one host; NFS, Lustre or an object store for several).
"""

import glob
import os
import re
import sys
import tempfile
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.path import atomicity

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.errors import EXIT_UNUSABLE, first_line

STATE, INTEGRITY = "state", "integrity"  # items of a step
COMMITTED = atomicity.COMMIT_SUCCESS_FILE

_T = TypeVar("_T")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be saved or restored. The message is one line. Exit code 1."""


class UnusableCheckpoint(CheckpointError):
    """A checkpoint that is missing, corrupt or of another model: the same command fails the same. Exit code 2."""

    exit_code = EXIT_UNUSABLE


class NonFiniteState(CheckpointError):
    """A state with NaN or infinite values, which is not saved. The message names the first such array."""


class Folder:
    """A folder of checkpoints; nothing is created in it until a step is saved.

    Attributes:
      path: the folder.
    """

    def __init__(self, directory: storage.AnyPath):
        """Raises UserError for a URL that contains one of `*?[`, which orbax takes for a pattern."""
        self.path = storage.path(directory)
        self._is_local = storage.is_local(self.path)
        self._is_pattern = glob.has_magic(os.fspath(self.path))
        if self._is_pattern and not self._is_local:
            raise UserError(f"{self.path}: contains one of * ? [; use another name")
        self._link: tempfile.TemporaryDirectory[str] | None = None

    def close(self) -> None:
        if self._link is not None:
            self._link.cleanup()
            self._link = None

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first, valid or not."""
        return [step for step in self._numbered() if storage.is_file(self.path / str(step) / COMMITTED)]

    def for_orbax(self, step: int) -> epath.Path:
        """Returns the folder of a step, by a name that orbax does not take for a pattern: through a link if needed."""
        if not self._is_pattern:
            return self.path / str(step)
        if self._link is None:
            self._link = tempfile.TemporaryDirectory(prefix="mtp_jax_checkpoints_")
            os.symlink(self.path, os.path.join(self._link.name, "link"))
        return epath.Path(self._link.name) / "link" / str(step)

    def describe(self, error: BaseException) -> str:
        """Returns the first line of an error, of a failing file system only the reason at its end."""
        line = first_line(error)
        if self._link is not None:
            line = line.replace(os.path.join(self._link.name, "link"), os.fspath(self.path))
        found = re.search(r": ([^:[]+) \[\w+='", line)
        return (found[1] if found else line)[:300]

    def remove(self, step: int) -> None:
        """Removes a step, such that it is not a checkpoint while that takes place."""
        path = self.path / str(step)
        if self._is_local:
            path = path.rename(self.path / f"{step}{atomicity.TMP_DIR_SUFFIX}")
        else:
            storage.remove(path / COMMITTED)
        storage.remove(path)

    def move_aside(self, step: int, suffix: str) -> None:
        """Renames a step, so that it is not a checkpoint any more."""
        path, target, number = self.path / str(step), self.path / f"{step}.{suffix}", 0
        while storage.exists(target):
            number += 1
            target = self.path / f"{step}.{suffix}.{number}"
        if not self._is_local:  # renaming copies the objects one by one
            storage.remove(path / COMMITTED)
        with storage.errors(path):
            path.rename(target)

    def remove_leftovers(self) -> None:
        """Removes saves that did not end, and sets aside other folders that have the name of a step."""
        for name in storage.names(self.path):
            if name.endswith(atomicity.TMP_DIR_SUFFIX):
                storage.remove(self.path / name)
        for step in sorted(set(self._numbered()) - set(self.steps())):
            path = self.path / str(step)
            if not self._is_local or not storage.names(path):  # in an object store a save is under its final name
                storage.remove(path)
            else:
                self.move_aside(step, "corrupt")

    def _numbered(self) -> list[int]:
        names = storage.names(self.path)
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9][0-9]{0,9}", name))


def attempt(
    action: Callable[[], _T], describe: Callable[[Exception], str], bugs: tuple[type[Exception], ...] = ()
) -> tuple[_T | None, str]:
    """Returns (result of an action, ""), or (any, problem) if it raised on some process; `bugs` are not caught."""
    result, problem = None, ""
    try:
        result = action()
    except bugs:
        raise
    except Exception as error:
        problem = describe(error)
    return result, agreed(problem)


def agreed(problem: str) -> str:
    """Returns, on every process, the problem of the first process that has one; "" if none has.

    That of a process which has only waited for another one comes last.
    """
    if jax.process_count() == 1:
        return problem
    mine = np.zeros(512, np.uint8)
    encoded = problem.encode()[: mine.size]
    mine[: len(encoded)] = list(encoded)
    lines = multihost_utils.process_allgather(mine)
    found = [bytes(line).rstrip(b"\0").decode(errors="replace") for line in lines if line.any()]
    return min(found, key=lambda line: line.startswith("Timed out"), default="")


def of_first_process(steps: list[int]) -> list[int]:
    """Returns the steps that the first process sees; a shared file system may show others to another one."""
    if jax.process_count() == 1:
        return steps
    count = int(multihost_utils.broadcast_one_to_all(np.int32(len(steps))))
    mine = np.resize(np.asarray(steps or [0], np.int32), count)
    return [int(step) for step in multihost_utils.broadcast_one_to_all(mine)]


def report(line: str) -> None:
    """Prints a line on stderr, on the first process."""
    if jax.process_index() == 0:
        print(line, file=sys.stderr, flush=True)
