"""DeepSeek-V3 and models of its architecture (Moonlight): latent attention, sigmoid router, MTP layers at the end.

Sources: transformers' deepseek_v3, the config.json files of the released models, DeepSeek's repository.
"""

from mtp_jax.interop.families import common

DEEPSEEK_V3 = common.Family(
    model_type="deepseek_v3",
    architecture="DeepseekV3ForCausalLM",
    accepts=("deepseek_v2",),
    block=common.LATENT_ATTENTION | common.DENSE,
    expert_block=common.LATENT_ATTENTION | common.EXPERTS | common.ROUTER_BIAS,
    repeated=common.REPEATED,
    ignored_layers=(61,),
    fields=common.BASIC | common.LATENT | {"rope_interleave": "rope.interleaved"},
    mixture=common.ROUTED | common.RENORMALIZE,
    defaults=common.SMALL_DEFAULTS
    | common.LATENT_SIZES
    | {
        "max_position_embeddings": 4096,
        "vocab_size": 129_280,
        "hidden_size": 7168,
        "intermediate_size": 18_432,
        "num_hidden_layers": 61,
        "num_attention_heads": 128,
        "rope_interleave": True,
        "moe_intermediate_size": 2048,
        "n_shared_experts": 1,
        "n_routed_experts": 256,
        "routed_scaling_factor": 2.5,
        "n_group": 8,
        "topk_group": 4,
        "num_experts_per_tok": 8,
        "first_k_dense_replace": 3,
        "norm_topk_prob": True,
    },
    fixed=common.NO_BIAS | common.SIGMOID | common.EVERY_LAYER,
    implied=common.LATENT_NORM | common.V3_ROUTER,
    derived=common.latent_sizes,
    no_experts=common.NO_EXPERTS | {"first_k_dense_replace": 0, "norm_topk_prob": True},
    always_depth=True,
)
