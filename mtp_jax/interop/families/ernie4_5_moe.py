"""ERNIE 4.5 with experts: interleaved rotary pairs, softmax router with a correction bias, shared experts.

Source: transformers' ernie4_5_moe. The MTP layer of the released models is a dense block without an output norm, in a
model whose other blocks have experts.
"""

from mtp_jax.interop.families import common

ERNIE4_5_MOE = common.Family(
    model_type="ernie4_5_moe",
    architecture="Ernie4_5_MoeForCausalLM",
    expert_block=common.GROUPED_ATTENTION
    | common.EXPERTS
    | {"ffn.router.bias": "mlp.moe_statics.e_score_correction_bias"},
    row_vectors=("ffn.router.bias",),
    left_out=("model.mtp_",),
    left_out_because="its MTP layer is a dense block without an output norm, which mtp_jax does not have",
    fields=common.BASIC | common.GROUPED,
    mixture={
        "moe_num_experts": "num_experts",
        "moe_layer_start_index": "num_dense_layers",
        "moe_k": "num_experts_per_token",
        "moe_num_shared_experts": "num_shared_experts",
        "moe_intermediate_size": "expert_dim",
    },
    defaults={
        "max_position_embeddings": 131_072,
        "vocab_size": 103_424,
        "hidden_size": 2560,
        "intermediate_size": 12_288,
        "num_hidden_layers": 28,
        "num_attention_heads": 20,
        "num_key_value_heads": 4,
        "head_dim": None,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
        "moe_num_experts": 64,
        "moe_layer_start_index": 1,
        "moe_k": 6,
        "moe_num_shared_experts": 2,
        "moe_intermediate_size": 1536,
    },
    fixed=common.SILU | {"use_bias": False, "moe_layer_interval": 1},
    tolerated={"moe_norm_min": 1e-12, "moe_use_aux_free": True, "moe_gate": "topk", "use_rmsnorm": True},
    derived=lambda model: common.layer_types(model) | {"moe_layer_end_index": model.num_layers - 1},
    unset={"moe_layer_end_index": -1},
    implied=common.UNGROUPED
    | {
        "attention": "gqa",
        "rope.interleaved": True,
        "rotary_fraction": 1.0,
        "qkv_bias": False,
        "qk_norm": False,
        "router.score": "softmax",
        "router.renormalize": True,
    },
)
