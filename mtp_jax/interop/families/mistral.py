"""Mistral 7B and models of its architecture, whose attention may have a sliding window in every layer.

Sources: transformers' mistral and the config.json files of the released models. Our MTP layers follow the last layer,
with DeepSeek's tensor names.
"""

from mtp_jax.interop.families import common

MISTRAL = common.Family(
    model_type="mistral",
    architecture="MistralForCausalLM",
    fields=common.BASIC | common.GROUPED,
    defaults=common.SMALL_DEFAULTS
    | {
        "max_position_embeddings": 131_072,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "sliding_window": 4096,
    },
    fixed=common.SILU,
    tolerated={"attention_bias": False, "mlp_bias": False},
    window="every",
    implied=common.NO_MIXTURE | {"qkv_bias": False, "qk_norm": False},
)
