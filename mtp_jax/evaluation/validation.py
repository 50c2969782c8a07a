"""Validation of each depth of a saved run, as a table and as JSON."""

import math
from typing import Any

import jax

from mtp_jax.errors import warn_once
from mtp_jax.training.run import restore
from mtp_jax.training.validation import DepthResult, validate
from mtp_jax.training.workdir import data_differences


def run(workdir: str, tasks: list[str], num_batches: int | None) -> tuple[str, dict[str, Any]]:
    """Runs the tasks loss and acceptance on a workdir; returns their table, and their values for JSON.

    Raises:
      UserError: no run in `workdir`.
    """
    restored = restore(workdir)
    if differences := data_differences(workdir, restored.corpus):
        warn_once(f"the held-out documents are not those of the run: {differences}")
    with jax.set_mesh(restored.mesh):
        results = validate(restored, restored.state, num_batches or restored.config.training.eval_batches)
    title = f"step {restored.step}, {results[0].num_targets:,} held-out tokens"
    values = {"step": restored.step, **{task: as_json(results, task) for task in tasks if task in FIELDS}}
    return f"{title}\n{table(results)}", values


def table(results: list[DepthResult]) -> str:
    """Returns the results as text, a row per depth."""
    head = f"{'depth':<8}{'loss':>8}{'bits/byte':>11}{'accuracy':>10}{'agreement':>11}{'tokens/forward':>16}"
    rows = [
        f"{'main' if r.depth == 0 else f'+{r.depth}':<8}{r.loss:>8.3f}{r.bits_per_byte:>11.3f}{r.accuracy:>10.1%}"
        f"{'-' if r.depth == 0 else f'{r.agreement:.1%}':>11}{r.expected_tokens:>16.2f}"
        for r in results
    ]
    return "\n".join([head, *rows])


FIELDS = {
    "loss": ("loss", "bits_per_byte", "accuracy", "num_targets"),
    "acceptance": ("agreement", "expected_tokens"),
}


def as_json(results: list[DepthResult], task: str) -> dict[str, Any]:
    """Returns the fields of a task: {"main": {...}, "mtp_1": {...}, ...}; None where a depth had no targets."""
    out: dict[str, Any] = {}
    for r in results:
        values = {name: getattr(r, name) for name in FIELDS[task]}
        out[f"mtp_{r.depth}" if r.depth else "main"] = {n: None if math.isnan(v) else v for n, v in values.items()}
    return out
