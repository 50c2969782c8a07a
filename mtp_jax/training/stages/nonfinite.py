"""Losses and gradients that are not finite: named, skipped up to training.skip_nonfinite in a row, or the end."""

import math
from typing import Any

from mtp_jax.training import gradient_groups
from mtp_jax.training.notices import notice
from mtp_jax.training.stages.stage import Session, Stage
from mtp_jax.training.step import GROUP_NORMS


class NonFiniteLoss(RuntimeError):
    """The loss or a gradient became NaN or infinite. The message is one line. Exit code 1."""


class StopAtNonFinite(Stage):
    """Raises NonFiniteLoss at the first step whose loss or gradients are not finite, or that may not be skipped.

    The step itself (`make_step`) leaves the state as it is; this stage counts. The steps in a row are counted from the
    start of the process.
    """

    def __init__(self) -> None:
        self._in_a_row = 0

    def on_metrics(self, session: Session, step: int, metrics: dict[str, Any]) -> None:
        terms = non_finite_terms(metrics)
        if not terms:
            self._in_a_row = 0
            return
        found = ", ".join(terms)
        groups = gradient_groups.not_finite(session.run.trainer.groups, metrics[GROUP_NORMS])
        found += f"; gradient not finite in {groups}" if groups else ""
        allowed = session.config.training.skip_nonfinite
        is_skipped = allowed > 0 and not (math.isfinite(metrics["loss"]) and math.isfinite(metrics["grad_norm"]))
        self._in_a_row += is_skipped
        if is_skipped and self._in_a_row <= allowed:
            if session.is_main:
                notice(f"{found}; skipped", step)
            return
        count = f" in {self._in_a_row} steps in a row, training.skip_nonfinite={allowed}" if is_skipped else ""
        raise NonFiniteLoss(f"step {step}: {found}{count}; {advice(session)}")


def non_finite_terms(metrics: dict[str, Any]) -> list[str]:
    """Returns `name=value` of every part of the loss, and of the gradient norm, that is NaN or infinite."""
    watched = [*(name for name in metrics if name.startswith("loss")), "moe_balance_loss", "grad_norm"]
    return [f"{name}={metrics[name]}" for name in watched if not math.isfinite(metrics.get(name, 0.0))]


def advice(session: Session) -> str:
    """Returns what a user can change in this workdir: anything before the first checkpoint, then by name."""
    steps = session.saved.steps()
    if not steps:
        return (
            "there is no checkpoint yet, so lower optimizer.learning_rate or raise optimizer.warmup_steps and run the "
            "command again"
        )
    earlier = f", from an earlier step with --resume_step={steps[-2]}" if len(steps) > 1 else ""
    return (
        f"continue from step {steps[-1]} with a lower --config.optimizer.learning_rate and "
        f"--change=optimizer.learning_rate{earlier}, or with a higher --config.training.skip_nonfinite"
    )
