"""Time of a first run: `make train` in a fresh clone and an empty environment, measured as a whole.

    python benchmarks/quickstart.py

Appends a line to benchmarks/results/quickstart.jsonl: seconds in total and to the first step, the first and last losses
of the run, and the closing table. Requires python3, make, git and a package registry; takes as long as `make train`.
"""

import datetime
import json
import os
import pathlib
import platform
import re
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "quickstart.jsonl"
ROW = re.compile(r"^(main|\+\d+)\s+([\d.]+)\s+([\d.]+)\s+([\d.]+)%\s+(-|[\d.]+%)\s+([\d.]+)$", re.M)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        clone = pathlib.Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], check=True)
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON", "VIRTUAL"))}
        started = time.monotonic()
        lines = run(["make", "train"], clone, environment | {"MTP_JAX_CACHE": str(pathlib.Path(folder) / "cache")})
        seconds = time.monotonic() - started
        metrics = [json.loads(line) for line in (clone / "runs/quickstart/metrics.jsonl").read_text().splitlines()]
        versions = subprocess.run(
            [clone / ".venv/bin/python", "-c", "import jax, sys; print(jax.__version__, sys.version.split()[0])"],
            **{"capture_output": True, "text": True, "check": True},
        ).stdout.split()
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as file:
        file.write(json.dumps(record("\n".join(lines), seconds, metrics, versions)) + "\n")


def run(command: list[str], folder: pathlib.Path, environment: dict[str, str]) -> list[str]:
    """Runs a command, prints its lines as they arrive, and returns them."""
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line.rstrip())
    if process.wait():
        sys.exit(f"{' '.join(command)} ended with {process.returncode}")
    return lines


def record(output: str, seconds: float, metrics: list[dict], versions: list[str]) -> dict:
    """Returns the result's line."""
    names = ("loss", "bits_per_byte", "accuracy_percent", "agreement", "tokens_per_forward")
    first_step = re.search(r"first step done ([\d.]+) s", output)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    losses = [name for name in metrics[0] if name.startswith("loss")]
    return {
        "benchmark": "quickstart",
        "seconds_total": round(seconds, 1),
        "seconds_to_first_step": float(first_step[1]) if first_step else None,
        "validation": {row[0]: dict(zip(names, row[1:], strict=True)) for row in ROW.findall(output)},
        "train_first_and_last": {name: [round(metrics[i][name], 3) for i in (0, -1)] for name in losses},
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "jax": versions[0],
        "python": versions[1],
        "commit": commit.strip(),
        "date": datetime.date.today().isoformat(),
    }


if __name__ == "__main__":
    main()
