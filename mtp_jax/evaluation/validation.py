"""Validation of each depth on held-out documents: loss, bits per byte, accuracy, agreement, expected tokens."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.losses import expected_tokens_per_pass
from mtp_jax.training.run import Run, global_batches, restore


@dataclass(frozen=True)
class DepthResult:
    """One depth on the validation split.

    loss: nats per token, over this depth's own positions. bits_per_byte: of the target tokens' UTF-8 text.
    accuracy: argmax is the next token. agreement: argmax is the main head's k positions later.
    expected_tokens: per forward pass, drafting with depths 1..k, if drafts are accepted as often as they agree.
    """

    depth: int
    loss: float
    bits_per_byte: float
    accuracy: float
    agreement: float
    expected_tokens: float
    num_targets: int


def run(workdir: str, tasks: list[str], num_batches: int | None) -> tuple[str, dict[str, Any]]:
    """Runs the tasks loss and acceptance on a workdir; returns their table, and their values for JSON.

    Raises:
      UserError: no run in `workdir`.
    """
    restored = restore(workdir)
    with jax.set_mesh(restored.mesh):
        results = validate(restored, num_batches or restored.config.training.eval_batches)
    title = f"step {restored.step}, {results[0].num_targets:,} held-out tokens"
    values = {"step": restored.step, **{task: as_json(results, task) for task in tasks if task in FIELDS}}
    return f"{title}\n{table(results)}", values


def validate(run: Run, num_batches: int) -> list[DepthResult]:
    """Evaluates depths 0..D on the first `num_batches` validation batches, or all if there are fewer.

    Must be called under `jax.set_mesh(run.mesh)`.
    """
    token_bytes = np.zeros(run.config.model.vocab_size or 0, np.int32)
    known = run.corpus.tokenizer.token_bytes
    token_bytes[: len(known)] = known
    totals: dict[str, np.ndarray] = {}
    for i, batch in enumerate(global_batches(run, "validation")):
        if i == num_batches:
            break
        sums = jax.device_get(run.trainer.evaluate(run.state, batch, jnp.asarray(token_bytes)))
        totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
    return _results(totals)


def _results(totals: dict[str, np.ndarray]) -> list[DepthResult]:
    out: list[DepthResult] = []
    rates: list[float] = []
    for k in range(len(totals["num"])):
        at = {name: float(value[k]) for name, value in totals.items()}
        agreement = _ratio(at["agree"], at["num_compared"])
        rates += [agreement] if k else []
        out.append(
            DepthResult(
                depth=k,
                loss=_ratio(at["nll"], at["num"]),
                bits_per_byte=_ratio(at["nll"] / math.log(2), at["bytes"]),
                accuracy=_ratio(at["correct"], at["num"]),
                agreement=agreement,
                expected_tokens=expected_tokens_per_pass(rates),
                num_targets=int(at["num"]),
            )
        )
    return out


def _ratio(total: float, count: float) -> float:
    """Returns NaN if nothing was counted, so that a depth without targets does not appear perfect."""
    return total / count if count else math.nan


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
