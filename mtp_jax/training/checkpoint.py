"""Checkpoints: saved by orbax (`saving`), and verified by checksums when they are restored (`restoring`)."""

import jax
import jax.numpy as jnp
from flax.traverse_util import unflatten_dict

from mtp_jax.training import restoring
from mtp_jax.training.checkpoint_folder import (
    CheckpointError,
    NonFiniteState,
    UnusableCheckpoint,
    agreed,
    of_first_process,
    report,
)
from mtp_jax.training.saving import Saver, write_streamed
from mtp_jax.typing import PyTree

__all__ = ["CheckpointError", "Checkpoints", "NonFiniteState", "UnusableCheckpoint", "write_streamed"]


class Checkpoints(Saver):
    """The checkpoints in one folder, to save and to restore."""

    def steps(self) -> list[int]:
        """Returns the committed steps, oldest first, valid or not."""
        return self._folder.steps()

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
        found = of_first_process(self.steps())
        if not found and step is None:
            return None
        restored, state = restoring.newest_valid(
            self._folder, step, lambda each: restoring.restore(self._folder, each, abstract_state, is_part=False)
        )
        newer = [each for each in found if each > restored]
        if newer and self._config is not None:
            suffix = "corrupt" if step is None else "superseded"
            report(f"{self.directory}: steps {newer} are renamed to {[f'{each}.{suffix}' for each in newer]}")
            if jax.process_index() == 0:
                for each in reversed(newer):
                    self._folder.move_aside(each, suffix)
            agreed("")  # the others wait until they are renamed
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
        return restoring.newest_valid(
            self._folder, step, lambda each: restoring.restore(self._folder, each, abstract, is_part=True)
        )

    def open_part(self, names: tuple[str, ...]) -> tuple[int, dict[str, PyTree]]:
        """Returns (step, named parts) of the newest valid step as `chunked_checkpoint.StoredArray`s, read on indexing.

        All of their chunks are read once to verify them.

        Raises:
          CheckpointError: no step, or no valid one.
        """
        self.wait()
        step, found = restoring.newest_valid(
            self._folder, None, lambda each: restoring.open_arrays(self._folder, each, names)
        )
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
                listed = restoring.list_leaves(self._folder, candidate)
            except (OSError, ValueError):  # restoring the step reports the error
                continue
            shapes = {leaf.path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype)) for leaf in listed}
            return {name: {} for name in names} | unflatten_dict({p: s for p, s in shapes.items() if p[0] in names})
        return None
