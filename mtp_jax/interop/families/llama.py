"""Llama 2 and 3 and models of their architecture.

Sources: transformers' llama and the config.json files of the released models. Our MTP layers follow the last layer,
with DeepSeek's tensor names.
"""

from mtp_jax.interop.families import common

LLAMA = common.Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    fields=common.BASIC | common.GROUPED,
    defaults=common.SMALL_DEFAULTS
    | {
        "max_position_embeddings": 2048,
        "vocab_size": 32_000,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "head_dim": None,
    },
    fixed=common.NO_BIAS | {"mlp_bias": False},
    implied=common.NO_MIXTURE | {"qkv_bias": False, "qk_norm": False},
    heads_divide=True,
)
