"""Config of the training of MTP modules with the decoder frozen (FastMTP, 2509.18362; Bebop, 2606.12370)."""

import math
from dataclasses import dataclass
from typing import Any

from mtp_jax.config import Config, MeshConfig, UserError, with_values
from mtp_jax.mtp import KINDS, RELEASED, kind_of

LONGEST_ROW = 4096  # tokens per row if the model's context is longer
MOST_ROWS = 64  # per step, as in FastMTP
FINE_TUNE_RATE, NEW_RATE = 5e-5, 5e-4  # of modules that were trained before (FastMTP), and of new ones


@dataclass(frozen=True)
class Recipe:
    """Settings of the command.

    Attributes:
      kind: MTP kind; empty: that of the model, or sequential modules if it cannot draft.
      num_speculative_tokens: K, drafts that the modules are trained for.
      loss: a value of `mtp.loss`.
      depth_decay: beta; draft k has the weight beta^(k-1).
      epochs: passes over the answers.
    """

    kind: str
    num_speculative_tokens: int
    loss: str
    depth_decay: float
    epochs: float


def mtp_changes(recipe: Recipe, source: Config) -> tuple[dict[str, Any], bool]:
    """Returns the changes to the config of the model, and whether its own modules are trained further.

    Sequential modules become one module for all drafts where there is one, else they stay as they are. Parallel heads
    stay as they are. A model of another kind gets new modules.

    Raises:
      UserError: a kind that cannot draft, or more drafts than parallel heads.
    """
    own, drafts = kind_of(source), recipe.num_speculative_tokens
    name = recipe.kind or (own.name if own.max_drafts != 0 else RELEASED)
    if kind_of(with_values(source, {"mtp.kind": name})).max_drafts == 0:
        raise UserError(f"--kind={name}: drafts nothing; use sequential or parallel")
    changes: dict[str, Any] = {"mtp.kind": name, "mtp.freeze_decoder": True, "mtp.detach_decoder": True}
    changes |= {"mtp.loss": recipe.loss, "mtp.depth_decay": recipe.depth_decay, "mtp.weight": 1.0}
    changes |= {"mtp.weight_values": (), "mtp.weight_boundaries": (), "mtp.curriculum": "none"}
    if name != own.name:
        changes |= {"model.num_layers": own.num_main_layers, "mtp.parameter_matched": False, "mtp.depth": drafts}
        # Of the kinds, only the modules with conventions can be shared by all drafts.
        return changes | {"mtp.shared_depths": KINDS[name].has_conventions}, False
    most = own.max_drafts
    if most is not None and drafts > most:
        raise UserError(
            f"--num_speculative_tokens={drafts}: the model has {most} {name} heads, which draft one token each; use at "
            f"most {most}, or --kind=sequential"
        )
    is_one_module = most is None and (own.depth == 1 or source.mtp.shared_depths)
    return changes | (
        {"mtp.depth": drafts, "mtp.shared_depths": KINDS[name].has_conventions} if is_one_module else {}
    ), True


def training_config(
    recipe: Recipe, source: Config, model: str, files: str, num_tokens: int, num_devices: int
) -> Config:
    """Returns the config of the run that trains the modules.

    Args:
      recipe: settings of the command.
      source: config of the model.
      model: its path.
      files: pattern of the files of answers.
      num_tokens: number of tokens in them.
      num_devices: number of devices, over which the rows of a step are divided.
    """
    changes, is_trained = mtp_changes(recipe, source)
    length = min(source.data.sequence_length, LONGEST_ROW)
    rows = max(1, num_tokens // length)
    batch_size = -(-min(MOST_ROWS, max(1, rows // 32)) // num_devices) * num_devices
    num_steps = max(1, math.ceil(recipe.epochs * num_tokens / (batch_size * length)))
    fresh = Config(model=source.model, mtp=source.mtp, mesh=MeshConfig(data=-1), seed=source.seed, init_from=str(model))
    return with_values(
        fresh,
        {
            "data.source": "text_files",
            "data.files": files,
            "data.records": "tokens",
            "data.weights_field": "weights",
            "data.tokenizer": source.data.tokenizer,
            "data.chat_template": source.data.chat_template,
            "data.validation_fraction": 0.0,  # the held-out prompts show what is learnt
            "data.sequence_length": length,
            "data.batch_size": batch_size,
            "optimizer.learning_rate": FINE_TUNE_RATE if is_trained else NEW_RATE,
            "optimizer.warmup_steps": max(1, num_steps // 20),
            "optimizer.weight_decay": 0.0,
            "training.num_steps": num_steps,
            "training.log_every": max(1, num_steps // 20),
            "training.sample_tokens": 0,
            "checkpoint.every": max(1, num_steps // 4),
            "checkpoint.keep": 1,
            "model.param_dtype": "float32",  # small updates would be lost in bfloat16
            **changes,
        },
    )


def trained_share(config: Config) -> str:
    """Returns a line on the weights that are trained, and the memory that frozen ones save."""
    from mtp_jax.model import count_parameters

    counts = count_parameters(config.architecture)
    moments = 2 * (4 if config.optimizer.stored_dtype == "float32" else 2)
    total = counts.total + counts.mtp_total
    return (
        f"trains {counts.mtp_total / 1e6:,.2f} M of {total / 1e6:,.2f} M parameters; optimizer state "
        f"{counts.mtp_total * moments / 1e6:,.1f} MB, {total * moments / 1e6:,.1f} MB if all were trained"
    )
