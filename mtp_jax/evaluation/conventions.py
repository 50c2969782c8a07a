"""Comparison of MTP conventions by their loss on a text: every combination is tried, because released layouts differ.

A wrong concatenation order or a missing norm does not show in any shape; it shows as a loss near ln V.

Shape letters: B rows, N tokens, K depths.
"""

import dataclasses
import functools
import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import language_model, storage, targets
from mtp_jax.config import Architecture, MeshConfig, UserError, conventions
from mtp_jax.language_model import LanguageModel
from mtp_jax.losses import CrossEntropy, Term, depth_sums, evaluate
from mtp_jax.model import Tree, abstract_model
from mtp_jax.mtp import kind_of
from mtp_jax.training import workdir as workdirs

ROWS, LENGTH = 8, 256  # of the text

CHOICES = {
    "concat_order": ("embedding_first", "hidden_first"),
    "decoder_hidden": ("after_norm", "before_norm"),
    "output_norm": ("own", "main"),
    "recycled_hidden": ("before_norm", "after_norm"),
    "chain": ("previous", "decoder"),
}
TOO_CLOSE = 0.01  # nats per token; with norms near 1 some conventions compute almost the same
BEYOND_DEPTH_1 = ("recycled_hidden", "chain")  # at depth 1 no hidden state is passed on


@dataclass(frozen=True)
class Outcome:
    """Losses under one combination of conventions.

    choice: convention -> value, as in `CHOICES`. losses: nats per token of depths 0..D.
    """

    choice: dict[str, str]
    losses: tuple[float, ...]

    @property
    def mtp_loss(self) -> float:
        """Mean over the depths 1..D."""
        return float(np.mean(self.losses[1:]))


def compare(lm: LanguageModel, tokens_BN: np.ndarray) -> list[Outcome]:
    """Returns losses on `tokens_BN` under every combination of conventions, the configured one first.

    Raises:
      UserError: a model without sequential MTP modules.
    """
    config, kind = lm.config, kind_of(lm.config)
    if not kind.has_conventions:
        raise UserError("--check: the model has no MTP layers, so there are no conventions to compare")
    own = dataclasses.asdict(conventions(config.mtp))
    free = [name for name in CHOICES if kind.depth > 1 or name not in BEYOND_DEPTH_1]
    if own["output_norm"] == "main":  # there are no weights of other norms
        free.remove("output_norm")
    tried = [own | dict(zip(free, choice, strict=True)) for choice in itertools.product(*(CHOICES[n] for n in free))]
    tried.sort(key=lambda choice: choice != own)
    return [Outcome(choice, _losses(lm, choice, tokens_BN)) for choice in tried]


def _losses(lm: LanguageModel, choice: dict[str, str], tokens_BN: np.ndarray) -> tuple[float, ...]:
    changes: dict[str, Any] = dict(choice)
    architecture = dataclasses.replace(lm.config.architecture, mtp=dataclasses.replace(lm.config.mtp, **changes))
    params = lm.params
    if choice["output_norm"] == "main":
        module = {name: value for name, value in params["mtp"]["module"].items() if name != "output_norm"}
        params = {**params, "mtp": {"module": module}}
    with jax.set_mesh(lm.mesh):
        nll_K, num_K = jax.device_get(_sums(architecture, params, lm.biases, jnp.asarray(tokens_BN)))
    return tuple(float(x) for x in nll_K / num_K)


@functools.partial(jax.jit, static_argnums=0)
def _sums(architecture: Architecture, params: Tree, biases: Tree, tokens_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns (nll, positions), float32[K]."""
    model, depth = abstract_model(architecture).merge(params, biases), kind_of(architecture).depth
    ones_BN = jnp.ones_like(tokens_BN)
    positions_BN = jnp.broadcast_to(jnp.arange(tokens_BN.shape[1]), tokens_BN.shape)
    rows = targets.rows(tokens_BN, ones_BN, positions_BN, depth)
    scale_K = jnp.zeros(depth + 1)
    hidden_KBTD, head_DV = model(rows).hidden, model.head()
    term = Term(CrossEntropy(), hidden_KBTD, head_DV, rows.targets_KBT, rows.weight_KBT, scale_K, first_depth=0)
    sums = depth_sums([term], evaluate([term], chunk_tokens=1024)[1])
    return sums.nll, sums.num


def table(outcomes: list[Outcome]) -> str:
    """Returns the outcomes as text, the lowest MTP loss first, with a conclusion."""
    configured, best = outcomes[0], min(outcomes, key=lambda o: o.mtp_loss)
    names = [name for name in configured.choice if len({o.choice[name] for o in outcomes}) > 1]
    head = "".join(f"{name:<18}" for name in names) + f"{'MTP loss':>9}"
    rows = [
        "".join(f"{o.choice[name]:<18}" for name in names)
        + f"{o.mtp_loss:>9.3f}{'  <- configured' if o is configured else ''}"
        for o in sorted(outcomes, key=lambda o: o.mtp_loss)
    ]
    if not np.isfinite([o.mtp_loss for o in outcomes]).all():
        verdict = "warning: a loss is not finite, so the conventions cannot be compared"
    elif best is configured:
        verdict = f"the configured conventions have the lowest MTP loss (main model {configured.losses[0]:.3f})"
    elif configured.mtp_loss - best.mtp_loss < TOO_CLOSE:
        verdict = (
            f"the configured conventions are within {TOO_CLOSE} of the lowest MTP loss ({best.mtp_loss:.3f}); this "
            "text does not distinguish them"
        )
    else:
        other = ", ".join(f"mtp.{n}={best.choice[n]}" for n in names if best.choice[n] != configured.choice[n])
        verdict = (
            f"warning: the configured conventions have an MTP loss of {configured.mtp_loss:.3f}, {best.mtp_loss:.3f} "
            f"with {other}; the weights may follow those (set them in the config)"
        )
    return "\n".join([head, *rows, verdict])


def report(path: str, text_file: str) -> str:
    """Returns `table` for a workdir.

    Args:
      text_file: the text to read; empty: some of Python's own source.

    Raises:
      UserError: no such file, or a text or tokenizer that cannot be used.
    """
    # Weights sharded over all devices if possible; at least one row per device.
    fits = workdirs.read_config(path).model.embed_dim % jax.device_count() == 0 and jax.device_count() <= ROWS
    lm = language_model.load(path, mesh=MeshConfig(data=1, fsdp=-1) if fits else None)
    return table(compare(lm, _tokens(lm, text_file)))


def _tokens(lm: LanguageModel, text_file: str) -> np.ndarray:
    """Returns the beginning of the text as rows, int32[B, N]."""
    if text_file:
        try:
            text = storage.read_text(storage.path(text_file, "--check"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--check={text_file}: cannot be read ({error}); give a text file") from error
    else:
        import argparse

        text = inspect.getsource(argparse)
    if lm.tokenizer is None:
        raise UserError(f"--check: data.tokenizer={lm.config.data.tokenizer} does not exist, so no text can be read")
    ids = lm.tokenizer.encode(text[: ROWS * LENGTH * 16])
    vocab = lm.config.model.vocab_size or 0
    if ids.max(initial=0) >= vocab:
        raise UserError(
            f"--check: token {ids.max()} of the text is outside the vocabulary of {vocab}; "
            f"data.tokenizer={lm.config.data.tokenizer} is not this model's"
        )
    length = min(LENGTH, len(ids) // ROWS)
    if length < 8 * (1 + kind_of(lm.config).depth):
        raise UserError(f"--check={text_file}: has {len(ids)} tokens, too few to compare; give a longer text")
    return ids[: ROWS * length].reshape(ROWS, length)
