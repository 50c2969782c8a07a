"""Writes the scores by number of operations: by_operations.md, by_operations.json and by_operations.png.

    python experiments/polynomials/by_operations.py --json=FILE --output=DIR

FILE is the JSON of tools.report. Mean and deviation are over the seeds, p is of Welch's t-test against n = 1.
"""

import argparse
import json
import math
import pathlib
import statistics

from matplotlib.figure import Figure

from mtp_jax.tools.reporting.table import mean_and_std
from mtp_jax.tools.reporting.variants import Sample, welch_p_value

COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100")
RANGES = {"1 to 5": "polynomials_in", "6 to 8": "polynomials_out"}

Scores = dict[int, dict[str, list[float]]]


def scores(report: dict) -> Scores:
    """Returns {n: {operations: the score of each seed}}."""
    out: Scores = {}
    for run in report["runs"]:
        depth = sum(name.startswith("loss_mtp_") for name in run["last"])
        of_variant = out.setdefault(1 + depth, {})
        for title, task in RANGES.items():
            for metric, found in run["evaluation"]["benchmarks"][task]["metrics"].items():
                operations = title if metric == "exact" else metric.removeprefix("exact_")
                of_variant.setdefault(operations, []).append(found["value"])
    return dict(sorted(out.items()))


def table(found: Scores) -> str:
    """Returns the Markdown table."""
    columns = [*sorted(name for name in found[1] if name.isdigit()), *RANGES]
    lines = [f"| operations | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for n, by_operations in found.items():
        cells = [mean_and_std(Sample(tuple(by_operations[name])), 3) for name in columns]
        lines.append(f"| n = {n} | {' | '.join(cells)} |")
        if n > 1:
            pairs = [(Sample(tuple(by_operations[name])), Sample(tuple(found[1][name]))) for name in columns]
            p_values = [welch_p_value(one, other) for one, other in pairs]
            shown = ["" if p is None or math.isnan(p) else f"{p:.3f}" for p in p_values]  # nan: no deviation
            lines.append(f"| p | {' | '.join(shown)} |")
    return "\n".join(lines)


def draw(found: Scores, output: pathlib.Path) -> None:
    """Draws the scores over the number of operations: the mean over the seeds as a line, their range as a band."""
    figure = Figure((6.4, 4), layout="constrained")
    axis = figure.subplots()
    for color, (n, by_operations) in zip(COLORS, found.items(), strict=False):
        operations = sorted(int(name) for name in by_operations if name.isdigit())
        values = [by_operations[str(m)] for m in operations]
        axis.plot(operations, [statistics.fmean(v) for v in values], marker="o", color=color, label=f"n = {n}")
        ranges = [min(v) for v in values], [max(v) for v in values]
        axis.fill_between(operations, *ranges, color=color, alpha=0.2, linewidth=0)
    axis.axvline(5.5, color="#999999", linestyle="dashed", linewidth=1)
    axis.text(5.55, 0.98, "more than in training", color="#666666", fontsize=8, va="top")
    axis.set(xlabel="operations in the expression", ylabel="share of right results", ylim=(0, 1.03))
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, loc="lower left")
    figure.savefig(output, dpi=130)


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("--json", type=pathlib.Path, required=True)
    flags.add_argument("--output", type=pathlib.Path, required=True)
    args = flags.parse_args()
    found = scores(json.loads(args.json.read_text()))
    (args.output / "by_operations.json").write_text(json.dumps(found, indent=1) + "\n")
    text = table(found)
    (args.output / "by_operations.md").write_text(text + "\n")
    print(text)
    draw(found, args.output / "by_operations.png")


if __name__ == "__main__":
    main()
