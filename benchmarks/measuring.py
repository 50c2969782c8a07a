"""Timing of operations and recording of results, common to the benchmarks of this folder."""

import datetime
import json
import pathlib
import statistics
import subprocess
import time
from collections.abc import Callable
from typing import Any

import jax

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "h200.jsonl"


def milliseconds(run: Callable[[], Any], calls: int = 10, repeats: int = 7) -> float:
    """Returns the milliseconds of one call: the median over `repeats` of the mean over `calls`, all dispatched before
    waiting for the last. Two calls, which compile, come first."""
    jax.block_until_ready([run(), run()])
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        jax.block_until_ready([run() for _ in range(calls)][-1])
        found.append(1e3 * (time.perf_counter() - started) / calls)
    return statistics.median(found)


def append(output: pathlib.Path, line: dict[str, Any]) -> None:
    """Appends a result as one line, with device, version, commit and date, and prints it."""
    stamped = line | {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "commit": commit(),
        "date": datetime.date.today().isoformat(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("a") as file:
        file.write(json.dumps(stamped) + "\n")
    print(json.dumps(line), flush=True)


def commit() -> str | None:
    """Returns the commit of the measured code; None outside a git checkout or with uncommitted changes."""
    git = ["git", "-C", str(ROOT)]
    try:
        changed = subprocess.run([*git, "status", "--porcelain", "mtp_jax"], capture_output=True, text=True, check=True)
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return None if changed.stdout else head.stdout.strip()
