"""Validation of each depth of a saved run, as a table and as JSON."""

import math
from typing import Any

import jax

from mtp_jax.data.corpus import HELD_OUT
from mtp_jax.errors import UserError, warn_once
from mtp_jax.training.run import restore
from mtp_jax.training.validation import DepthResult, validate
from mtp_jax.training.workdir import data_differences


def run(workdir: str, tasks: list[str], num_batches: int | None) -> tuple[str, dict[str, Any]]:
    """Runs the tasks loss and acceptance on a workdir; returns their tables, and their values for JSON.

    Values of validation sets with names are under "validation", by name and task.

    Raises:
      UserError: no run in `workdir`, or one without held-out documents.
    """
    restored = restore(workdir)
    if differences := data_differences(workdir, restored.corpus):
        warn_once(f"the held-out documents are not those of the run: {differences}")
    if not restored.corpus.validation_sets:
        raise UserError("data.validation_fraction=0.0: there are no held-out documents; name a set in data.validation")
    with jax.set_mesh(restored.mesh):
        results = validate(restored, restored.state, num_batches or restored.config.training.eval_batches)
    values: dict[str, Any] = {"step": restored.step}
    named: dict[str, Any] = {}
    for name, depths in results.items():
        of_tasks = {task: as_json(depths, task) for task in tasks if task in FIELDS}
        if name == HELD_OUT:
            values |= of_tasks
        else:
            named[name] = of_tasks
    return tables(results, f"step {restored.step}"), values | ({"validation": named} if named else {})


def tables(results: dict[str, list[DepthResult]], title: str) -> str:
    """Returns the tables of all validation sets as text, each under its name and size."""
    out = []
    for name, depths in results.items():
        kind = "held-out tokens" if name == HELD_OUT else f"tokens of {name}"
        out.append(f"{title}, {depths[0].num_targets:,} {kind}\n{table(depths)}")
    return "\n\n".join(out)


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
