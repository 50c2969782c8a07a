"""Training, evaluation and decoding of multi-token prediction models in JAX.

mtp_jax.load(path)                                   a trained model, or a Hugging Face folder
mtp_jax.config.load_config(path, overrides)          a config file as frozen dataclasses
mtp_jax.targets.rows(...)                            rows of tokens as inputs, targets and weights of every depth
mtp_jax.mtp.kind_of(config)                          the MTP kind of a config; mtp_jax.mtp.KINDS lists all kinds
mtp_jax.losses.evaluate(terms)                       the loss of all terms, chunk by chunk
mtp_jax.model                                        decoder and MTP kind as one module
mtp_jax.training.loop.train(config, workdir)         the training loop, called by train.py
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = (
    "config",
    "data",
    "decoding",
    "evaluation",
    "interop",
    "language_model",
    "losses",
    "model",
    "mtp",
    "sharding",
    "targets",
    "training",
)


def __getattr__(name: str) -> Any:
    """Imports submodules on first use: `import mtp_jax` alone imports neither jax nor any submodule."""
    if name == "load":
        return importlib.import_module("mtp_jax.language_model").load
    if name in _MODULES:
        return importlib.import_module(f"mtp_jax.{name}")
    raise AttributeError(f"module 'mtp_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES, "load"])
