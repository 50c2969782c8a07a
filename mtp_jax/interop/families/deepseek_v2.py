"""DeepSeek-V2: latent attention, softmax router without correction bias. The released models have no MTP layers.

Sources: transformers' deepseek_v2 and the config.json files of the released models.
"""

from mtp_jax.interop.families import common

DEEPSEEK_V2 = common.Family(
    model_type="deepseek_v2",
    architecture="DeepseekV2ForCausalLM",
    block=common.LATENT_ATTENTION | common.DENSE,
    expert_block=common.LATENT_ATTENTION | common.EXPERTS,
    repeated=common.REPEATED,
    fields=common.BASIC | common.LATENT,
    mixture=common.ROUTED,
    defaults=common.SMALL_DEFAULTS
    | common.LATENT_SIZES
    | {
        "max_position_embeddings": 2048,
        "vocab_size": 102_400,
        "hidden_size": 4096,
        "intermediate_size": 11_008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "moe_intermediate_size": 1407,
        "n_shared_experts": 2,
        "n_routed_experts": 64,
        "routed_scaling_factor": 1.0,
        "n_group": None,
        "topk_group": None,
        "first_k_dense_replace": 0,
    },
    fixed=common.NO_BIAS | common.EVERY_LAYER | {"scoring_func": "softmax", "norm_topk_prob": False},
    tolerated={"mlp_bias": False, "rope_interleave": True},
    implied=common.LATENT_NORM
    | {
        "rope.interleaved": True,
        "router.score": "softmax",
        "router.group_score": "max",
        "router.renormalize": False,
    },
    derived=common.latent_sizes,
    no_experts=common.NO_EXPERTS | {"first_k_dense_replace": 0},
    groups_by_method=True,
    heads_divide=True,
)
