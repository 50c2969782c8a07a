"""Output files of eval.py: JSON for programs, Markdown and a plot for people."""

import io
import json
import math
from typing import NotRequired, TypedDict

from etils import epath

from mtp_jax import cli, storage
from mtp_jax.config import UserError
from mtp_jax.errors import warn_once
from mtp_jax.typing import JsonObject, PyTree

Bar = tuple[str, float, float | None]  # label, value and its standard error
Panel = tuple[str, list[Bar]]


class Metric(TypedDict):
    value: float
    stderr: float | None


class Benchmark(TypedDict):
    """Result of one task or group.

    metrics: by name: "acc", or "exact_match,strict-match" after a filter of that name.
    kind: "generative" or "likelihood". group: the one it belongs to.
    num_shortened: answers truncated by the model's context, before the limit of their task.
    """

    metrics: dict[str, Metric]
    main_metric: str
    higher_is_better: bool
    kind: str
    num_docs: int
    num_fewshot: int
    group: str | None
    tokens_per_forward: NotRequired[float]
    num_shortened: NotRequired[int]


def check_output(path: str) -> None:
    """Rejects an --output that cannot be written, before anything is measured.

    Raises:
      UserError: a suffix other than .json, a folder that does not exist or is not writable.
    """
    if not path.endswith(".json"):
        raise UserError(f"--output={path}: must end in .json")
    cli.check_output("output", path)


def write(path: epath.Path, workdir: str, texts: list[str], values: JsonObject) -> None:
    """Writes the values to `path`, and beside it NAME.md and, if there is something to plot, NAME.png.

    The JSON is written last, so it exists only with the others.
    """
    has_picture = draw(values, path.with_suffix(".png"), workdir)
    picture = f"\n![{workdir}]({path.with_suffix('.png').name})\n" if has_picture else ""
    tables = "\n".join(f"```\n{text}\n```\n" for text in texts)
    storage.write_text(path.with_suffix(".md"), f"# {workdir}\n\n{tables}{picture}")
    storage.write_text(path, json.dumps(without_nan(values), indent=2, allow_nan=False) + "\n")


def without_nan(values: PyTree) -> PyTree:
    """Returns the same values with None for numbers that JSON does not have."""
    if isinstance(values, dict):
        return {key: without_nan(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [without_nan(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values


def draw(values: JsonObject, path: epath.Path, title: str) -> bool:
    """Draws a bar chart of the results; returns False if there is nothing to draw, or no matplotlib, with a notice."""
    panels = [panel for panel in (_losses(values), _acceptance(values), _benchmarks(values)) if panel]
    if not panels:
        return False
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        warn_once(f"{path.name} is not drawn: matplotlib is not installed; pip install matplotlib (the extra plot)")
        return False

    height = 1.0 + 0.3 * max(len(rows) for _, rows in panels)
    size = 4.6 * len(panels), max(2.4, height)
    figure = Figure(size, layout="constrained")
    for axis, (name, rows) in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
        names, numbers, errors = zip(*rows, strict=True)
        places = range(len(rows))
        xerr = [e or 0.0 for e in errors]
        bars = axis.barh(places, numbers, xerr=xerr, color="#2a78d6", ecolor="#333333", height=0.7)
        axis.bar_label(bars, fmt="{:.3g}", padding=3, size=8)
        axis.set_yticks(places, names, fontsize=8)
        axis.invert_yaxis()
        axis.margins(x=0.15)
        axis.tick_params(axis="x", labelsize=8)
        axis.set_title(name, fontsize=10, loc="left")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    picture = io.BytesIO()
    figure.savefig(picture, dpi=130, format="png")
    storage.write_bytes(path, picture.getvalue())
    return True


def _losses(values: JsonObject) -> Panel | None:
    rows: list[Bar] = [(depth, v["loss"], None) for depth, v in values.get("loss", {}).items() if v["loss"] is not None]
    return ("loss, nats a token", rows) if rows else None


def _acceptance(values: JsonObject) -> Panel | None:
    agreed = [(f"agreement, {d}", v["agreement"], None) for d, v in values.get("acceptance", {}).items() if d != "main"]
    kept = values.get("speculative", {}).get("acceptance", [])
    measured = [(f"accepted, draft {k}", rate, None) for k, rate in enumerate(kept, 1)]
    rows: list[Bar] = [row for row in agreed + measured if row[1] is not None]
    return ("drafts", rows) if rows else None


def _benchmarks(values: JsonObject) -> Panel | None:
    """Returns the main metric of each benchmark except tasks of groups and perplexities, which have another scale."""
    rows: list[Bar] = []
    for name, found in values.get("benchmarks", {}).items():
        main = found["metrics"][found["main_metric"]]
        if found["group"] is None and 0 <= main["value"] <= 1:
            rows.append((f"{name}, {found['main_metric'].split(',')[0]}", main["value"], main["stderr"]))
    return ("benchmarks", rows) if rows else None
