"""Train, measure and decode multi-token prediction models in JAX."""

__version__ = "0.1.0"
