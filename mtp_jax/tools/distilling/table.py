"""Measurement of drafts before and after distillation, per domain, and its table."""

import json
import math
from collections.abc import Mapping, Sequence

from etils import epath

from mtp_jax import storage
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.evaluation import speculative
from mtp_jax.language_model import LanguageModel
from mtp_jax.mtp import kind_of
from mtp_jax.tools.distilling.prompts import Domain
from mtp_jax.typing import JsonObject

Measured = dict[str, JsonObject]  # domain -> fields of SpeculativeResult


def measure(
    model: LanguageModel,
    domains: Sequence[Domain],
    num_speculative_tokens: int,
    batch_size: int,
    max_new_tokens: int,
    temperature: float,
) -> Measured | None:
    """Returns what drafts gain on the held-out prompts of each domain; None if the model cannot draft so many."""
    most = kind_of(model.config).max_drafts
    if most is not None and num_speculative_tokens > most:
        return None
    found = {}
    for domain in domains:
        result = speculative.measure(
            model.decoder,
            domain.held_out,
            num_speculative_tokens=num_speculative_tokens,
            batch_size=batch_size,
            max_new_tokens=max_new_tokens,
            sampler=make_sampler(temperature),
            seed=model.config.seed,
            stop_tokens=(*model.end_tokens, *domain.end_tokens),
        )
        found[domain.name] = speculative.as_json(result)
    return found


def text(measured: Mapping[str, Measured | None]) -> str:
    """Returns a table with a row per domain and model, of acceptance per draft, tokens per forward pass and speed-up.

    Args:
      measured: results by the name of the model, such as "before" and "after".
    """
    names = list(dict.fromkeys(name for each in measured.values() if each for name in each))
    rows = [("prompts", "drafts", "acceptance", "tokens/forward", "speed-up")]
    for name in names:
        for label, each in measured.items():
            rows.append((name, label, *(_values(each[name]) if each else ("-", "1.00", "1.00x"))))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1]), *(row[i].rjust(widths[i]) for i in (2, 3, 4))])
        for row in rows
    )


def write(file: epath.Path, values: JsonObject) -> None:
    """Writes results as JSON."""
    storage.write_text(file, json.dumps(values, indent=2) + "\n")


def _values(result: JsonObject) -> tuple[str, str, str]:
    rates = " ".join("-" if a is None or math.isnan(a) else f"{a:.0%}" for a in result["acceptance"])
    return rates, f"{result['tokens_per_forward']:.2f}", f"{result['speed_up']:.2f}x"
