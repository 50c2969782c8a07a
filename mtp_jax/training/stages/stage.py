"""A stage of the training loop, and the session that all stages see."""

import collections
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from etils import epath

from mtp_jax.config import Config
from mtp_jax.lease import Lease
from mtp_jax.model import Tree
from mtp_jax.sharding import MAX_PROGRAMS_AHEAD
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.clock import Clock
from mtp_jax.training.run import Run
from mtp_jax.training.trackers import Trackers

MAX_STEPS_ON_DEVICE = 256  # steps whose metrics stay on the device between two log points


class Stage:
    """One concern of the loop. A subclass overrides the hooks that it needs; the loop calls them in this order.

    Hooks are called on every process, in the same order, so that they may run collectives; only the process with
    `session.is_main` writes and prints. A hook may wait for the device (`Session.fetch`) at the steps it is meant for,
    and at no others: between two log points the host runs ahead of the device.
    """

    def start(self, session: "Session") -> None:
        """Called once, before the first step."""

    def before_step(self, session: "Session") -> None:
        """Called before the data of step `session.step + 1` are read."""

    def after_step(self, session: "Session") -> None:
        """Called when step `session.step` has been dispatched."""

    def on_metrics(self, session: "Session", step: int, metrics: dict[str, Any]) -> None:
        """Called once for every step, in order, when its metrics have reached the host (`Session.fetch`).

        Args:
          step: the step, at most `session.step`.
          metrics: floats, and arrays under the names that are no scalars.
        """

    def paused(self, cause: str) -> contextlib.AbstractContextManager[None]:
        """Entered around a part of the loop that is no step: "checkpoint", "validation", "profile"."""
        del cause
        return contextlib.nullcontext()

    def finish(self, session: "Session") -> None:
        """Called once after the last step, also of a run that a signal has stopped, but not after an error.

        The last stage comes first, so that the checkpoint is on disk before anything is reported.
        """

    def close(self) -> None:
        """Releases what `start` acquired; called after an error too."""


@dataclass
class Session:
    """The state of a running loop.

    Attributes:
      run: config, data, mesh and jitted functions. Its state is not kept up to date; `state` is.
      workdir: the run's folder.
      saved: its checkpoints.
      clock: the time of the run by cause.
      step: steps done. first_step: of these, done by earlier attempts.
      lease: of the workdir; None on processes other than the main one.
      trackers: metrics.jsonl and the others, opened by the stage that writes them.
      state: after `step` steps. It is donated to the next step.
      metrics: of step `step`, on the device.
      values: what a stage adds to the line of the current step in the metrics; a step with values is logged.
      is_stopped: whether to end the run after the current step, the same on every process.
    """

    run: Run
    workdir: epath.Path
    saved: Checkpoints
    clock: Clock
    step: int
    state: Tree
    lease: Lease | None = None
    trackers: Trackers = field(default_factory=lambda: Trackers([]))
    stages: Sequence[Stage] = ()
    metrics: dict[str, jax.Array] = field(default_factory=dict)
    first_step: int = 0
    values: dict[str, float | None] = field(default_factory=dict)
    is_stopped: bool = False
    _waiting: collections.deque[tuple[int, dict[str, jax.Array]]] = field(default_factory=collections.deque)

    def __post_init__(self) -> None:
        self.first_step = self.step

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def is_main(self) -> bool:
        return jax.process_index() == 0

    @property
    def is_last(self) -> bool:
        return self.step == self.config.training.num_steps

    @property
    def is_grid_step(self) -> bool:
        """True if the current step has a line in metrics.jsonl; independent of the step at which a run was resumed."""
        return self.step % self.config.training.log_every == 0 or self.is_last or bool(self.values)

    def advance(self, state: Tree, metrics: dict[str, jax.Array]) -> None:
        """Takes the results of a dispatched step; its metrics stay on the device until they are fetched."""
        self.step, self.state, self.metrics, self.values = self.step + 1, state, metrics, {}
        if len(self._waiting) >= MAX_PROGRAMS_AHEAD:
            with self.clock.counting("step"):
                jax.block_until_ready(self._waiting[-MAX_PROGRAMS_AHEAD][1])
        self._waiting.append((self.step, metrics))
        if len(self._waiting) > MAX_STEPS_ON_DEVICE:  # the older half is computed: fetching it does not wait
            self.fetch(len(self._waiting) // 2)

    @contextlib.contextmanager
    def paused(self, cause: str) -> Iterator[None]:
        """Counts a part of the loop that is no step under its cause; the steps before it must have been fetched."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.clock.counting(cause))
            for stage in self.stages:
                stack.enter_context(stage.paused(cause))
            yield

    def fetch(self, num: int | None = None) -> None:
        """Waits for the metrics of all dispatched steps (the `num` oldest) and passes each to every stage.

        Raises:
          NonFiniteLoss: from the stage that checks them.
        """
        count = len(self._waiting) if num is None else num
        with self.clock.counting("step"):
            fetched = jax.device_get([self._waiting.popleft() for _ in range(count)])
        for step, metrics in fetched:
            on_host = {name: float(v) if np.ndim(v) == 0 else v for name, v in metrics.items()}
            for stage in self.stages:
                stage.on_metrics(self, step, on_host)
