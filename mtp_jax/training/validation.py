"""Validation of each depth on held-out documents: loss, bits per byte, accuracy, agreement, expected tokens."""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.data.corpus import HELD_OUT
from mtp_jax.losses import expected_tokens_per_pass
from mtp_jax.model import Tree
from mtp_jax.training.run import Run, global_batches


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


def validate(run: Run, state: Tree, num_batches: int) -> dict[str, list[DepthResult]]:
    """Evaluates depths 0..D on the first `num_batches` batches of each validation set, or all if there are fewer.

    Every process must call it, under `jax.set_mesh(run.mesh)`.

    Args:
      run: data, mesh and jitted functions.
      state: "params" and "biases" of the weights; not changed and not donated.
      num_batches: at least 1.

    Returns:
      The results of each of `Corpus.validation_sets`, by name.
    """
    return {name: _validate(run, state, num_batches, name) for name in run.corpus.validation_sets}


def _validate(run: Run, state: Tree, num_batches: int, name: str) -> list[DepthResult]:
    token_bytes = np.zeros(run.config.model.vocab_size or 0, np.int32)
    known = run.corpus.tokenizer.token_bytes
    token_bytes[: len(known)] = known
    totals: dict[str, np.ndarray] = {}
    for batch in itertools.islice(global_batches(run, name), num_batches):
        sums = jax.device_get(run.trainer.evaluate(state, batch, jnp.asarray(token_bytes)))
        totals = {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in sums.items()}
    return results_of(totals)


def results_of(totals: dict[str, np.ndarray]) -> list[DepthResult]:
    """Returns the results from sums over batches, float[1 + D] each: `losses.DepthSums` and target "bytes"."""
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


def as_metrics(results: list[DepthResult], name: str = HELD_OUT) -> dict[str, float | None]:
    """Returns the results of a validation set as metrics; None for a depth without targets.

    Names begin with validation_<name>_ for a set that has a name of its own:

    validation_loss_main and validation_loss_mtp_k: nats per token over the depth's own positions.
    validation_bits_per_byte: of the main model. validation_agreement_mtp_k: with the main head's prediction.
    validation_tokens_per_forward: expected tokens per forward pass if drafts of all depths are accepted as often as
    they agree; 1 without extra depths.
    """
    prefix = "validation" if name == HELD_OUT else f"validation_{name}"
    values = {f"{prefix}_loss_{'main' if r.depth == 0 else f'mtp_{r.depth}'}": r.loss for r in results}
    values[f"{prefix}_bits_per_byte"] = results[0].bits_per_byte
    values |= {f"{prefix}_agreement_mtp_{r.depth}": r.agreement for r in results[1:]}
    values[f"{prefix}_tokens_per_forward"] = results[-1].expected_tokens
    return {name: None if math.isnan(value) else value for name, value in values.items()}
