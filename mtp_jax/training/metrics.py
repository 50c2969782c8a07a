"""Output of a run's metrics: metrics.jsonl and the line of the terminal."""

import contextlib
import errno
import json
import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from mtp_jax import storage
from mtp_jax.errors import warn_once
from mtp_jax.lease import Lease, LeaseLost, cannot_write
from mtp_jax.training.metrics_file import LinesFile, parse_lines
from mtp_jax.typing import JsonObject

if TYPE_CHECKING:
    import jax

METRICS_FILE = "metrics.jsonl"
_STORE_SECONDS = 5.0  # between two puts of an object
_LAST_SECONDS = 300.0  # for which the last lines of a run are tried to be stored

Scalar = Any  # a Python, numpy or jax number, or None


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Writes metrics.jsonl, one JSON object per logged step.

    A run resumed from a checkpoint continues the file: lines after the checkpoint's step are dropped, since those steps
    are repeated, and so is a line that a kill or a fault of the disk left unreadable. So that no step is missing, a
    checkpoint may be saved only after `flush` has returned True.

    A background thread stores what an object store does not have yet, every few seconds.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        resume_step: int | None,
        is_main: bool = True,
        lease: Lease | None = None,
        flush_others: Callable[[], None] = lambda: None,
    ):
        """Opens the files.

        Args:
          workdir: the run's folder.
          resume_step: step of the restored checkpoint; None: a fresh start, so no line is kept.
          is_main: whether this process writes; the others do nothing.
          lease: nothing is written unless it is held; None: no lease is needed.
          flush_others: called whenever the lines are stored, from any thread; must not raise.

        Raises:
          UserError: the folder cannot be written.
          StorageError: the object store fails, or the disk is full.
        """
        self._lines: LinesFile | None = None
        self._lease, self._lost, self._flush_others = lease, False, flush_others
        if not is_main:
            return
        folder = storage.path(workdir)
        try:
            storage.make_folder(folder)
            self._lines = LinesFile(folder / METRICS_FILE, -1 if resume_step is None else resume_step)
        except OSError as error:
            raise cannot_write(f"--workdir={workdir}", error) from error
        self._shown = folder / METRICS_FILE
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._store_periodically, name="metrics", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, Scalar]) -> None:
        """Adds one line. Values are numbers, jax or numpy scalars; None and non-finite become null.

        On a local disk the line is in the file when this returns, unless the disk is full.

        Raises:
          LeaseLost: another process writes to this workdir.
        """
        if self._lines is None:
            return
        if self._lost and self._lease is not None:
            self._lease.check()
        values = {"step": step} | {k: plain(v) for k, v in metrics.items()}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        try:
            self._lines.append(json.dumps(finite, allow_nan=False).encode() + b"\n")
        except OSError as error:
            self._report(error)

    def flush(self, is_last: bool = False) -> bool:
        """Stores all lines, before a checkpoint of the newest step is saved. Collective.

        Args:
          is_last: try for minutes, and raise if that fails.

        Returns:
          Whether all lines are stored, the same on every process. If not, no checkpoint should be saved now.

        Raises:
          LeaseLost: another process writes to this workdir.
          StorageError: `is_last`, and the lines cannot be stored.
        """
        import jax
        from jax.experimental import multihost_utils

        lost = None
        try:
            is_stored = self._lines is None or self._stored(_LAST_SECONDS if is_last else 0.0)
        except LeaseLost as error:
            is_stored, lost = False, error
        if jax.process_count() > 1:
            is_stored, is_lost = multihost_utils.broadcast_one_to_all(np.asarray([is_stored, lost is not None]))
            lost = LeaseLost("the first process has lost the lease of the workdir") if is_lost and not lost else lost
        if lost is not None:
            raise lost
        if is_last and not is_stored:
            raise storage.StorageError(
                errno.EIO, f"{METRICS_FILE} cannot be written (see above), so the last step is not saved; run it again"
            )
        return bool(is_stored)

    def _stored(self, seconds: float) -> bool:
        """Stores everything, trying again for `seconds`; returns whether that succeeded."""
        deadline, pause = time.monotonic() + seconds, 1.0
        while True:
            try:
                if self._lines is None or self._lease is None or self._lease.check():
                    if self._lines is not None:
                        self._lines.flush()
                    self._flush_others()
                    return True
                warn_once("the lease of the workdir has expired and its store cannot be reached; nothing is saved now")
            except OSError as error:
                self._report(error)
            if time.monotonic() + pause > deadline:
                return False
            time.sleep(pause)
            pause = min(2 * pause, 30.0)

    def _store_periodically(self) -> None:
        pause = _STORE_SECONDS
        while not self._ended.wait(pause):
            started = time.monotonic()
            try:
                self._stored(0.0)
            except LeaseLost:
                self._lost = True
                return
            pause = max(_STORE_SECONDS, 20 * (time.monotonic() - started))  # a long file is put less often

    def _report(self, error: OSError) -> None:
        warn_once(f"{self._shown}: cannot be written now ({storage.reason(error)}); its lines are kept and tried again")

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stores what is not stored yet, if that can be done, and closes the files."""
        if self._lines is None:
            return
        self._ended.set()
        self._thread.join()
        with contextlib.suppress(LeaseLost):
            if not self._lost:
                self._stored(0.0)
        self._lines.close()
        self._lines = None


class Progress:
    """The terminal's line for a logged step: plain text, the same in a terminal, a pipe and a notebook."""

    def __init__(self, num_steps: int):
        self._num_steps = num_steps
        self._first: tuple[int, float] | None = None  # step and time of the first line, which comes after compilation

    def line(self, step: int, metrics: Mapping[str, Scalar]) -> str:
        """Returns the known parts of
        `step 120/600  loss 1.834 (main 1.520, mtp 1.71 1.95)  4.1k tok/s  MFU 31%  ETA 2:13`.
        """
        now = time.monotonic()
        values = {k: plain(v) for k, v in metrics.items()}
        parts = [f"step {step}/{self._num_steps}"]
        if values.get("loss") is not None:
            parts.append(f"loss {values['loss']:.3f}{_terms(values)}")
        validated = {
            name.removeprefix("validation_").removesuffix("loss_main"): value
            for name, value in values.items()
            if name.startswith("validation_") and name.endswith("loss_main") and value is not None
        }
        if validated:  # one value, or one per set: "validation chats 1.520, code 0.934"
            named = (f"{name.rstrip('_')} {value:.3f}".lstrip() for name, value in validated.items())
            parts.append(f"validation {', '.join(named)}")
        if (speed := values.get("tokens_per_second")) is not None:
            parts.append(f"{_short(speed)} tok/s")
        if (mfu := values.get("mfu")) is not None:
            parts.append(f"MFU {100 * mfu:.1f}%")
        if self._first is None:
            self._first = step, now
        elif step > self._first[0]:
            each = (now - self._first[1]) / (step - self._first[0])
            parts.append(f"ETA {clock(each * (self._num_steps - step))}")
        return "  ".join(parts)


def peak_memory_gib(devices: Iterable["jax.Device"]) -> float:
    """Returns the peak memory in use since the process began, in GiB.

    For GPUs and TPUs: of the fullest of `devices` (jax.local_devices()). Devices without memory of their own, such as
    CPUs, report nothing; then it is the peak resident memory of this process, with Python and the data in it, so the
    two kinds of number are not comparable.
    """
    stats = [device.memory_stats() or {} for device in devices]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return max(peaks) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB, but bytes on macOS
    return resident / (2**30 if sys.platform == "darwin" else 2**20)


def read_metrics(path: str | os.PathLike[str]) -> list[JsonObject]:
    """Returns the lines of a metrics.jsonl, local or by its URL; those that are not JSON objects with a step are
    reported on stderr and left out. Raises OSError.
    """
    return [row for row, _ in parse_lines(storage.read_bytes(path), str(path))]


def plain(value: Scalar) -> float | None:
    """Converts any scalar to a Python int, float or None."""
    return value.item() if hasattr(value, "item") else value


def _terms(values: Mapping[str, float | None]) -> str:
    """Returns ` (main 1.520, mtp 1.710 1.950)`; empty for a model without extra depths, whose loss is the main one."""
    depths = [values[f"loss_mtp_{k}"] for k in range(1, len(values)) if values.get(f"loss_mtp_{k}") is not None]
    if not depths or values.get("loss_main") is None:
        return ""
    return f" (main {values['loss_main']:.3f}, mtp {' '.join(f'{v:.3f}' for v in depths)})"


def _short(number: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{unit}"
    return f"{number:.0f}"


def clock(seconds: float) -> str:
    """Formats seconds as `1:05` (minutes and seconds), or `1:02:03` with hours."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
