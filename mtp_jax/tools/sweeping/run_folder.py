"""Files that a sweep keeps in the folder of a run: sweep.json, the logs of its commands, and a lease.

sweep.json: {"overrides": [...], "config": {...}} and, after a command has ended, "trained": the last step, "evaluated":
[flags of eval.py], "error": the line with which a command failed. It is written when the sweep starts, so that a run
that has written nothing else, or has not started, still belongs to the sweep.
"""

import json
import pathlib
import shlex

from mtp_jax import storage
from mtp_jax.config import to_dict
from mtp_jax.lease import InUse, Lease
from mtp_jax.storage import read_json, write_text
from mtp_jax.tools.sweeping.grid import SweepRun
from mtp_jax.typing import JsonObject

SWEEP_FILE, EVAL_FILE, LEASE_FILE = "sweep.json", "eval.json", ".sweep.lock"
LOGS = {"train.py": "log.txt", "eval.py": "eval_log.txt"}


def try_lock(folder: pathlib.Path) -> Lease | None:
    """Returns the lease of a run for this sweep, until it is released; None if another sweep holds it.

    It is not that of the workdir, which train.py takes.

    Raises:
      UserError: the folder cannot be written.
      StorageError: the disk is full.
    """
    lease = Lease(folder, file=LEASE_FILE)
    try:
        lease.acquire()
    except InUse:
        return None
    return lease


def prepare(root: pathlib.Path, runs: list[SweepRun]) -> None:
    """Creates the folder of each run and writes its settings to sweep.json.

    Raises:
      UserError: a folder cannot be written.
      StorageError: the disk is full.
    """
    for run in runs:
        folder = root / run.name
        if lease := try_lock(folder):  # otherwise its holder writes the record
            write_record(folder, read_record(folder) | {"overrides": run.overrides, "config": to_dict(run.config)})
            lease.release()


def read_record(folder: storage.AnyPath) -> JsonObject:
    """Returns the contents of sweep.json; {} if there is none."""
    path = storage.path(folder) / SWEEP_FILE
    return read_json(path, "remove it") if storage.is_file(path) else {}


def write_record(folder: pathlib.Path, record: JsonObject) -> None:
    """Replaces sweep.json as a whole."""
    write_text(folder / SWEEP_FILE, json.dumps(record, indent=1) + "\n")


def start_of_log(path: pathlib.Path, command: list[str]) -> int:
    """Appends the command to the log and returns the offset at which its output will begin, in bytes."""
    with path.open("a", encoding="utf-8") as log:
        log.write(f"$ {shlex.join(command)}\n")
    return path.stat().st_size


def last_line(path: pathlib.Path, start: int) -> str:
    """Returns the last error of a command in its log after `start`; without an error, its last line."""
    with path.open("rb") as log:
        log.seek(start)
        lines = [line.strip() for line in log.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["no output"])[-1].removeprefix("error: ")
