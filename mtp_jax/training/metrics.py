"""Output of a run's metrics: metrics.jsonl and the line of the terminal."""

import json
import math
import os
import pathlib
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from mtp_jax.storage import write_text
from mtp_jax.typing import JsonObject

if TYPE_CHECKING:
    import jax

METRICS_FILE = "metrics.jsonl"


Scalar = Any  # a Python, numpy or jax number, or None


class MetricsWriter(AbstractContextManager["MetricsWriter"]):
    """Appends to metrics.jsonl, one JSON object per logged step.

    A run resumed from a checkpoint continues the file: lines after the checkpoint's step are dropped, since those steps
    are repeated, and so is a line left incomplete by a kill. So that no step is missing, the line of a step must be
    written before the checkpoint of that step is saved.
    """

    def __init__(self, workdir: str | os.PathLike[str], resume_step: int | None, is_main: bool = True):
        """Opens the file.

        Args:
          workdir: the run's folder.
          resume_step: step of the restored checkpoint; None: a fresh start, so no line is kept.
          is_main: whether this process writes; the others do nothing.
        """
        self._file = None
        if not is_main:
            return
        path = pathlib.Path(workdir) / METRICS_FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_after(path, -1 if resume_step is None else resume_step)
        self._file = path.open("a")

    def write(self, step: int, metrics: Mapping[str, Scalar]) -> None:
        """Writes and flushes one line. Values are numbers, jax or numpy scalars; None and non-finite become null."""
        if self._file is None:
            return
        values = {"step": step} | {k: plain(v) for k, v in metrics.items()}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        self._file.write(json.dumps(finite, allow_nan=False) + "\n")
        self._file.flush()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


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
        if values.get("validation_loss_main") is not None:
            parts.append(f"validation {values['validation_loss_main']:.3f}")
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
    """Returns the lines of a metrics.jsonl, without an incomplete last one.

    Raises:
      ValueError: a line other than the last is not a JSON object.
    """
    lines = pathlib.Path(path).read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line.strip() else None
        except ValueError:
            row = line
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
        elif row is not None and number < len(lines):  # an incomplete line has no newline
            raise ValueError(f"{path}: line {number} is not a JSON object with a step; remove it")
    return rows


def plain(value: Scalar) -> float | None:
    """Converts any scalar to a Python int, float or None."""
    return value.item() if hasattr(value, "item") else value


def _drop_after(path: pathlib.Path, step: int) -> None:
    """Rewrites the file with the lines up to `step`, atomically."""
    if not path.exists():
        return
    kept = [json.dumps(row) + "\n" for row in read_metrics(path) if row["step"] <= step]
    write_text(path, "".join(kept))


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
