"""A table of runs' newest numbers, and their curves in a PNG.

    python -m mtp_jax.tools.report --workdir=runs/a [--workdir=runs/b ...] [--output=report.png]

Exit code 2 with one line where a workdir has no metrics.
"""

import pathlib
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend without a display)

from mtp_jax import cli  # noqa: E402
from mtp_jax.config import UserError  # noqa: E402
from mtp_jax.training.metrics import METRICS_FILE, read_metrics  # noqa: E402

Rows = list[dict[str, Any]]

# panel title, the metrics it shows: a name, or a prefix ending in _ for one curve a depth
PANELS = (
    ("loss", ("loss_main", "loss_mtp_")),
    ("label accuracy", ("accuracy_main", "accuracy_mtp_")),
    ("agreement with the main head", ("agreement_mtp_",)),
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
    ("largest expert load / mean", ("moe_load_max_over_mean",)),
)
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
STYLES: tuple[Any, ...] = ("solid", "dashed", "dotted", "dashdot")  # main, depths 1, 2, 3; then from the start again


def main(argv: list[str]) -> None:
    """The command line.

    Raises:
      UserError: a workdir without metrics, or an output that cannot be written.
    """
    flags = cli.parser(__doc__)
    flags.add_argument("--workdir", action="append", required=True, help="folder of a run; may be given repeatedly")
    flags.add_argument("--output", help="the PNG to write; default: report.png in the first workdir")
    args = flags.parse_args(argv)
    runs = load_runs(args.workdir)
    output = pathlib.Path(args.output or pathlib.Path(args.workdir[0]) / "report.png")
    if output.suffix != ".png":
        raise UserError(f"--output={output}: must end in .png")
    print(table(runs))
    try:
        draw(runs, output)
    except OSError as error:
        raise UserError(f"--output={output}: cannot be written ({error.strerror})") from error
    print(f"curves: {output}")


def load_runs(workdirs: list[str]) -> dict[str, Rows]:
    """Run name -> lines of its metrics file. A name is as much of the path's end as tells the runs apart.

    Raises:
      UserError: a workdir that does not exist, or has no metrics.
    """
    runs: dict[str, Rows] = {}
    for workdir in dict.fromkeys(workdirs):
        path = pathlib.Path(workdir) / METRICS_FILE
        if not path.parent.is_dir():
            raise UserError(f"--workdir={workdir}: no such folder")
        if not path.is_file():
            raise UserError(f"--workdir={workdir}: has no {METRICS_FILE}; give the folder of a run")
        try:
            rows = read_metrics(path)
        except ValueError as error:
            raise UserError(str(error)) from error
        if not rows:
            raise UserError(f"--workdir={workdir}: its {METRICS_FILE} is empty; the run has logged nothing yet")
        runs[workdir] = rows
    return dict(zip(_short_names(list(runs)), runs.values(), strict=True))


def table(runs: dict[str, Rows]) -> str:
    """One line a run: the newest values, depths 0 (main), 1, 2 ... side by side; tokens/s is the median of the run."""
    header = ["run", "step", "loss", "by depth", "accuracy", "agreement", "tokens/s"]
    lines = [header]
    for name, rows in runs.items():
        last = rows[-1]
        speeds = sorted(row["tokens_per_second"] for row in rows if row.get("tokens_per_second") is not None)
        lines.append(
            [
                name,
                str(last["step"]),
                _number(last.get("loss"), 4),
                _depths(last, "loss", 3),
                _depths(last, "accuracy", 3),
                _depths(last, "agreement", 3),
                f"{speeds[len(speeds) // 2]:,.0f}" if speeds else "-",
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)


def draw(runs: dict[str, Rows], output: pathlib.Path) -> None:
    """Curves over steps, one panel for each group of metrics that any run has.

    One run: a colour a depth. Several: a colour a run and a line style a depth.
    """
    panels = [(title, names) for title, names in PANELS if any(_curves(rows, names) for rows in runs.values())]
    if not panels:
        raise UserError(f"--workdir: the {METRICS_FILE} has none of the metrics that are drawn")
    num_columns = min(3, len(panels))
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(4.6 * num_columns, 3.2 * num_rows), squeeze=False, layout="constrained"
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (title, names) in zip(axes.flat, panels, strict=False):
        for run, rows in enumerate(runs.values()):
            for depth, values in _curves(rows, names).items():
                color = COLORS[(run if len(runs) > 1 else depth) % len(COLORS)]
                style = STYLES[depth % len(STYLES)] if len(runs) > 1 else "solid"
                marker = "o" if len(values) == 1 else None
                axis.plot(*zip(*values, strict=True), color=color, linestyle=style, linewidth=1.5, marker=marker)
        _dress(axis, title)
    _legend(figure, runs)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=130)
    plt.close(figure)


def _curves(rows: Rows, names: tuple[str, ...]) -> dict[int, list[tuple[int, float]]]:
    """Depth -> (step, value) pairs."""
    out: dict[int, list[tuple[int, float]]] = {}
    for row in rows:
        for key, value in row.items():
            for name in names:
                is_depth = name.endswith("_") and key.startswith(name) and key[len(name) :].isdigit()
                if value is not None and (key == name or is_depth):
                    out.setdefault(int(key[len(name) :]) if is_depth else 0, []).append((row["step"], value))
    return dict(sorted(out.items()))


def _dress(axis: Any, title: str) -> None:
    axis.set_title(title, fontsize=10, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=8, color="#999999")
    axis.grid(color="#e6e6e6", linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color("#999999")
    if title == "learning rate":
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
        axis.yaxis.get_offset_text().set_fontsize(8)


def _legend(figure: Any, runs: dict[str, Rows]) -> None:
    """One for all panels: depths of a single run, or runs and then the depths' line styles."""
    depth = max((d for rows in runs.values() for d in _curves(rows, ("loss_mtp_",))), default=0)
    depths = ["main", *(f"depth {k}" for k in range(1, depth + 1))]
    line = matplotlib.lines.Line2D
    if len(runs) == 1:
        handles = [line([], [], color=COLORS[k % len(COLORS)], label=name) for k, name in enumerate(depths)]
    else:
        handles = [line([], [], color=COLORS[i % len(COLORS)], label=name) for i, name in enumerate(runs)]
        styles = [line([], [], color="#555555", linestyle=STYLES[k % 4], label=n) for k, n in enumerate(depths)]
        handles += styles if depth else []
    title = next(iter(runs)) if len(runs) == 1 else None
    figure.legend(handles=handles, loc="outside upper left", ncols=6, fontsize=8, frameon=False, title=title)


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _depths(row: dict[str, Any], kind: str, digits: int) -> str:
    """Main and every depth's value of one kind; agreement has no main."""
    values = [row[f"{kind}_main"]] if f"{kind}_main" in row else []
    depth = 1
    while f"{kind}_mtp_{depth}" in row:
        values.append(row[f"{kind}_mtp_{depth}"])
        depth += 1
    return " ".join(_number(v, digits) for v in values) or "-"


def _short_names(paths: list[str]) -> list[str]:
    parts = [pathlib.Path(p).resolve().parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-length:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    return paths


if __name__ == "__main__":
    cli.run(main)
