"""MiMo-7B: Qwen2's blocks; MTP modules in a separate list, whose projection takes the hidden state first.

Sources: the modelling code and config.json of the released model.
"""

from mtp_jax.interop.families import common

MIMO = common.Family(
    model_type="mimo",
    architecture="MiMoForCausalLM",
    conventions="mimo",
    module={
        "embed_norm.scale": "token_layernorm.weight",
        "hidden_norm.scale": "hidden_layernorm.weight",
        "projection": "input_proj.weight",
        "output_norm.scale": "final_layernorm.weight",
    },
    module_layer="model.mtp_layers.{depth}.",
    fields=common.BASIC | common.GROUPED,
    defaults=common.QWEN_DEFAULTS,
    fixed=common.SILU | common.NO_WINDOW | {"attention_bias": True},
    tolerated=common.NOT_IN_CLASS,
    implied=common.NO_MIXTURE | {"qkv_bias": True, "qk_norm": False},
    always_depth=True,
)
