"""Qwen2 and Qwen2.5: biases on queries, keys and values.

Sources: transformers' qwen2 and the config.json files of the released models. Our MTP layers follow the last layer,
with DeepSeek's tensor names.
"""

from mtp_jax.interop.families import common

QWEN2 = common.Family(
    model_type="qwen2",
    architecture="Qwen2ForCausalLM",
    fields=common.BASIC | common.GROUPED,
    defaults=common.QWEN_DEFAULTS | common.WINDOW_DEFAULTS,
    fixed=common.SILU,
    tolerated=common.NOT_IN_CLASS | {"attention_bias": True},
    window="last",
    implied=common.NO_MIXTURE | {"qkv_bias": True, "qk_norm": False},
)
