"""Loss curves of training runs that differ in the precision of their matmuls, on real text.

    python benchmarks/precision_curves.py --config=configs/code_400m.py --steps=1000 \
        --config.data.source=text_files --config.data.files='GLOB' --config.data.tokenizer=PATH/tokenizer.json

Runs train.py once per entry of RUNS with the same seed and data, in folders under --workdir; a run that was interrupted
continues, one that is done is only read. Appends a line to benchmarks/results/h200.jsonl: the main loss of every run as
means over --window steps, and its mean over the last fifth of the steps relative to that of the first run, minus 1
(`difference`). --picture draws both.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
from typing import Any

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

RUNS = {
    "bfloat16": [],
    "bfloat16 logits": ["--config.training.loss_precision=bfloat16"],
    "fp8": ["--config.model.matmul_precision=fp8", "--config.training.loss_precision=bfloat16"],
    "fp8 and loss": ["--config.model.matmul_precision=fp8", "--config.training.loss_precision=fp8"],
}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--config", required=True)
    flags.add_argument("--steps", type=int, default=1000)
    flags.add_argument("--window", type=int, default=20, help="steps per point of a curve")
    flags.add_argument("--runs", default=",".join(RUNS), help="the first is what the others are compared with")
    flags.add_argument("--workdir", type=pathlib.Path, default=ROOT / "runs" / "precision_curves")
    flags.add_argument("--output", type=pathlib.Path, default=ROOT / "benchmarks" / "results" / "h200.jsonl")
    flags.add_argument("--picture", type=pathlib.Path, help="PNG of the curves, and of each over the first one")
    args, overrides = flags.parse_known_args()
    names = args.runs.split(",")
    unknown = [name for name in names if name not in RUNS]
    if unknown:
        flags.error(f"--runs={','.join(unknown)}: no such run; there are {', '.join(RUNS)}")
    losses = {name: run(args, overrides, name) for name in names}
    last = args.steps // 5
    first = statistics.mean(losses[names[0]][-last:])
    line = {
        "benchmark": "precision_curves",
        "config": pathlib.Path(args.config).stem,
        "overrides": overrides,
        "steps": args.steps,
        "window": args.window,
        "loss": {name: windows(values, args.window) for name, values in losses.items()},
        "difference": {name: statistics.mean(values[-last:]) / first - 1 for name, values in losses.items()},
    }
    from benchmarks.measuring import append

    append(args.output, line)
    if args.picture:
        draw(line, args.picture)


def run(args: argparse.Namespace, overrides: list[str], name: str) -> list[float]:
    """Trains, unless it is done, and returns the main loss of every step."""
    workdir = args.workdir / name.replace(" ", "_")
    metrics = workdir / "metrics.jsonl"
    found = read(metrics) if metrics.exists() else []
    if len(found) < args.steps:
        command = [sys.executable, str(ROOT / "train.py"), f"--config={args.config}", f"--workdir={workdir}"]
        command += [f"--config.training.num_steps={args.steps}", "--config.training.log_every=1"]
        command += [f"--config.checkpoint.every={args.steps}", "--config.training.sample_tokens=0"]
        subprocess.run([*command, *overrides, *RUNS[name]], check=True)
        found = read(metrics)
    return found


def read(metrics: pathlib.Path) -> list[float]:
    """Returns the main loss of every logged training step."""
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    return [line["loss_main"] for line in lines if line.get("loss_main") is not None]


def windows(values: list[float], size: int) -> list[float]:
    """Returns the means of `size` values each."""
    return [round(statistics.mean(values[i : i + size]), 5) for i in range(0, len(values) - size + 1, size)]


def draw(line: dict[str, Any], path: pathlib.Path) -> None:
    """Draws the losses of a line, and how far each is from the first."""
    import matplotlib.pyplot as plt

    figure, (above, below) = plt.subplots(2, sharex=True, figsize=(8, 6), height_ratios=(3, 2), layout="constrained")
    first, *_ = line["loss"].values()
    steps = [line["window"] * (i + 0.5) for i in range(len(first))]
    for name, losses in line["loss"].items():
        above.plot(steps, losses, label=name)
        below.plot(steps, [100 * (one / two - 1) for one, two in zip(losses, first, strict=True)], label=name)
    above.set(ylabel="main loss (nats per token)", title=f"{line['config']}: precision of matmuls")
    below.set(xlabel="step", ylabel=f"loss over {next(iter(line['loss']))} - 1 (%)")
    above.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
