"""Attention variants by the value of `model.attention`."""

from mtp_jax.config import ModelConfig
from mtp_jax.layers.attention.base import Attention
from mtp_jax.layers.attention.gqa import GroupedQueryAttention
from mtp_jax.layers.attention.mla import MultiHeadLatentAttention

ATTENTIONS: dict[str, type[Attention]] = {"mla": MultiHeadLatentAttention, "gqa": GroupedQueryAttention}


def attention_of(config: ModelConfig) -> type[Attention]:
    """Returns the attention variant of a model."""
    return ATTENTIONS[config.attention]
