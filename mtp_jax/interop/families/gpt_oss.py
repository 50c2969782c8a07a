"""gpt-oss: windows in every other layer, attention sinks, biases, experts with a clamped gate in stacked tensors.

Sources: transformers' gpt_oss and the config.json files of the released models, whose experts are in mxfp4 (they are
dequantized on reading and written unquantized). Our MTP layers follow the last layer, with DeepSeek's tensor names.
"""

from mtp_jax.interop.families import common

_ATTENTION = common.GROUPED_ATTENTION | {
    "attention.o_bias": "self_attn.o_proj.bias",
    "attention.sinks": "self_attn.sinks",
}

GPT_OSS = common.Family(
    model_type="gpt_oss",
    architecture="GptOssForCausalLM",
    block=_ATTENTION | common.DENSE,
    expert_block=_ATTENTION
    | {
        "ffn.router.weight": "mlp.router.weight",
        "ffn.router.logit_bias": "mlp.router.bias",
        "ffn.gate": "mlp.experts.gate_up_proj",
        "ffn.up": "mlp.experts.gate_up_proj",
        "ffn.gate_bias": "mlp.experts.gate_up_proj_bias",
        "ffn.up_bias": "mlp.experts.gate_up_proj_bias",
        "ffn.down": "mlp.experts.down_proj",
        "ffn.down_bias": "mlp.experts.down_proj_bias",
    },
    stacked={
        **{"ffn.gate": (0, 2), "ffn.up": (1, 2), "ffn.down": (0, 1)},
        **{"ffn.gate_bias": (0, 2), "ffn.up_bias": (1, 2), "ffn.down_bias": (0, 1)},
    },
    fields={theirs: ours for theirs, ours in common.BASIC.items() if ours != "ffn_dim"}
    | common.GROUPED
    | {"attention_bias": "qkv_bias", "swiglu_alpha": "gated_unit.alpha", "swiglu_limit": "gated_unit.limit"},
    mixture={
        "num_local_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "intermediate_size": "expert_dim",
    },
    defaults={
        "max_position_embeddings": 131_072,
        "vocab_size": 201_088,
        "hidden_size": 2880,
        "num_hidden_layers": 36,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "sliding_window": 128,
        "swiglu_alpha": 1.702,
        "swiglu_limit": 7.0,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "intermediate_size": 2880,
        "rope_theta": 150_000.0,
        "rope_parameters": {
            **{"rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False},
            "original_max_position_embeddings": 4096,
        },
    },
    fixed=common.SILU,
    window="typed",
    default_pattern="LG",
    derived=lambda model: (
        common.layer_types(model)
        | {
            "experts_per_token": model.num_experts_per_token,
            "initial_context_length": model.rope.yarn.original_length,
        }
    ),
    implied=common.HALVES
    | common.UNGROUPED
    | {
        "rotary_fraction": 1.0,
        "qk_norm": False,
        "output_bias": lambda model: model.qkv_bias,
        "sinks": True,
        "local.sinks": True,
        "gated_unit.offset": 1.0,
        "expert_bias": True,
        "router.score": "softmax",
        "router.renormalize": True,
        "router.logit_bias": True,
        "num_shared_experts": 0,
        "num_dense_layers": 0,
    },
)
