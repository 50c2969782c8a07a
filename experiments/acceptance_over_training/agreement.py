"""Writes the agreement of each depth over training: agreement.md, agreement.json and agreement.png.

    python experiments/acceptance_over_training/agreement.py --sweep=DIR --output=DIR

A value is the mean of the batches logged within a twentieth of the steps; mean, deviation and range are over the seeds.
"""

import argparse
import json
import math
import pathlib
import statistics
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mtp_jax.tools.reporting.runs import Run, load_runs
from mtp_jax.tools.reporting.table import mean_and_std
from mtp_jax.tools.reporting.variants import Sample, Variant, variants_of

NUM_WINDOWS = 20
SHOWN = (2, 5, 10, 20)  # windows in the table
LABELS = {"none": "next token", "parallel": "parallel heads", "sequential": "sequential modules"}
COLORS = ("#2a78d6", "#eb6834", "#1baf7a")


def windows(run: Run, metric: str) -> list[tuple[int, float]]:
    """Returns (last step, mean of the metric) of each window that has logged batches."""
    size = math.ceil(run.rows[-1]["step"] / NUM_WINDOWS)
    found: dict[int, list[float]] = {}
    for row in run.rows:
        found.setdefault(math.ceil(row["step"] / size), []).append(row[metric])
    return [(number * size, statistics.fmean(values)) for number, values in sorted(found.items())]


def over_training(variants: Sequence[Variant]) -> dict[str, dict[str, list[dict[str, object]]]]:
    """Returns {kind: {metric: [{"step", "values": one per seed}]}} of the finished runs."""
    out: dict[str, dict[str, list[dict[str, object]]]] = {}
    for variant in variants:
        depths = range(1, 1 + (0 if variant.is_baseline else variant.depth))
        for metric in ("loss_main", *(f"agreement_mtp_{k}" for k in depths)):
            every = [windows(run, metric) for run in variant.finished]
            points = [{"step": at[0][0], "values": [value for _, value in at]} for at in zip(*every, strict=True)]
            out.setdefault(variant.kind, {})[metric] = points
    return out


def table(curves: dict[str, dict[str, list[dict]]]) -> str:
    """Returns the Markdown table: agreement of each depth and the main loss of the batches, at some steps."""
    steps = [next(iter(curves.values()))["loss_main"][i - 1]["step"] for i in SHOWN]
    header = ["", *(f"step {step}" for step in steps)]
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for kind, metrics in curves.items():
        for metric, points in metrics.items():
            name = "main loss" if metric == "loss_main" else f"agreement, depth {metric.rpartition('_')[2]}"
            cells = [mean_and_std(Sample(tuple(points[i - 1]["values"])), 3) for i in SHOWN]
            lines.append(f"| {LABELS[kind]}, {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(curves: dict[str, dict[str, list[dict]]], output: pathlib.Path) -> None:
    """Draws the agreement of each depth, one panel per kind, and the main loss of all kinds."""
    with_depths = [kind for kind, metrics in curves.items() if len(metrics) > 1]
    figure = Figure((4.2 * (1 + len(with_depths)), 3.6), layout="constrained")
    *panels, last = figure.subplots(1, 1 + len(with_depths))
    lowest = min(
        value for m in curves.values() for name in m if name != "loss_main" for p in m[name] for value in p["values"]
    )
    for axis, kind in zip(panels, with_depths, strict=True):
        agreements = [points for metric, points in curves[kind].items() if metric != "loss_main"]
        for k, points in enumerate(agreements, 1):
            _band(axis, points, COLORS[k - 1], f"depth {k}")
        axis.set(title=LABELS[kind], ylabel="agreement with the main head", ylim=(math.floor(lowest * 10) / 10, 1))
    for i, (kind, metrics) in enumerate(curves.items()):
        _band(last, metrics["loss_main"][1:], COLORS[i], LABELS[kind])
    last.set(title="main loss", ylabel="nats per byte, training batches")
    for axis in (*panels, last):
        axis.set_xlabel("step")
        axis.grid(color="#e6e6e6", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(output, dpi=130)


def _band(axis: Axes, points: list[dict], color: str, label: str) -> None:
    """Draws the mean over the seeds as a line and their range as a band."""
    steps, values = [p["step"] for p in points], [p["values"] for p in points]
    axis.plot(steps, [statistics.fmean(v) for v in values], color=color, label=label)
    axis.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=color, alpha=0.2, linewidth=0)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--sweep", required=True)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    args = flags.parse_args()
    curves = over_training(variants_of(load_runs([], [args.sweep])))
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "agreement.json").write_text(json.dumps(curves, indent=1) + "\n")
    text = table(curves)
    (args.output / "agreement.md").write_text(text + "\n")
    print(text)
    draw(curves, args.output / "agreement.png")


if __name__ == "__main__":
    main()
