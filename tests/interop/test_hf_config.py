"""config.json <-> Config: values of released files, what is refused, and that nothing changes on the way back."""

import copy
import dataclasses
import importlib
import json
import os
import pathlib
import typing

import pytest

from mtp_jax.config import (
    Config,
    ModelConfig,
    MTPConfig,
    UserError,
    conventions,
    key_hints,
    load_config,
    validate,
    value_of,
    walk,
    with_values,
)
from mtp_jax.interop import config_json, layouts, windows
from mtp_jax.interop.config_json import from_config, read_config, to_config
from mtp_jax.interop.families import FAMILIES as MODEL_TYPES
from mtp_jax.interop.families import common
from mtp_jax.interop.families.common import IGNORED, WINDOW_KEYS
from mtp_jax.interop.layouts import layout_of
from mtp_jax.layers import rope
from mtp_jax.model import validate as validate_model
from mtp_jax.mtp import kind_of

V3 = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
  "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
  "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
  "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
  "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
  "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0",
    "weight_block_size": [128, 128]},
  "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0,
    "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
  "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
  "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}""")

V2_LITE = json.loads("""{
  "architectures": ["DeepseekV2ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001, "bos_token_id": 100000, "eos_token_id": 100001, "first_k_dense_replace": 1,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 10944,
  "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v2", "moe_intermediate_size": 1408,
  "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": false,
  "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
  "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "rms_norm_eps": 1e-06,
  "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707,
    "original_max_position_embeddings": 4096, "type": "yarn"},
  "rope_theta": 10000, "routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": true,
  "tie_word_embeddings": false, "topk_group": 1, "topk_method": "greedy", "torch_dtype": "bfloat16",
  "transformers_version": "4.33.1", "use_cache": true, "v_head_dim": 128, "vocab_size": 102400}""")

V2 = V2_LITE | {
    **{"hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "n_group": 8, "topk_group": 3},
    **{"n_routed_experts": 160, "num_attention_heads": 128, "num_key_value_heads": 128, "num_hidden_layers": 60},
    **{"q_lora_rank": 1536, "routed_scaling_factor": 16.0, "topk_method": "group_limited_greedy"},
}

MOONLIGHT = json.loads("""{
  "architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
  "aux_loss_alpha": 0.001, "bos_token_id": 163584, "eos_token_id": 163585, "ep_size": 1, "first_k_dense_replace": 1,
  "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02, "intermediate_size": 11264,
  "kv_lora_rank": 512, "max_position_embeddings": 8192, "model_type": "deepseek_v3", "moe_intermediate_size": 1408,
  "moe_layer_freq": 1, "n_group": 1, "n_routed_experts": 64, "n_shared_experts": 2, "norm_topk_prob": true,
  "num_attention_heads": 16, "num_experts_per_tok": 6, "num_hidden_layers": 27, "num_key_value_heads": 16,
  "num_nextn_predict_layers": 0, "pretraining_tp": 1, "q_lora_rank": null, "qk_nope_head_dim": 128,
  "qk_rope_head_dim": 64, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 50000.0,
  "routed_scaling_factor": 2.446, "scoring_func": "sigmoid", "seq_aux": true, "tie_word_embeddings": false,
  "topk_group": 1, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": true, "v_head_dim": 128,
  "vocab_size": 163840}""")

KIMI = V3 | {
    **{"auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "first_k_dense_replace": 1},
    **{"max_position_embeddings": 131072, "model_type": "kimi_k2", "n_group": 1, "n_routed_experts": 384},
    **{"num_attention_heads": 64, "num_key_value_heads": 64, "num_nextn_predict_layers": 0, "rope_theta": 50000.0},
    "rope_scaling": V3["rope_scaling"] | {"beta_fast": 1.0, "beta_slow": 1.0, "factor": 32.0},
    **{"routed_scaling_factor": 2.827, "topk_group": 1, "vocab_size": 163840},
}

GLM_AIR = json.loads("""{
  "architectures": ["Glm4MoeForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "eos_token_id": [151329, 151336, 151338], "first_k_dense_replace": 1, "head_dim": 128, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 10944, "max_position_embeddings": 131072,
  "model_type": "glm4_moe", "moe_intermediate_size": 1408, "n_group": 1, "n_routed_experts": 128,
  "n_shared_experts": 1, "norm_topk_prob": true, "num_attention_heads": 96, "num_experts_per_tok": 8,
  "num_hidden_layers": 46, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "pad_token_id": 151329,
  "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 1000000,
  "routed_scaling_factor": 1.0, "tie_word_embeddings": false, "topk_group": 1, "torch_dtype": "bfloat16",
  "transformers_version": "4.54.0", "use_cache": true, "use_qk_norm": false, "vocab_size": 151552}""")

MIMO = json.loads("""{
  "architectures": ["MiMoForCausalLM"], "attention_bias": true, "attention_dropout": 0.0,
  "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}, "bos_token_id": 151643, "eos_token_id": 151645,
  "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008,
  "max_position_embeddings": 32768, "max_window_layers": 36, "model_type": "mimo", "num_attention_heads": 32,
  "num_hidden_layers": 36, "num_key_value_heads": 8, "num_nextn_predict_layers": 1, "rms_norm_eps": 1e-05,
  "rope_scaling": null, "rope_theta": 640000, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "use_cache": true, "use_mrope": false, "use_sliding_window": false,
  "vocab_size": 151680}""")

LLAMA = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 128000,
  "eos_token_id": 128001, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
  "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": false, "model_type": "llama",
  "num_attention_heads": 32, "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1,
  "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3"},
  "rope_theta": 500000.0, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.45.0",
  "use_cache": true, "vocab_size": 128256}""")

MISTRAL = json.loads("""{
  "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2,
  "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
  "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0, "sliding_window": null,
  "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.42.0", "use_cache": true,
  "vocab_size": 32768}""")

MINISTRAL = MISTRAL | {
    **{"architectures": ["MinistralForCausalLM"], "model_type": "ministral", "sliding_window": 4096},
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 8,
}

QWEN2 = json.loads("""{
  "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643, "eos_token_id": 151643,
  "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02, "intermediate_size": 4864,
  "max_position_embeddings": 32768, "max_window_layers": 24, "model_type": "qwen2", "num_attention_heads": 14,
  "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
  "sliding_window": 32768, "tie_word_embeddings": true, "torch_dtype": "bfloat16", "transformers_version": "4.40.1",
  "use_cache": true, "use_mrope": false, "use_sliding_window": false, "vocab_size": 151936}""")

# Qwen2-7B's switch, turned on: the layers from max_window_layers on have the window.
QWEN2_WINDOW = QWEN2 | {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 21}

QWEN3 = json.loads("""{
  "architectures": ["Qwen3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 1024, "initializer_range": 0.02,
  "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
  "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
  "rope_scaling": null, "rope_theta": 1000000, "sliding_window": null, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}""")

QWEN3_MOE = json.loads("""{
  "architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "attention_dropout": 0.0, "bos_token_id": 151643,
  "decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048,
  "initializer_range": 0.02, "intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
  "mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": true,
  "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48,
  "num_key_value_heads": 4, "output_router_logits": false, "rms_norm_eps": 1e-06, "rope_scaling": null,
  "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": null, "tie_word_embeddings": false,
  "torch_dtype": "bfloat16", "transformers_version": "4.51.0", "use_cache": true, "use_sliding_window": false,
  "vocab_size": 151936}""")

ERNIE = json.loads("""{
  "architectures": ["Ernie4_5_MoeForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
  "hidden_size": 2560, "intermediate_size": 12288, "max_position_embeddings": 131072, "model_type": "ernie4_5_moe",
  "moe_capacity": [64, 64, 64], "moe_gate": "topk", "moe_intermediate_size": 1536, "moe_k": 6, "moe_layer_interval": 1,
  "moe_layer_start_index": 1, "moe_num_experts": 64, "moe_num_shared_experts": 2, "moe_use_aux_free": true,
  "num_attention_heads": 20, "num_hidden_layers": 28, "num_key_value_heads": 4, "num_nextn_predict_layers": 1,
  "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_scaling": null, "rope_theta": 500000, "tie_word_embeddings": true,
  "torch_dtype": "bfloat16", "use_bias": false, "use_cache": true, "use_rmsnorm": true, "vocab_size": 103424}""")

CODER = json.loads("""{
  "architectures": ["LlamaForCausalLM"], "bos_token_id": 32013, "eos_token_id": 32014, "hidden_act": "silu",
  "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 16384,
  "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32,
  "pretraining_tp": 1, "rms_norm_eps": 1e-06, "rope_scaling": {"factor": 4.0, "type": "linear"},
  "rope_theta": 100000, "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
  "use_cache": true, "vocab_size": 32256}""")

GPT_OSS = json.loads("""{
  "architectures": ["GptOssForCausalLM"], "attention_bias": true, "attention_dropout": 0.0, "eos_token_id": 200002,
  "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
  "initializer_range": 0.02, "intermediate_size": 2880, "max_position_embeddings": 131072, "model_type": "gpt_oss",
  "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 24, "num_key_value_heads": 8,
  "num_local_experts": 32, "output_router_logits": false, "pad_token_id": 199999,
  "quantization_config": {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router",
    "model.embed_tokens", "lm_head"], "quant_method": "mxfp4"},
  "rms_norm_eps": 1e-05, "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0,
    "original_max_position_embeddings": 4096, "rope_type": "yarn", "truncate": false},
  "rope_theta": 150000, "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0,
  "tie_word_embeddings": false, "transformers_version": "4.55.0", "use_cache": true, "vocab_size": 201088}""")
GPT_OSS["layer_types"] = ["sliding_attention", "full_attention"] * 12

FLASH = json.loads("""{
  "add_full_attention_sink_bias": false, "add_swa_attention_sink_bias": true,
  "architectures": ["MiMoV2FlashForCausalLM"], "attention_bias": false, "attention_chunk_size": 128,
  "attention_dropout": 0.0, "attention_value_scale": 0.707, "head_dim": 192, "hidden_act": "silu", "hidden_size": 4096,
  "initializer_range": 0.02, "intermediate_size": 16384, "layernorm_epsilon": 1e-05,
  "max_position_embeddings": 262144, "model_type": "mimo_v2_flash", "moe_intermediate_size": 2048, "n_group": 1,
  "n_routed_experts": 256, "n_shared_experts": null, "norm_topk_prob": true, "num_attention_heads": 64,
  "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_key_value_heads": 4, "partial_rotary_factor": 0.334,
  "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
    "weight_block_size": [128, 128]},
  "rope_theta": 5000000, "routed_scaling_factor": null, "scoring_func": "sigmoid", "sliding_window": 128,
  "sliding_window_size": 128, "swa_head_dim": 192, "swa_num_attention_heads": 64, "swa_num_key_value_heads": 8,
  "swa_rope_theta": 10000, "swa_v_head_dim": 128, "tie_word_embeddings": false, "topk_group": 1,
  "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "use_cache": true, "v_head_dim": 128, "vocab_size": 152576}""")
FLASH |= {
    "hybrid_layer_pattern": [0, *[int((i + 1) % 6 > 0) for i in range(1, 48)]],
    "moe_layer_freq": [0, *[1] * 47],
    "num_nextn_predict_layers": 3,
}

FILES = {
    **{"v3": V3, "v2_lite": V2_LITE, "v2": V2, "moonlight": MOONLIGHT, "kimi": KIMI, "glm_air": GLM_AIR, "mimo": MIMO},
    **{
        "llama": LLAMA,
        "mistral": MISTRAL,
        "ministral": MINISTRAL,
        "qwen2": QWEN2,
        "qwen3": QWEN3,
        "qwen3_moe": QWEN3_MOE,
        "ernie": ERNIE,
        "coder": CODER,
        "gpt_oss": GPT_OSS,
        "flash": FLASH,
    },
}

# Written by hand from the models' papers and cards.
LATENT = {"attention": "mla", "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
YARN = {
    "rope.yarn.factor": 40.0,
    "rope.yarn.original_length": 4096,
    "rope.yarn.beta_fast": 32.0,
    "rope.yarn.beta_slow": 1.0,
}
EXPECTED = {
    "v3": LATENT
    | YARN
    | {
        "num_layers": 61,
        "embed_dim": 7168,
        "num_heads": 128,
        "q_lora_rank": 1536,
        "ffn_dim": 18_432,
        "expert_dim": 2048,
    }
    | {"num_experts": 256, "num_experts_per_token": 8, "num_shared_experts": 1, "num_dense_layers": 3}
    | {"router.num_groups": 8, "router.groups_per_token": 4, "routed_scaling_factor": 2.5, "router.score": "sigmoid"}
    | {"router.group_score": "top2_sum", "router.renormalize": True, "rope.interleaved": True, "vocab_size": 129_280}
    | {"rope.yarn.mscale": 1.0, "rope.yarn.mscale_all_dim": 1.0, "norm_eps": 1e-6, "latent_norm_eps": 1e-6},
    "v2_lite": LATENT
    | YARN
    | {"q_lora_rank": 0, "router.score": "softmax", "router.renormalize": False, "num_shared_experts": 2}
    | {
        "rope.yarn.mscale": 0.707,
        "rope.yarn.mscale_all_dim": 0.707,
        "num_experts_per_token": 6,
        "router.num_groups": 1,
    },
    "v2": {"router.group_score": "max", "router.num_groups": 8, "router.groups_per_token": 3, "q_lora_rank": 1536}
    | {"routed_scaling_factor": 16.0, "num_experts": 160},
    "moonlight": LATENT
    | {"q_lora_rank": 0, "norm_eps": 1e-5, "latent_norm_eps": 1e-6, "rope.theta": 50_000.0, "rope.yarn.factor": 1.0}
    | {"routed_scaling_factor": 2.446, "num_layers": 27, "router.score": "sigmoid"},
    "kimi": LATENT
    | {"num_heads": 64, "num_experts": 384, "router.num_groups": 1, "routed_scaling_factor": 2.827}
    | {"rope.yarn.factor": 32.0, "rope.yarn.beta_fast": 1.0, "rope.theta": 50_000.0, "num_dense_layers": 1},
    "glm_air": {"attention": "gqa", "qkv_bias": True, "qk_norm": False, "rotary_fraction": 0.5, "head_dim": 128}
    | {"rope.interleaved": False, "rope.theta": 1e6, "num_kv_heads": 8, "num_experts": 128, "router.score": "sigmoid"}
    | {"norm_eps": 1e-5, "num_dense_layers": 1, "expert_dim": 1408, "ffn_dim": 10_944},
    "mimo": {"attention": "gqa", "qkv_bias": True, "qk_norm": False, "num_experts": 0, "rope.theta": 640_000.0}
    | {"num_layers": 36, "norm_eps": 1e-5, "rope.interleaved": False, "vocab_size": 151_680},
    "llama": {
        "attention": "gqa",
        "rope.llama3.factor": 32.0,
        "rope.llama3.original_length": 8192,
        "tie_embeddings": True,
    }
    | {"rope.llama3.low_frequency": 1.0, "rope.llama3.high_frequency": 4.0, "rope.theta": 500_000.0, "head_dim": 64}
    | {"qkv_bias": False, "qk_norm": False, "rope.interleaved": False, "rotary_fraction": 1.0, "num_kv_heads": 8},
    "mistral": {"num_kv_heads": 8, "head_dim": 128, "ffn_dim": 14_336, "rope.theta": 1e6, "norm_eps": 1e-5}
    | {"qkv_bias": False, "qk_norm": False, "rope.interleaved": False, "num_experts": 0},
    "ministral": {"local.window": 4096, "local.pattern": "LLLG", "qkv_bias": False, "num_kv_heads": 8, "head_dim": 128},
    "qwen2": {"qkv_bias": True, "head_dim": 64, "num_kv_heads": 2, "tie_embeddings": True, "num_experts": 0},
    "qwen3": {"qk_norm": True, "qkv_bias": False, "head_dim": 128, "embed_dim": 1024, "num_heads": 16},
    "qwen3_moe": {"qk_norm": True, "qkv_bias": False, "num_experts": 128, "num_experts_per_token": 8, "expert_dim": 768}
    | {"router.score": "softmax", "router.renormalize": True, "num_shared_experts": 0, "num_dense_layers": 0}
    | {"num_kv_heads": 4, "head_dim": 128, "router.num_groups": 1, "rope.interleaved": False},
    "ernie": {"num_experts": 64, "num_experts_per_token": 6, "num_shared_experts": 2, "num_dense_layers": 1}
    | {"expert_dim": 1536, "ffn_dim": 12_288, "rope.interleaved": True, "rope.theta": 500_000.0, "head_dim": 128}
    | {"router.score": "softmax", "router.renormalize": True, "qk_norm": False, "tie_embeddings": True},
    "gpt_oss": {"local.window": 128, "local.pattern": "LG", "local.sinks": True, "sinks": True, "output_bias": True}
    | {"gated_unit.alpha": 1.702, "gated_unit.offset": 1.0, "gated_unit.limit": 7.0, "expert_bias": True}
    | {"router.score": "softmax", "router.renormalize": True, "router.logit_bias": True, "num_experts": 32}
    | {"rope.yarn.truncate": False, "rope.yarn.factor": 32.0, "rope.theta": 150_000.0, "qkv_bias": True}
    | {"expert_dim": 2880, "num_experts_per_token": 4, "num_shared_experts": 0, "num_dense_layers": 0},
    "flash": {"local.window": 129, "local.pattern": "GLLLL" + 7 * "GLLLLL"}
    | {"local.sinks": True, "sinks": False, "local.num_kv_heads": 8, "num_kv_heads": 4, "local.rope_theta": 10_000.0}
    | {"rope.theta": 5e6, "head_dim": 192, "rotary_fraction": 64 / 192, "value_head_dim": 128, "value_scale": 0.707}
    | {"num_experts": 256, "num_shared_experts": 0, "num_dense_layers": 1, "router.score": "sigmoid", "norm_eps": 1e-5}
    | {"routed_scaling_factor": 1.0, "qk_norm": False, "qkv_bias": False},
    "coder": {"rope.linear_factor": 4.0, "rope.theta": 100_000.0, "head_dim": 128, "tie_embeddings": False},
}
DEPTHS = {"flash": 3, "ernie": 1, "v3": 1, "glm_air": 1, "mimo": 1}
FAMILIES = {"flash": "mimo_v2_flash", "glm_air": "glm4_moe", "mimo": "mimo"}


def transformers():
    """Skips the test where transformers is missing, and fails it where CI promises it."""
    if os.environ.get("CI") == "true":
        return importlib.import_module("transformers")
    return pytest.importorskip("transformers")


def through_transformers(hf):
    """A config.json as written by transformers' class, in its newer style."""
    model_type = hf["model_type"]
    # MiMo's own class is remote code, and Qwen2's with one more key; Kimi-K2's is DeepSeek-V3's.
    name = {"mimo": "qwen2", "kimi_k2": "deepseek_v3"}.get(model_type, model_type)
    values = copy.deepcopy(without(hf, "model_type"))  # it completes the rope's dict in place
    return transformers().AutoConfig.for_model(name, **values).to_dict() | {"model_type": model_type}


def read(hf, **kwargs):
    return to_config(hf, "config.json", **kwargs)


def model_with(hf, **fields):
    config = read(hf)
    return dataclasses.replace(config, model=with_values(config.model, fields))


def mtp_with(hf, **fields):
    config = read(hf)
    return dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, **fields))


def without(hf, *keys):
    return {key: value for key, value in hf.items() if key not in keys}


def refusal(call, *args, **kwargs):
    """The message, one line."""
    with pytest.raises(UserError) as error:
        call(*args, **kwargs)
    message = str(error.value)
    assert "\n" not in message
    return message


# --- released files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_released_file_gives_the_model_of_its_paper(name):
    config = read(FILES[name])
    got = {key: value for key, value, _ in walk(config.model)}
    assert {key: got[key] for key in EXPECTED[name]} == EXPECTED[name]
    assert (kind_of(config).depth, config.mtp.family) == (DEPTHS.get(name, 0), FAMILIES.get(name, "deepseek_v3"))
    assert dataclasses.replace(config, model=ModelConfig(), mtp=MTPConfig()) == Config()
    assert got["param_dtype"] == got["compute_dtype"] == "float32"
    validate(config, 1)


@pytest.mark.parametrize("name", FILES)
def test_a_released_file_comes_back_key_for_key(name):
    hf = FILES[name]
    assert from_config(read(hf), hf["model_type"], base=hf) == without(hf, "quantization_config")


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_base_is_loaded_by_transformers_as_the_same_model(name):
    config = read(FILES[name])
    hf = from_config(config, FILES[name]["model_type"])
    assert read(json.loads(json.dumps(hf))) == config
    newer = through_transformers(hf)
    assert "rope_parameters" in newer and "rope_scaling" not in newer
    assert read(newer) == config
    assert from_config(config, hf["model_type"], base=newer) == newer


@pytest.mark.parametrize("name", FILES)
def test_a_file_without_a_base_equals_the_released_one(name):
    released, hf = FILES[name], from_config(read(FILES[name]), FILES[name]["model_type"])
    own = {"rope_scaling", "bos_token_id", "eos_token_id", "max_position_embeddings"}
    if name == "gpt_oss":  # other names of keys that are there
        released = without(released, "experts_per_token", "initial_context_length")
    if name == "flash":  # as transformers counts, and as ours is
        own |= {"partial_rotary_factor", "sliding_window", "routed_scaling_factor"}
    same = (hf.keys() & released.keys()) - own
    assert {key: hf[key] for key in same} == {key: released[key] for key in same}
    tolerated = MODEL_TYPES[released["model_type"]].tolerated.keys()
    assert released.keys() - hf.keys() <= IGNORED | tolerated | {*WINDOW_KEYS, "quantization_config"}
    scaling = released.get("rope_scaling")
    if name == "flash":  # in both names; transformers' counts the query
        assert (hf["sliding_window"], hf["sliding_window_size"], "rope_scaling" in hf) == (129, 128, False)
        return
    assert hf["rope_scaling"] == (
        scaling and {"rope_type": scaling.get("type"), "type": scaling.get("rope_type")} | scaling
    )
    if name in ("v3", "v2_lite", "gpt_oss"):
        assert hf["max_position_embeddings"] == released["max_position_embeddings"]


def test_the_heads_of_qwen3_do_not_follow_from_its_width():
    hf = {"model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": None}
    assert read(hf).model.head_dim == 128
    assert read(hf | {"model_type": "qwen2"}).model.head_dim == 64
    assert read(hf).model.num_kv_heads == 16


@pytest.mark.parametrize("name", FILES)
def test_the_layout_of_an_imported_model_is_that_of_its_file(name):
    model_type = FILES[name]["model_type"]
    same = {"kimi_k2": "deepseek_v3", "mistral": "llama"}
    assert layout_of(read(FILES[name])) == same.get(model_type, model_type)


@pytest.mark.parametrize("name", MODEL_TYPES)
def test_absent_keys_are_what_transformers_takes_for_them(name):
    unusable = {
        "deepseek_v2": {"num_experts_per_tok": 6},
        "glm4_moe": {"head_dim": 128},
        "mistral": {"sliding_window": None},
    }  # their own defaults do not run
    needed = {"model_type": name} | unusable.get(name, {})
    filled = through_transformers(needed) | {"num_nextn_predict_layers": 0}
    assert read(needed) == read(filled)


# --- rope -------------------------------------------------------------------------------------------------------------

ROPES = {
    "none": (QWEN2, None),
    "linear": (LLAMA, {"type": "linear", "factor": 4.0}),
    "llama3": (LLAMA, LLAMA["rope_scaling"]),
    "yarn of mla": (V3, V3["rope_scaling"]),
    "yarn of two mscales": (V3, V3["rope_scaling"] | {"mscale": 0.8}),
    "yarn without mscale": (V3, {"type": "yarn", "factor": 8, "original_max_position_embeddings": 1024}),
    "yarn of gqa": (QWEN3, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}),
    "yarn of half a head": (GLM_AIR, {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "mscale": 0.5}),
    "yarn that is not truncated": (QWEN3, {"rope_type": "yarn", "factor": 4.0, "truncate": False}),
    "yarn by lengths": (QWEN3, {"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 20480}),
}


@pytest.mark.parametrize("name", ROPES)
def test_the_rotation_is_transformers_own(name):
    base, scaling = ROPES[name]
    hf = base | {"rope_scaling": scaling}
    if name == "yarn of half a head":
        assert read(hf).model.rope.yarn.original_length == hf["max_position_embeddings"]  # absent: as transformers
    values = copy.deepcopy(without(hf, "model_type", "quantization_config"))
    theirs = transformers().AutoConfig.for_model(hf["model_type"], **values)
    functions = importlib.import_module("transformers.modeling_rope_utils").ROPE_INIT_FUNCTIONS
    modeling = importlib.import_module(f"transformers.models.{hf['model_type']}.modeling_{hf['model_type']}")
    kind = theirs.rope_parameters["rope_type"]
    plain = importlib.import_module("transformers.models.qwen2.modeling_qwen2").Qwen2RotaryEmbedding
    frequency, scale = ({"default": plain.compute_default_rope_parameters} | functions)[kind](theirs)
    model = read(hf).model
    dim = model.qk_rope_head_dim if model.attention == "mla" else round(model.head_dim * model.rotary_fraction)
    assert rope.inverse_frequencies(dim, model.rope) == pytest.approx(frequency.double().numpy(), rel=1e-5)
    assert rope.rotation_scale(model.rope) == pytest.approx(scale)
    if model.attention == "mla":
        softmax = modeling.yarn_apply_mscale(theirs.rope_parameters, 192**-0.5)
        assert rope.mla_softmax_scale(192, model.rope) == pytest.approx(softmax)


def test_a_stretching_by_one_is_none():
    plain = read(LLAMA | {"rope_scaling": None})
    one = LLAMA["rope_scaling"] | {"factor": 1.0, "original_max_position_embeddings": 512}
    for scaling in ({"type": "linear", "factor": 1}, one):
        assert read(LLAMA | {"rope_scaling": scaling}) == plain


def test_the_rope_of_the_base_keeps_its_style():
    grown = model_with(LLAMA, **{"rope.theta": 1e6})
    assert from_config(grown, "llama", base=LLAMA) == LLAMA | {"rope_theta": 1e6}
    newer = without(LLAMA, "rope_theta", "rope_scaling")
    newer["rope_parameters"] = LLAMA["rope_scaling"] | {"rope_theta": 500_000.0}
    assert read(newer) == read(LLAMA)
    assert from_config(read(newer), "llama", base=newer) == newer
    parameters = newer["rope_parameters"] | {"rope_theta": 1e6}
    assert from_config(grown, "llama", base=newer) == newer | {"rope_parameters": parameters}
    inside = without(LLAMA, "rope_theta") | {"rope_scaling": newer["rope_parameters"]}
    assert from_config(grown, "llama", base=inside) == inside | {"rope_scaling": parameters}
    apart = without(CODER, "rope_scaling") | {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}
    assert read(apart) == read(CODER)
    longer = from_config(model_with(CODER, **{"rope.linear_factor": 8.0}), "llama", base=apart)
    assert longer["rope_parameters"] == {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e5}
    assert longer.keys() == apart.keys()
    shorter = model_with(LLAMA, **{"rope.llama3.factor": 1.0})
    assert from_config(shorter, "llama", base=LLAMA)["rope_scaling"] is None


# --- what changed after the import ------------------------------------------------------------------------------------


def test_only_what_changed_differs_from_the_base():
    base = without(V3, "quantization_config") | {"head_dim": 64, "qk_head_dim": 192, "custom": 7}
    config = to_config(base, "config.json", ignore=("custom",))
    grown = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=129_536, num_heads=64))
    assert from_config(grown, "deepseek_v3", base=base) == base | {
        **{"vocab_size": 129_536, "num_attention_heads": 64, "num_key_value_heads": 64}
    }
    bare = to_config(base, "config.json", ignore=("custom",), depth=0)
    assert from_config(bare, "deepseek_v3", base=base) == base | {"num_nextn_predict_layers": 0}


def test_a_list_with_one_entry_per_layer_follows_the_number_of_layers():
    base = QWEN2 | {"layer_types": ["full_attention"] * 24}
    assert from_config(read(base), "qwen2", base=base) == base
    fewer = from_config(model_with(base, num_layers=2), "qwen2", base=base)
    assert (fewer["num_hidden_layers"], fewer["layer_types"]) == (2, ["full_attention"] * 2)


def test_newer_names_are_read_and_kept():
    base = without(V3, "num_nextn_predict_layers", "n_routed_experts", "quantization_config")
    base |= {"num_mtp_layers": 1, "num_local_experts": 256}
    config = read(base)
    assert config == read(V3)
    assert from_config(config, "deepseek_v3", base=base) == base
    deeper = dataclasses.replace(config, mtp=dataclasses.replace(config.mtp, depth=3))
    assert from_config(deeper, "deepseek_v3", base=base) == base | {"num_mtp_layers": 3}
    v2 = without(V2, "n_routed_experts") | {"num_experts": 160}
    assert read(v2) == read(V2)


def test_a_model_without_experts_is_a_deepseek_file_of_dense_layers():
    for depth in (0, 2):
        config = mtp_with(V3, depth=2) if depth else read(V3, depth=0)
        model = read(V3 | {"first_k_dense_replace": 61}).model
        assert (model.num_experts, model.num_dense_layers) == (0, ModelConfig().num_dense_layers)
        config = dataclasses.replace(config, model=model)
        hf = from_config(config, layout_of(config))
        # engines call layer N dense only where first_k_dense_replace counts past it
        assert (hf["first_k_dense_replace"], hf["num_nextn_predict_layers"]) == (61 + depth, depth)
        assert read(hf) == read(through_transformers(hf)) == config
        assert from_config(config, "deepseek_v3", base=hf) == hf
    assert read(V3 | {"n_routed_experts": None}).model.num_experts == 0


def test_transformers_builds_dense_layers_from_a_model_without_experts():
    config = Config(model=ModelConfig(vocab_size=64, num_layers=2, embed_dim=16, ffn_dim=24))
    hf = without(from_config(config, "deepseek_v3"), "model_type")
    module = transformers()
    with importlib.import_module("torch").device("meta"):
        model = module.DeepseekV3ForCausalLM(module.DeepseekV3Config(**hf))
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["DeepseekV3MLP"] * 2


# --- MTP --------------------------------------------------------------------------------------------------------------


def test_depth_zero_leaves_the_mtp_layers_out():
    assert read(V3, depth=0).mtp == MTPConfig(kind="none", family="deepseek_v3")
    assert read(MIMO, depth=0).mtp == MTPConfig(kind="none", family="mimo")
    assert kind_of(read(V3 | {"num_nextn_predict_layers": 3}, depth=2)).depth == 2
    assert "depth=2: config.json has 1 MTP layers" in refusal(read, V3, depth=2)


def test_conventions_other_than_the_familys_are_written_and_read_back():
    config = mtp_with(V3, depth=3, shared_depths=True, recycled_hidden="after_norm", concat_order="hidden_first")
    hf = from_config(config, layout_of(config))
    assert hf["num_nextn_predict_layers"] == 1
    assert hf["mtp_conventions"] == {
        **{"concat_order": "hidden_first", "recycled_hidden": "after_norm", "shared_depths": True, "depth": 3}
    }
    back = read(hf).mtp
    assert back == MTPConfig(
        kind="sequential", depth=3, shared_depths=True, concat_order="hidden_first", recycled_hidden="after_norm"
    )
    assert from_config(read(hf), "deepseek_v3", base=hf) == hf
    assert "mtp_conventions" not in from_config(read(hf, depth=0), "deepseek_v3", base=hf)


@pytest.mark.parametrize("base", [LLAMA, QWEN2, QWEN3, V2_LITE])
def test_families_without_mtp_of_their_own_name_the_depth_only_where_there_is_one(base):
    layout = base["model_type"]
    assert "num_nextn_predict_layers" not in from_config(read(base), layout)
    deeper = mtp_with(base, kind="sequential", depth=2)
    assert from_config(deeper, layout, base=base) == base | {"num_nextn_predict_layers": 2}
    assert read(from_config(deeper, layout)) == deeper


TRAINING = (
    *("param_dtype", "compute_dtype", "remat", "init_std", "router.bias_rate", "router.bias_until"),
    *("balance_loss_weight", "moe_dispatch", "attention_kernel", "expert_kernel", "scan_unroll"),
)

# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("deepseek_v3_671b", "deepseek_v3"),
        ("deepseek_v2_lite_16b", "deepseek_v2"),
        *((name, "deepseek_v3") for name in ("dense_1b", "moe_4b", "tiny", "quickstart")),
    ],
)
def test_the_configs_of_this_repository_have_a_layout(name, layout):
    config = load_config(str(pathlib.Path(__file__).parents[2] / "configs" / f"{name}.py"))
    assert layout_of(config) == layout
    untrained = {key: value_of(ModelConfig(), key) for key in TRAINING}
    model = dataclasses.replace(config.model, vocab_size=1024)
    back = read(through_transformers(from_config(dataclasses.replace(config, model=model), layout)))
    assert back.model == with_values(model, untrained)
    assert (back.mtp.kind, kind_of(back).depth) == (config.mtp.kind, kind_of(config).depth)


def test_mimo_without_its_modules_is_qwen2():
    assert layout_of(read(MIMO, depth=0)) == "qwen2"
    assert layout_of(mtp_with(QWEN2, kind="sequential", family="mimo")) == "mimo"


def test_a_window_beyond_the_longest_text_is_none():
    wide = MISTRAL | {"sliding_window": 32_768}
    assert read(wide) == read(MISTRAL)
    assert from_config(read(wide), "mistral", base=wide) == wide
    assert from_config(read(MISTRAL), "mistral")["sliding_window"] is None
    assert read(without(MISTRAL, "sliding_window") | {"max_position_embeddings": 4096}).model == read(MISTRAL).model


def test_windows_of_some_layers_are_those_of_transformers():
    """From max_window_layers on, where layer_types does not name them; and back, in both directions."""
    model = read(QWEN2_WINDOW).model
    assert (model.local.window, model.local.pattern) == (4096, "G" * 21 + "LLL")
    theirs = through_transformers(QWEN2_WINDOW)
    assert theirs["layer_types"] == common.layer_types(model)["layer_types"] and read(theirs).model == model
    assert from_config(read(QWEN2_WINDOW), "qwen2", base=QWEN2_WINDOW) == QWEN2_WINDOW
    types = ["full_attention", "sliding_attention"] * 12
    alternating = read(QWEN2_WINDOW | {"layer_types": types})
    assert alternating.model.local.pattern == "GL"
    hf = from_config(alternating, "qwen2")
    assert hf["layer_types"] == types and read(hf) == alternating and layout_of(alternating) == "qwen2"
    assert from_config(model_with(QWEN2_WINDOW, **{"local.window": 0}), "qwen2", base=QWEN2_WINDOW) == (
        without(QWEN2_WINDOW, "sliding_window", "max_window_layers") | {"use_sliding_window": False}
    )


def test_the_window_of_every_layer():
    narrow = MISTRAL | {"sliding_window": 4096}
    assert read(narrow).model == with_values(read(MISTRAL).model, {"local.window": 4096})
    assert read(without(MISTRAL, "sliding_window")) == read(narrow)
    assert from_config(read(narrow), "mistral", base=MISTRAL) == narrow
    assert from_config(read(MISTRAL), "mistral", base=narrow) == MISTRAL
    assert layout_of(read(narrow)) == "mistral"
    some = model_with(narrow, **{"local.pattern": "LG"})
    assert "model.local.pattern='LG': the mistral layout" in refusal(from_config, some, "mistral")
    assert "model.local.window=4096: the llama layout" in refusal(from_config, read(narrow), "llama")


def test_the_config_for_chats_is_the_model_that_it_names():
    assert from_config(load_config("configs/chat.py"), "qwen3", base=QWEN3) == QWEN3 | {"num_nextn_predict_layers": 1}


def test_training_and_unused_keys_do_not_matter():
    config = model_with(
        QWEN3, q_lora_rank=7, remat="full", init_std=0.5, latent_norm_eps=1.0, **{"router.score": "softmax"}
    )
    assert layout_of(config) == "qwen3"
    assert from_config(config, "qwen3", base=QWEN3) == QWEN3
    assert layout_of(model_with(V3, **{"router.group_score": "max", "router.groups_per_token": 8})) == "deepseek_v3"


NOT_HELD = {
    "model.qk_norm=True": model_with(QWEN2, qk_norm=True),
    "model.rope.interleaved=True": model_with(QWEN3, **{"rope.interleaved": True}),
    "model.rotary_fraction=0.5": model_with(LLAMA, rotary_fraction=0.5),
    "model.router.renormalize=True": model_with(V2_LITE, **{"router.renormalize": True}),
    "model.router.score='softmax'": model_with(GLM_AIR, **{"router.score": "softmax"}),
    "model.router.group_score='top2_sum'": model_with(V2, **{"router.group_score": "top2_sum"}),
    "model.latent_norm_eps=1e-05": model_with(V3, latent_norm_eps=1e-5),
    "model.num_heads=12": model_with(LLAMA, num_heads=12, num_kv_heads=4),
    "model.num_shared_experts=1": model_with(QWEN3_MOE, num_shared_experts=1),
    "model.num_dense_layers=1": model_with(QWEN3_MOE, num_dense_layers=1),
    "model.routed_scaling_factor=2.0": model_with(QWEN3_MOE, routed_scaling_factor=2.0),
    "mtp.kind='parallel'": mtp_with(LLAMA, kind="parallel", depth=2),
    "model.value_scale=0.5": model_with(LLAMA, value_scale=0.5),
    "model.gated_unit.limit=7.0": model_with(V3, **{"gated_unit.limit": 7.0}),
    "model.sinks=True": model_with(V3, sinks=True),
    "mtp.window=4": mtp_with(LLAMA, kind="sequential", window=4),
    "mtp.dense_ffn=True": mtp_with(V3, dense_ffn=True),
}


@pytest.mark.parametrize("named", NOT_HELD)
def test_settings_without_a_layout_are_refused_by_our_key(named):
    assert refusal(layout_of, NOT_HELD[named]).startswith(named)


# What does not change what a trained model computes, and what another kind of MTP than the released one reads.
RESOLVED = {"value_head_dim": "head_dim", "local.rope_theta": "rope.theta"}  # where they are 0
OF_TRAINING = {*TRAINING, "matmul_precision"}
OF_MTP_TRAINING = {"weight", "weight_values", "weight_boundaries", "weight_unit", "depth_decay", "normalize"}
OF_MTP_TRAINING |= {"curriculum", "detach_decoder", "freeze_decoder"}
OF_OTHER_KINDS = {"parameter_matched", "top.window", "nextlat.width", "nextlat.latent_weight", "nextlat.kl_weight"}
PARTS = {"nothing": {}, "window": {"local.window": 8}, "yarn": {"rope.yarn.factor": 4.0}}
PARTS |= {"llama3": {"rope.llama3.factor": 4.0}, "experts": {"num_experts": 8}}
PARTS |= {"all": {"num_experts": 8, "router.num_groups": 4, "router.groups_per_token": 2, "local.window": 8}}


def resolved(model, name):
    """The value of a field; of one that is taken from another where it is 0, that one's."""
    return value_of(model, name) or value_of(model, RESOLVED.get(name, name))


def others(hint, value):
    """Other values of a field, some of which every model can have."""
    choices = [c for c in typing.get_args(hint) if c and not isinstance(c, type)]
    if choices:
        return [c for c in choices if c != value]
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return ["LG"]
    return [3, 2 * (value or 1), 0] if "int" in str(hint) else [3.0, 0.5]


@pytest.mark.parametrize("layout", MODEL_TYPES)
def test_every_field_is_stored_or_refused(layout):
    """With each field of the model changed in turn: what is written is read back as the same model, or not written."""
    hints, family = key_hints(ModelConfig), MODEL_TYPES[layout]
    written = set()
    for part in PARTS.values():
        basis = {"vocab_size": 64, "attention": family.implied.get("attention", "gqa")} | part
        settled = {n: v for n, v in family.implied.items() if n != "num_experts" and not callable(v)}
        model = with_values(ModelConfig(), settled | basis)
        model = with_values(model, {n: v(model) for n, v in family.implied.items() if callable(v)})
        for key, value, _ in walk(model):
            for other in others(hints[key], value) if key not in OF_TRAINING else ():
                config = Config(model=with_values(model, {key: other}))
                try:
                    validate_model(config, 1)
                    hf = from_config(config, layout)
                except UserError:
                    continue
                written.add(key)
                back = read(hf).model
                for name, _, _ in walk(back):
                    if name not in OF_TRAINING and layouts.counts(name, config.model):
                        assert resolved(back, name) == resolved(config.model, name), f"{name} after {key}={other!r}"
    assert {"num_layers", "embed_dim", "norm_eps"} <= written


@pytest.mark.parametrize("layout", [name for name, family in MODEL_TYPES.items() if not family.left_out])
def test_every_field_of_the_modules_is_stored_or_refused(layout):
    hf = next(hf for hf in FILES.values() if hf["model_type"] == layout)
    basis, hints = mtp_with(hf, kind="sequential", depth=2), key_hints(MTPConfig)
    stored, refused = set(), set()
    assert OF_MTP_TRAINING | OF_OTHER_KINDS <= hints.keys()
    for key in hints.keys() - OF_MTP_TRAINING - OF_OTHER_KINDS:
        value = value_of(basis.mtp, key)
        for other in others(hints[key], value) if key != "kind" else ["parallel", "none"]:
            config = dataclasses.replace(basis, mtp=with_values(basis.mtp, {key: other}))
            try:
                back = read(from_config(config, layout))
            except UserError:
                refused.add(key)
                continue
            stored.add(key)
            assert kind_of(back).depth == kind_of(config).depth
            if kind_of(config).depth:
                assert kind_of(back).layer_spec == kind_of(config).layer_spec
                assert conventions(back.mtp) == conventions(config.mtp)
                assert back.mtp.shared_depths == config.mtp.shared_depths
    assert refused | stored == hints.keys() - OF_MTP_TRAINING - OF_OTHER_KINDS
    assert {"kind", "window"} <= refused and {"depth", "shared_depths", "family", "chain", "output_norm"} <= stored


def test_from_config_refuses_what_its_layout_cannot_hold():
    wide = model_with(V3, attention="gqa", **{"rope.interleaved": False})
    assert "model.num_experts=256: the llama layout" in refusal(from_config, wide, "llama")
    assert "mtp.kind='parallel'" in refusal(from_config, NOT_HELD["mtp.kind='parallel'"], "llama")
    assert "model.vocab_size=None" in refusal(from_config, model_with(V3, vocab_size=None), "deepseek_v3")
    assert "model_type='llama'" in refusal(from_config, read(QWEN3), "qwen3", base=LLAMA)
    assert "'gpt2'" in refusal(from_config, read(QWEN3), "gpt2")
    assert "model.num_experts=0: the qwen3_moe layout" in refusal(from_config, read(QWEN3), "qwen3_moe")


def test_what_would_be_read_back_as_another_model_is_not_written():
    assert "mscale_all_dim'=1.0" in refusal(from_config, model_with(V3, **{"rope.yarn.mscale": 0.0}), "deepseek_v3")
    lost = refusal(from_config, model_with(V3, **{"rope.yarn.beta_fast": 0.0}), "deepseek_v3", base=V3)
    assert "'rope_scaling'={" in lost and "would be read back as" in lost


def test_the_base_is_not_shared_with_the_result():
    base = copy.deepcopy(LLAMA)
    from_config(read(base), "llama", base=base)["rope_scaling"]["factor"] = 2.0
    assert base == LLAMA


# --- what is refused --------------------------------------------------------------------------------------------------

YARN_FILE = V3["rope_scaling"]


def flash_with_local(local):
    """MiMo-V2-Flash with a section for each kind of layer."""
    basis = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.334}
    return FLASH | {"rope_parameters": {"full_attention": basis, "sliding_attention": basis | local}}


REFUSED = [
    (
        V3 | {"foo": 3},
        "field 'foo'=3 is not one that mtp_jax reads for deepseek_v3",
        "--workdir=DIR --ignore=foo` and give DIR",
    ),
    (
        V3 | {"model_type": "gpt2"},
        "'model_type'='gpt2'",
        ", ".join(MODEL_TYPES),
    ),
    (V3 | {"model_type": "qwen3_next"}, "'qwen3_next'", "gated attention and linear attention"),
    (V3 | {"model_type": "gemma3"}, "'gemma3'", "four norms"),
    (V3 | {"model_type": ["llama"]}, "'model_type'=['llama']", "llama"),
    (V3 | {"hidden_act": "gelu"}, "'hidden_act'='gelu'", "'silu'"),
    (V3 | {"attention_bias": True}, "'attention_bias'=True", "False"),
    (V3 | {"moe_layer_freq": 2}, "'moe_layer_freq'=2", "1"),
    (V3 | {"scoring_func": "softmax"}, "'scoring_func'='softmax'", "'sigmoid'"),
    (V3 | {"topk_method": "greedy"}, "'topk_method'='greedy'", "'noaux_tc'"),
    (V2 | {"topk_method": "noaux_tc"}, "'topk_method'='noaux_tc'", "group_limited_greedy"),
    (V2 | {"norm_topk_prob": True}, "'norm_topk_prob'=True", "False"),
    (
        GPT_OSS | {"quantization_config": V3["quantization_config"]},
        "'quantization_config.quant_method'='fp8'",
        "'mxfp4'",
    ),
    (GPT_OSS | {"experts_per_token": 2}, "'experts_per_token'=2", "4"),
    (GPT_OSS | {"hidden_act": "gelu"}, "'hidden_act'='gelu'", "'silu'"),
    (LLAMA | {"quantization_config": {"quant_method": "mxfp4"}}, "'quantization_config.quant_method'='mxfp4'", "'fp8'"),
    (FLASH | {"swa_num_key_value_heads": 4}, "'swa_num_key_value_heads'=4", "8"),
    (FLASH | {"swa_head_dim": 128}, "'swa_head_dim'=128", "192"),
    (FLASH | {"add_swa_attention_sink_bias": False}, "'add_swa_attention_sink_bias'=False", "True"),
    (FLASH | {"layernorm_epsilon": 1e-6, "rms_norm_eps": 1e-5}, "'layernorm_epsilon'=1e-06", "1e-05"),
    (FLASH | {"moe_layer_freq": [0, 1] * 24}, "'moe_layer_freq'=[0, 1", "the other fields make it"),
    (FLASH | {"layer_types": ["full_attention"] * 48}, "'hybrid_layer_pattern'=[0, 1", "the other fields make it"),
    (FLASH | {"rope_scaling": {"type": "yarn", "factor": 2.0}}, "'rope_scaling.rope_type'='yarn'", "default"),
    (flash_with_local({"rope_type": "yarn"}), "'rope_parameters.sliding_attention.rope_type'='yarn'", "not stretched"),
    (
        flash_with_local({"partial_rotary_factor": 0.5}),
        "'rope_parameters.sliding_attention.partial_rotary_factor'=0.5",
        "0.33",
    ),
    (FLASH | {"n_shared_experts": 1}, "'n_shared_experts'=1", "0"),
    (FLASH | {"num_hidden_layers": 10**9}, "model.num_layers=1000000000", "at most 2^12"),
    (GPT_OSS | {"num_hidden_layers": 10**9, "layer_types": None}, "model.num_layers=1000000000", "at most 2^12"),
    (MISTRAL | {"sliding_window": 0}, "'sliding_window'=0", "at least 1"),
    (MISTRAL | {"sliding_window": "4096"}, "'sliding_window'='4096'", "an integer"),
    (ERNIE | {"use_bias": True}, "'use_bias'=True", "False"),
    (ERNIE | {"moe_layer_interval": 2}, "'moe_layer_interval'=2", "1"),
    (ERNIE | {"moe_layer_end_index": 20}, "'moe_layer_end_index'=20", "27"),
    (ERNIE | {"moe_norm_min": 0.1}, "'moe_norm_min'=0.1", "1e-12"),
    (QWEN3_MOE | {"decoder_sparse_step": 2}, "'decoder_sparse_step'=2", "1"),
    (QWEN3_MOE | {"mlp_only_layers": [0, 5]}, "'mlp_only_layers'=[0, 5]", "[]"),
    (QWEN3_MOE | {"use_sliding_window": True}, "'use_sliding_window'=True", "False"),
    (without(V2, "num_experts_per_tok"), "'num_experts_per_tok' is missing", "add it"),
    (V3 | {"num_key_value_heads": 8}, "'num_key_value_heads'=8", "128"),
    (V3 | {"head_dim": 192}, "'head_dim'=192", "64"),
    (LLAMA | {"mlp_bias": True}, "'mlp_bias'=True", "False"),
    (LLAMA | {"sliding_window": 4096}, "'sliding_window'=4096", "load(..., ignore=('sliding_window',))"),
    (MIMO | {"use_sliding_window": True}, "'use_sliding_window'=True", "False"),
    (QWEN2 | {"use_sliding_window": 1}, "'use_sliding_window'=1", "true or false"),
    (QWEN2_WINDOW | {"max_window_layers": "3"}, "'max_window_layers'='3'", "an integer"),
    (QWEN2_WINDOW | {"layer_types": ["full_attention"] * 23}, "'layer_types'=['full_attention'", "each of 24 layers"),
    (QWEN2_WINDOW | {"layer_types": ["linear"] * 24}, "'layer_types'=['linear'", "full_attention or sliding_attention"),
    (QWEN2 | {"layer_types": ["sliding_attention"] * 24}, "'layer_types'=['sliding_attention'", "full_attention"),
    (LLAMA | {"hidden_size": "2048"}, "'hidden_size'='2048'", "an integer"),
    (LLAMA | {"hidden_size": True}, "'hidden_size'=True", "an integer"),
    (LLAMA | {"rms_norm_eps": "1e-5"}, "'rms_norm_eps'='1e-5'", "a finite number"),
    (LLAMA | {"rms_norm_eps": float("nan")}, "'rms_norm_eps'=nan", "a finite number"),
    (LLAMA | {"tie_word_embeddings": 1}, "'tie_word_embeddings'=1", "true or false"),
    (LLAMA | {"num_key_value_heads": 7}, "model.num_kv_heads=7", "does not divide"),
    (LLAMA | {"partial_rotary_factor": 0.5}, "'partial_rotary_factor'=0.5", "1.0"),
    (LLAMA | {"rope_scaling": "linear"}, "'rope_scaling'='linear'", "an object"),
    (LLAMA | {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'rope_scaling.rope_type'='dynamic'", "llama3"),
    (LLAMA | {"rope_scaling": {"type": "linear"}}, "'rope_scaling.factor' is missing", "add it"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": 0.5}}, "'rope_scaling.factor'=0.5", "at least 1"),
    (LLAMA | {"rope_scaling": {"type": "linear", "factor": "4"}}, "'rope_scaling.factor'='4'", "a finite number"),
    (V3 | {"rope_scaling": YARN_FILE | {"bar": 1}}, "'rope_scaling.bar'=1", "--ignore=rope_scaling.bar`"),
    (V3 | {"rope_scaling": YARN_FILE | {"attention_factor": 1.2}}, "'rope_scaling.attention_factor'=1.2", "None"),
    (V3 | {"rope_scaling": YARN_FILE | {"truncate": 0}}, "'rope_scaling.truncate'=0", "true or false"),
    (V3 | {"rope_scaling": without(YARN_FILE, "mscale")}, "'rope_scaling.mscale_all_dim'=1.0", "both"),
    (V3 | {"quantization_config": {"quant_method": "awq"}}, "'quantization_config.quant_method'='awq'", "'fp8'"),
    (
        V3 | {"quantization_config": {"quant_method": "fp8"}},
        "'quantization_config.weight_block_size'=None",
        "[128, 128]",
    ),
    (V3 | {"num_mtp_layers": 2}, "'num_mtp_layers'=2", "'num_nextn_predict_layers'=1"),
    (V3 | {"num_nextn_predict_layers": 17}, "mtp.depth=17", "config.json"),
    (V3 | {"num_nextn_predict_layers": "1"}, "'num_nextn_predict_layers'='1'", "an integer"),
    (V3 | {"mtp_conventions": {"chain": "side"}}, "'mtp_conventions.chain'='side'", "previous or decoder"),
    (V3 | {"mtp_conventions": {"order": 1}}, "'mtp_conventions.order'=1", "concat_order"),
    (V3 | {"mtp_conventions": {"depth": 2}}, "'num_nextn_predict_layers'=1", "'depth': 2"),
    (V3 | {"mtp_conventions": 5}, "'mtp_conventions'=5", "an object"),
]


@pytest.mark.parametrize(("hf", "named", "remedy"), REFUSED, ids=[named for _, named, _ in REFUSED])
def test_a_file_that_cannot_be_held_is_refused_by_its_key(hf, named, remedy):
    message = refusal(read, hf)
    assert message.startswith("config.json: ") and named in message and remedy in message


@pytest.mark.parametrize("name", FILES)
def test_a_null_is_an_absent_key(name):
    """Known to the layout or not, at the top or in the rope; those that state something keep their meaning."""
    hf = FILES[name]
    for key in ("vocab_size", "rms_norm_eps", "hidden_act", "rope_theta", "first_k_dense_replace", "anything"):
        assert read(hf | {key: None}) == read(without(hf, key))
    rope = hf.get("rope_scaling") or {"type": "default"}
    assert read(hf | {"rope_scaling": rope | {"anything": None, "attention_factor": None}}) == read(hf)
    with_nulls = hf | {"anything": None, "hidden_act": None}
    assert from_config(read(with_nulls), hf["model_type"], base=with_nulls) == without(
        with_nulls, "quantization_config"
    )
    assert read(V3 | {"q_lora_rank": None}).model.q_lora_rank == 0
    assert config_json.longest_text(LLAMA | {"max_position_embeddings": None}, "") == 2048


def test_conventions_under_old_names_are_read_and_written_under_new_ones():
    """Also where config.json of the imported model, which has the old names, is the base of the export."""
    current = {"decoder_hidden": "before_norm", "chain": "decoder"}
    old = V3 | {"mtp_conventions": {"trunk_hidden": "before_norm", "chain": "trunk"}}
    new = V3 | {"mtp_conventions": current}
    config = read(old)
    assert config == read(new) and config.mtp.decoder_hidden == "before_norm" and config.mtp.chain == "decoder"
    for base in (None, old, new):
        assert from_config(config, "deepseek_v3", base=base)["mtp_conventions"] == current
    both = V3 | {"mtp_conventions": {"trunk_hidden": "before_norm", "decoder_hidden": "after_norm"}}
    message = refusal(read, both)
    assert message.startswith("mtp.trunk_hidden and mtp.decoder_hidden (in config.json): two names of one key")


def test_an_unknown_key_is_accepted_on_request_of_the_caller():
    assert read(V3 | {"foo": 3, "rope_scaling": YARN_FILE | {"bar": 1}}, ignore=("foo", "rope_scaling.bar")) == read(V3)
    assert "'attention_bias'=True" in refusal(read, V3 | {"attention_bias": True}, ignore=("attention_bias",))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds a list, not a JSON object"),
        ("{}", "field 'model_type' is missing"),
        (b"\xff\xfe", "cannot be read as JSON"),
        (json.dumps(LLAMA)[:-1] + ', "a": ' + "[" * 100 + "]" * 100 + "}", "is nested deeper than 32 levels"),
        ("[" * 100_000 + "]" * 100_000, "is nested deeper than 32 levels"),
    ],
)
def test_a_config_json_that_is_none_is_refused(tmp_path, text, named):
    (tmp_path / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal(read_config, tmp_path)
    assert named in message and str(tmp_path) in message


def test_a_folder_that_is_none_is_refused(tmp_path):
    assert "no such folder" in refusal(read_config, tmp_path / "nowhere")
    assert "holds no config.json" in refusal(read_config, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    assert read_config(tmp_path) == LLAMA


def test_a_missing_transformers_is_a_failure_in_ci(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setenv("CI", "true")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ModuleNotFoundError):
        transformers()


def test_the_tables_name_only_fields_that_exist():
    names = key_hints(ModelConfig).keys()
    for table in MODEL_TYPES.values():
        assert {*table.fields.values(), *table.mixture.values(), *table.implied} <= names
        assert table.defaults.keys() <= table.fields.keys() | table.mixture.keys() | {
            "max_position_embeddings",
            "rope_theta",
            "rope_parameters",
            *windows.KEYS[table.window],
        }


def test_the_longest_text_is_the_files_own_or_the_class_default():
    assert config_json.longest_text(V3, "config.json") == 163_840
    assert config_json.longest_text({k: v for k, v in LLAMA.items() if k != "max_position_embeddings"}, "") == 2048
    for value in (1, "long"):
        with pytest.raises(UserError, match="config.json: field 'max_position_embeddings'"):
            config_json.longest_text(LLAMA | {"max_position_embeddings": value}, "config.json")
