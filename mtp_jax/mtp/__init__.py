"""Multi-token prediction strategies: one interface, hidden states in and hidden states out."""

from typing import Any

from flax import nnx

from mtp_jax.config import Config
from mtp_jax.mtp.parallel import ParallelHeads
from mtp_jax.mtp.sequential import SequentialModules
from mtp_jax.mtp.strategy import Extra, MainModel, NoMTP

STRATEGIES: dict[str, Any] = {"none": NoMTP, "parallel": ParallelHeads, "sequential": SequentialModules}


def make_strategy(config: Config, rngs: nnx.Rngs) -> Any:
    """The strategy of mtp.kind."""
    return STRATEGIES[config.mtp.kind](config, rngs)


__all__ = ["Extra", "MainModel", "NoMTP", "ParallelHeads", "SequentialModules", "make_strategy"]
