"""Trained models for generation, scoring and evaluation: `mtp_jax.load(path)`."""

from mtp_jax.language_model.loading import load
from mtp_jax.language_model.model import Completions, LanguageModel
