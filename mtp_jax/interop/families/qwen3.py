"""Qwen3, dense: norms on queries and keys.

Sources: transformers' qwen3 and the config.json files of the released models. Our MTP layers follow the last layer,
with DeepSeek's tensor names.
"""

from mtp_jax.interop.families import common

QWEN3 = common.Family(
    model_type="qwen3",
    architecture="Qwen3ForCausalLM",
    fields=common.BASIC | common.GROUPED,
    defaults=common.QWEN_DEFAULTS | common.WINDOW_DEFAULTS | {"head_dim": 128},
    fixed=common.NO_BIAS,
    tolerated=common.NOT_IN_CLASS,
    window="last",
    implied=common.NO_MIXTURE | {"qkv_bias": False, "qk_norm": True},
)
