"""GLM-4.5: grouped-query attention, half of each head rotated, sigmoid router, MTP layers after the last layer.

Sources: transformers' glm4_moe and the config.json files of the released models.
"""

from mtp_jax.interop.families import common

GLM4_MOE = common.Family(
    model_type="glm4_moe",
    architecture="Glm4MoeForCausalLM",
    conventions="glm4_moe",
    expert_block=common.GROUPED_ATTENTION | common.EXPERTS | common.ROUTER_BIAS,
    repeated=common.REPEATED,
    ignored_layers=(46, 92),
    fields=common.BASIC | common.GROUPED | {"attention_bias": "qkv_bias", "use_qk_norm": "qk_norm"},
    mixture=common.ROUTED | common.RENORMALIZE,
    defaults={
        "max_position_embeddings": 131_072,
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "num_hidden_layers": 46,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "use_qk_norm": False,
        "moe_intermediate_size": 1408,
        "num_experts_per_tok": 8,
        "n_shared_experts": 1,
        "n_routed_experts": 128,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "norm_topk_prob": True,
    },
    fixed=common.SILU,
    tolerated=common.SIGMOID | common.EVERY_LAYER,
    implied=common.HALVES | common.V3_ROUTER,
    no_experts=common.NO_EXPERTS | {"first_k_dense_replace": 0, "norm_topk_prob": True},
    rotary_fraction=0.5,
    always_depth=True,
)
