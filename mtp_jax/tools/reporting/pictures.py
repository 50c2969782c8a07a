"""Curves over training and bars of benchmarks, as PNGs."""

import io
import math
import statistics
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.rcsetup import cycler
from matplotlib.typing import LineStyleType

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.tools.reporting.runs import Rows, Run
from mtp_jax.tools.reporting.variants import Sample, Variant, baseline_of, comparable, shown_benchmarks
from mtp_jax.training.metrics import METRICS_FILE

# (panel title, metrics): a metric is a name, or a prefix ending in _ for one curve per depth
LOSS, ACCURACY, AGREEMENT = "loss", "label accuracy", "agreement with the main head"
OF_ONE_RUN = (
    (LOSS, ("loss_main", "loss_mtp_")),
    (ACCURACY, ("accuracy_main", "accuracy_mtp_")),
    (AGREEMENT, ("agreement_mtp_",)),
)
OF_THE_STEP = (
    ("learning rate", ("learning_rate",)),
    ("gradient norm", ("grad_norm",)),
    ("largest expert load / mean", ("moe_load_max_over_mean",)),
)
UNITS = {LOSS: "nats per token", ACCURACY: "share of positions", AGREEMENT: "share of positions"}
PEAKED = (LOSS, "gradient norm")  # panels scaled to the later steps; the first values are far larger
COLORS = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
STYLES: tuple[LineStyleType, ...] = ("solid", "dashed", "dotted", "dashdot")  # for more variants than colours
RC: dict[Any, Any] = {
    "font.size": 8,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.prop_cycle": cycler(color=COLORS),  # numbered "C0", "C1", ...
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#999999",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}

Curve = list[tuple[int, float]]
LegendEntry = tuple[str, str, LineStyleType]  # label, colour, line


@matplotlib.rc_context(RC)
def draw(variants: Sequence[Variant], output: epath.Path) -> None:
    """Draws curves over steps, one panel per group of metrics that any run has.

    A single run has one colour per depth. Several runs have one panel per depth and one colour per variant: the seeds
    are thin lines, the mean of the finished ones (of all, if none is finished) is a bold line, and a band reaches from
    the lowest to the highest of them.

    Raises:
      UserError: no run has a metric to draw.
      OSError: the file cannot be written.
    """
    logged = [run for v in variants for run in v.runs if run.rows]
    is_single = len(logged) == 1 and len(variants) == 1
    panels = [*OF_ONE_RUN, *OF_THE_STEP] if is_single else _panels(logged)
    panels = [(title, names) for title, names in panels if any(curves(run.rows, names) for run in logged)]
    if not panels:
        raise UserError(f"--workdir: the {METRICS_FILE} has none of the metrics that are drawn")
    figure, axes = _grid(len(panels), 3 if len(panels) <= 9 else 4)
    for axis, (title, names) in zip(axes, panels, strict=True):
        if is_single:
            for depth, curve in curves(logged[0].rows, names).items():
                _line(axis, curve, color=f"C{depth}", linewidth=1.5)
        else:
            _draw_variants(axis, variants, names)
        _dress(axis, title)
    labels: list[LegendEntry]
    if is_single:
        depth = max(curves(logged[0].rows, ("loss_mtp_",)), default=0)
        labels = [("main" if k == 0 else f"depth {k}", f"C{k}", "solid") for k in range(depth + 1)]
    else:
        drawn = [(i, v) for i, v in enumerate(variants) if any(run.rows for run in v.runs)]
        labels = [(_legend_label(v), f"C{i}", _style(i)) for i, v in drawn]
    _legend(figure, labels, logged[0].name if is_single else None)
    _save(figure, output)


@matplotlib.rc_context(RC)
def draw_benchmarks(variants: Sequence[Variant], output: epath.Path) -> bool:
    """Draws bars: one panel per benchmark, each with its own scale, and one colour per variant. Error bars are the
    sample standard deviation over seeds, or the task's standard error for a single seed. Returns False if no run has a
    benchmark.

    Raises:
      OSError: the file cannot be written.
    """
    tasks = shown_benchmarks(variants)
    if not tasks:
        return False
    ordered = [t for kind in ("generative", "likelihood") for t in tasks if t[1]["kind"] == kind]
    figure, axes = _grid(len(ordered), min(4, max(2, math.ceil(math.sqrt(len(ordered))))))
    for axis, (task, facts) in zip(axes, ordered, strict=True):
        for i, variant in enumerate(variants):
            sample = variant.benchmark(task)
            if sample is None:
                continue
            error = sample.error if sample.deviation is None else sample.deviation
            axis.bar(i, sample.mean, color=f"C{i}", width=0.75, hatch=None if i < len(COLORS) else "//")
            axis.errorbar(i, sample.mean, error, color="#333333", capsize=3, linewidth=1)
            axis.plot([i] * len(sample.values), sample.values, ".", color="#333333", markersize=3)
        axis.set_title(f"{task}\n")
        lower = "" if facts.get("higher_is_better", True) else ", lower is better"
        what = f"{facts['main_metric']}{lower}; {facts['kind']}"
        axis.text(0, 1.03, what, color="#666666", transform=axis.transAxes)
        axis.set_xticks([])
        axis.set_xlim(-0.75, len(variants) - 0.25)
        if axis.get_ylim()[0] < 0 <= min(v for variant in variants for v in _values(variant, task)):
            axis.set_ylim(bottom=0)  # matplotlib's limits go below 0 if all values are 0
    labels: list[LegendEntry] = [(_legend_label(v), f"C{i}", "solid") for i, v in enumerate(variants)]
    _legend(figure, labels, "error bars: standard deviation over seeds, or standard error of the task for one seed")
    _save(figure, output)
    return True


@matplotlib.rc_context(RC)
def draw_balance(variants: Sequence[Variant], output: epath.Path) -> bool:
    """Draws the differences from the baseline, generative scores over likelihood scores: one panel for the means of all
    benchmarks, and one for each group with benchmarks of both kinds.

    A small point is a seed minus the baseline's same seed; a large one is the difference of the means, with the
    standard error of that difference over seeds. Returns False if there is no baseline, or no benchmark of one kind.

    Raises:
      OSError: the file cannot be written.
    """
    shown = shown_benchmarks(variants)
    groups = [("all benchmarks, mean", shown)]
    for group in dict.fromkeys(facts.get("group") for _, facts in shown if facts.get("group")):
        groups.append((str(group), [t for t in shown if t[1].get("group") == group]))
    panels = [(title, comparable(ts, "likelihood"), comparable(ts, "generative")) for title, ts in groups]
    panels = [panel for panel in panels if panel[1] and panel[2]]
    pairs = [(i, v, baseline_of(v, variants)) for i, v in enumerate(variants) if not v.is_baseline]
    drawn = [(i, v, baseline) for i, v, baseline in pairs if baseline is not None]
    if not panels or not drawn:
        return False
    figure, axes = _grid(len(panels), 3)
    for axis, (title, *kinds) in zip(axes, panels, strict=True):
        for i, variant, baseline in drawn:
            _draw_differences(axis, variant, baseline, kinds, f"C{i}")
        axis.axhline(0, color="#999999", linewidth=0.8, zorder=0)
        axis.axvline(0, color="#999999", linewidth=0.8, zorder=0)
        axis.axline((0, 0), slope=1, color="#cccccc", linewidth=0.8, linestyle="dashed", zorder=0)
        axis.set_title(title)
        axis.set_xlabel("likelihood, difference from the baseline")
        axis.set_ylabel("generative, difference")
        axis.margins(0.15)
        axis.set_aspect("equal", adjustable="datalim")
    labels: list[LegendEntry] = [(_legend_label(v), f"C{i}", "solid") for i, v, _ in drawn]
    _legend(
        figure, labels, "small: a seed; large: the means, with standard errors over seeds; dashed: equal differences"
    )
    _save(figure, output)
    return True


def _draw_differences(
    axis: Axes, variant: Variant, baseline: Variant, kinds: Sequence[Sequence[str]], color: str
) -> None:
    """Draws one variant's points; kinds: the benchmarks of the horizontal and of the vertical axis."""
    ours, theirs = ([v.mean_by_seed(names) for names in kinds] for v in (variant, baseline))
    for seed in ours[0]:
        if all(seed in found for found in (*ours, *theirs)):
            x, y = (one[seed][0][0] - other[seed][0][0] for one, other in zip(ours, theirs, strict=True))
            axis.plot(x, y, ".", color=color, markersize=7, alpha=0.6)
    samples = [(variant.mean_benchmark(names), baseline.mean_benchmark(names)) for names in kinds]
    found = [(one, other) for one, other in samples if one is not None and other is not None]
    if len(found) == len(samples):
        (x, xerr), (y, yerr) = ((one.mean - other.mean, _standard_error(one, other)) for one, other in found)
        axis.errorbar(x, y, yerr, xerr, fmt="o", color=color, markersize=7, capsize=3, linewidth=1)


def _standard_error(one: Sample, other: Sample) -> float | None:
    """Returns the standard error over seeds of the difference of two means; None for a single run."""
    if one.deviation is None or other.deviation is None:
        return None
    return math.hypot(one.deviation / math.sqrt(len(one.values)), other.deviation / math.sqrt(len(other.values)))


def _values(variant: Variant, task: str) -> tuple[float, ...]:
    sample = variant.benchmark(task)
    return sample.values if sample else (0.0,)


def curves(rows: Rows, names: tuple[str, ...]) -> dict[int, Curve]:
    """Returns the (step, value) pairs of the named metrics by depth."""
    out: dict[int, Curve] = {}
    for row in rows:
        for key, value in row.items():
            for name in names:
                is_depth = name.endswith("_") and key.startswith(name) and key[len(name) :].isdigit()
                if value is not None and (key == name or is_depth):
                    out.setdefault(int(key[len(name) :]) if is_depth else 0, []).append((row["step"], value))
    return dict(sorted(out.items()))


def mean_curve(every: Sequence[Curve]) -> Curve:
    """Returns the mean at the steps that all curves have."""
    return [(step, statistics.fmean(values)) for step, values in _shared(every)]


def _shared(every: Sequence[Curve]) -> list[tuple[int, list[float]]]:
    """Returns the steps that all curves have, each with the values of the curves."""
    tables = [dict(curve) for curve in every]
    return [(step, [table[step] for table in tables]) for step, _ in every[0] if all(step in t for t in tables)]


def _panels(runs: Sequence[Run]) -> list[tuple[str, tuple[str, ...]]]:
    """Returns (title, metrics) of the panels: losses and agreement per depth, then the metrics of the step."""
    depth = max((max(curves(run.rows, ("loss_mtp_",)), default=0) for run in runs), default=0)
    panels = [(f"{LOSS}, main", ("loss_main",))]
    panels += [(f"{LOSS}, depth {k}", (f"loss_mtp_{k}",)) for k in range(1, depth + 1)]
    panels += [(f"{ACCURACY}, main", ("accuracy_main",))]
    panels += [(f"{AGREEMENT}, depth {k}", (f"agreement_mtp_{k}",)) for k in range(1, depth + 1)]
    return [*panels, *OF_THE_STEP]


def _draw_variants(axis: Axes, variants: Sequence[Variant], names: tuple[str, ...]) -> None:
    for i, variant in enumerate(variants):
        every = {run: curve for run in variant.runs for curve in curves(run.rows, names).values()}
        for curve in every.values() if len(every) > 1 else ():
            _line(axis, curve, color=f"C{i}", linewidth=0.6, alpha=0.55, linestyle=_style(i))
        finished = [curve for run, curve in every.items() if run.is_finished]
        if every:
            averaged = finished or list(every.values())
            _line(axis, mean_curve(averaged), color=f"C{i}", linewidth=1.9, linestyle=_style(i))
            if len(averaged) > 1 and (shared := _shared(averaged)):
                steps, values = zip(*shared, strict=True)
                lowest, highest = [min(v) for v in values], [max(v) for v in values]
                axis.fill_between(steps, lowest, highest, color=f"C{i}", alpha=0.12, linewidth=0)


def _line(axis: Axes, curve: Curve, **style: Any) -> None:
    if curve:
        steps, values = zip(*curve, strict=True)
        axis.plot(steps, values, marker="o" if len(curve) == 1 else None, **style)


def _grid(num_panels: int, num_columns: int) -> tuple[Figure, list[Axes]]:
    num_columns = min(num_columns, num_panels)
    num_rows = -(-num_panels // num_columns)
    size = (max(6.4, 4.6 * num_columns), 3.2 * num_rows)  # at least as wide as the legend's longest line
    figure = Figure(size, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False)
    for axis in axes.flat[num_panels:]:
        axis.remove()
    return figure, list(axes.flat[:num_panels])


def _dress(axis: Axes, title: str) -> None:
    axis.set_title(title)
    axis.set_xlabel("step")
    axis.set_ylabel(next((unit for start, unit in UNITS.items() if title.startswith(start)), ""))
    if title.startswith(PEAKED):
        _scale_to_later_steps(axis)
    if title == "learning rate":
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))


def _scale_to_later_steps(axis: Axes) -> None:
    """Sets the y limits to the values of the last three quarters of the steps."""
    curves = [np.asarray(line.get_xydata()) for line in axis.get_lines()]
    long = [points for points in curves if len(points) > 20]
    last = max((points[-1, 0] for points in long), default=0)
    values = [y for points in long for x, y in points if x > last / 4]
    if values:
        margin = 0.05 * (max(values) - min(values)) or 0.05
        axis.set_ylim(min(values) - margin, max(values) + margin)


def _legend(figure: Figure, labels: list[LegendEntry], title: str | None) -> None:
    handles = [Line2D([], [], color=color, linestyle=style, linewidth=1.9, label=text) for text, color, style in labels]
    longest = max(len(text) for text, *_ in labels)
    figure.legend(
        handles=handles,
        loc="outside upper left",
        ncols=max(1, int(figure.get_figwidth() * 11 / (longest + 8))),
        title=title,
        alignment="left",
    )


def _legend_label(variant: Variant) -> str:
    return f"{variant.label()} ({len(variant.runs)} seeds)" if len(variant.runs) > 1 else variant.label()


def _save(figure: Figure, output: epath.Path) -> None:
    picture = io.BytesIO()
    dpi = 130 if len(figure.axes) <= 12 else 90  # saves a megabyte if there are many panels
    figure.savefig(picture, dpi=dpi, format="png")
    storage.make_folder(output.parent)
    storage.write_bytes(output, picture.getvalue())


def _style(index: int) -> LineStyleType:
    return STYLES[index // len(COLORS) % len(STYLES)]
