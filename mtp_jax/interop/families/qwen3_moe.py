"""Qwen3 with experts: norms on queries and keys, softmax router, experts in every block, no shared experts.

Sources: transformers' qwen3_moe and the config.json files of the released models. Our MTP layers follow the last
layer, with DeepSeek's tensor names.
"""

from mtp_jax.interop.families import common

QWEN3_MOE = common.Family(
    model_type="qwen3_moe",
    architecture="Qwen3MoeForCausalLM",
    expert_block=common.GROUPED_ATTENTION | common.EXPERTS,
    fields=common.BASIC | common.GROUPED,
    mixture=common.RENORMALIZE
    | {
        "num_experts": "num_experts",
        "num_experts_per_tok": "num_experts_per_token",
        "moe_intermediate_size": "expert_dim",
    },
    defaults=common.QWEN_DEFAULTS
    | {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_hidden_layers": 24,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 768,
        "norm_topk_prob": False,
    },
    fixed=common.NO_BIAS | common.NO_WINDOW | {"decoder_sparse_step": 1, "mlp_only_layers": []},
    implied=common.HALVES
    | common.UNGROUPED
    | {
        "rotary_fraction": 1.0,
        "qkv_bias": False,
        "qk_norm": True,
        "router.score": "softmax",
        "num_shared_experts": 0,
        "num_dense_layers": 0,
    },
)
