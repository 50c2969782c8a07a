"""What config.json says in each released layout: one table per model_type, read in both directions by `hf_config`.

Below the tables: how one value of such a file is read and refused.

Sources: transformers' configuration classes (5.23; their defaults stand for absent keys) and the config.json files of
the released models.
"""

import math
from dataclasses import dataclass, field
from typing import Any

from mtp_jax.config import ModelConfig, UserError, key_hints

Fields = dict[str, str]  # their key -> key below our ModelConfig
Values = dict[str, Any]

BASIC: Fields = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
LATENT: Fields = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
GROUPED: Fields = {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
EXPERTS: Fields = {
    "n_routed_experts": "num_experts",
    "first_k_dense_replace": "num_dense_layers",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "expert_dim",
    "n_group": "router.num_groups",
    "topk_group": "router.groups_per_token",
    "routed_scaling_factor": "routed_scaling_factor",
}
RENORMALIZE: Fields = {"norm_topk_prob": "router.renormalize"}

NULLS: Values = {"q_lora_rank": 0, "n_shared_experts": 0, "n_routed_experts": 0, "n_group": 1, "topk_group": 1}
WRITTEN_NULL = ("q_lora_rank",)  # transformers' class refuses null in the others
# Of a model without experts. Nothing is built from these, and loaders that read them all find usable numbers.
NO_EXPERTS: Values = {
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}


@dataclass(frozen=True)
class Layout:
    """config.json of one model_type.

    fields: their keys and ours; mixture: those that count only where there are experts.
    defaults: what an absent key stands for; no entry: the key is required.
    fixed: values a key must have, and absent keys have; written on export. tolerated: the same, not written.
    implied: what the layout itself says of our model.
    rotary_fraction: default of partial_rotary_factor; None: always 1.
    groups_by_method: topk_method says whether n_group and topk_group count.
    always_depth: num_nextn_predict_layers is written even where it is 0.
    heads_divide: transformers refuses a hidden_size that is no multiple of the heads.
    """

    architecture: str
    fields: Fields
    defaults: Values
    implied: Values
    family: str = "deepseek_v3"  # of `CONVENTIONS`
    mixture: Fields = field(default_factory=dict)
    fixed: Values = field(default_factory=dict)
    tolerated: Values = field(default_factory=dict)
    rotary_fraction: float | None = None
    groups_by_method: bool = False
    always_depth: bool = False
    heads_divide: bool = False


SMALL_DEFAULTS: Values = {"rms_norm_eps": 1e-6, "tie_word_embeddings": False}
QWEN_DEFAULTS: Values = SMALL_DEFAULTS | {
    "max_position_embeddings": 32_768,
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": None,
}
LATENT_SIZES: Values = {
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128,
    "v_head_dim": 128,
}
SILU: Values = {"hidden_act": "silu"}
NO_BIAS: Values = SILU | {"attention_bias": False}  # theirs would also stand on the output projection, ours has none
NO_WINDOW: Values = {"use_sliding_window": False}
WINDOW_KEYS = ("sliding_window", "max_window_layers")  # without effect while use_sliding_window is false
SIGMOID: Values = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
EVERY_LAYER: Values = {"moe_layer_freq": 1}
NOT_IN_CLASS: Values = {"use_mrope": False}
HALVES: Values = {"attention": "gqa", "rope.interleaved": False}
DENSE: Values = HALVES | {"num_experts": 0, "rotary_fraction": 1.0}
V3_ROUTER: Values = {"router.score": "sigmoid", "router.group_score": "top2_sum"}
LATENT_NORM: Values = {"attention": "mla", "latent_norm_eps": 1e-6}  # their latent norms take their class's default

LAYOUTS: dict[str, Layout] = {
    "deepseek_v3": Layout(
        architecture="DeepseekV3ForCausalLM",
        fields=BASIC | LATENT | {"rope_interleave": "rope.interleaved"},
        mixture=EXPERTS | RENORMALIZE,
        defaults=SMALL_DEFAULTS
        | LATENT_SIZES
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
        fixed=NO_BIAS | SIGMOID | EVERY_LAYER,
        implied=LATENT_NORM | V3_ROUTER,
        always_depth=True,
    ),
    "deepseek_v2": Layout(
        architecture="DeepseekV2ForCausalLM",
        fields=BASIC | LATENT,
        mixture=EXPERTS,
        defaults=SMALL_DEFAULTS
        | LATENT_SIZES
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
        fixed=NO_BIAS | EVERY_LAYER | {"scoring_func": "softmax", "norm_topk_prob": False},
        tolerated={"mlp_bias": False, "rope_interleave": True},
        implied=LATENT_NORM
        | {
            "rope.interleaved": True,
            "router.score": "softmax",
            "router.group_score": "max",
            "router.renormalize": False,
        },
        groups_by_method=True,
        heads_divide=True,
    ),
    "glm4_moe": Layout(
        architecture="Glm4MoeForCausalLM",
        family="glm4_moe",
        fields=BASIC | GROUPED | {"attention_bias": "qkv_bias", "use_qk_norm": "qk_norm"},
        mixture=EXPERTS | RENORMALIZE,
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
        fixed=SILU,
        tolerated=SIGMOID | EVERY_LAYER,
        implied=HALVES | V3_ROUTER,
        rotary_fraction=0.5,
        always_depth=True,
    ),
    "mimo": Layout(
        architecture="MiMoForCausalLM",
        family="mimo",
        fields=BASIC | GROUPED,
        defaults=QWEN_DEFAULTS,
        fixed=SILU | NO_WINDOW | {"attention_bias": True},
        tolerated=NOT_IN_CLASS,
        implied=DENSE | {"qkv_bias": True, "qk_norm": False},
        always_depth=True,
    ),
    "llama": Layout(
        architecture="LlamaForCausalLM",
        fields=BASIC | GROUPED,
        defaults=SMALL_DEFAULTS
        | {
            "max_position_embeddings": 2048,
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": None,
            "head_dim": None,
        },
        fixed=NO_BIAS | {"mlp_bias": False},
        implied=DENSE | {"qkv_bias": False, "qk_norm": False},
        heads_divide=True,
    ),
    "qwen2": Layout(
        architecture="Qwen2ForCausalLM",
        fields=BASIC | GROUPED,
        defaults=QWEN_DEFAULTS,
        fixed=SILU | NO_WINDOW,
        tolerated=NOT_IN_CLASS | {"attention_bias": True},
        implied=DENSE | {"qkv_bias": True, "qk_norm": False},
    ),
    "qwen3": Layout(
        architecture="Qwen3ForCausalLM",
        fields=BASIC | GROUPED,
        defaults=QWEN_DEFAULTS | {"head_dim": 128},
        fixed=NO_BIAS | NO_WINDOW,
        tolerated=NOT_IN_CLASS,
        implied=DENSE | {"qkv_bias": False, "qk_norm": True},
    ),
}

NOT_HELD = {
    "qwen3_next": "its blocks use gated attention and linear attention",
    "mimo_v2_flash": "its blocks use sliding-window attention with attention sinks",
}

MTP_KEY = "num_nextn_predict_layers"
WIRING_KEY = "mtp_conventions"  # ours alone: what the layout's family does not already say of the MTP modules
ALIASES = {"num_mtp_layers": MTP_KEY, "num_local_experts": "n_routed_experts", "num_experts": "n_routed_experts"}

# Keys of each rope type inside rope_scaling or rope_parameters: theirs and ours.
ROPE_TYPES: dict[str, Fields] = {
    "default": {},
    "linear": {"factor": "rope.linear_factor"},
    "llama3": {
        "factor": "rope.llama3.factor",
        "original_max_position_embeddings": "rope.llama3.original_length",
        "low_freq_factor": "rope.llama3.low_frequency",
        "high_freq_factor": "rope.llama3.high_frequency",
    },
    "yarn": {
        "factor": "rope.yarn.factor",
        "original_max_position_embeddings": "rope.yarn.original_length",
        "beta_fast": "rope.yarn.beta_fast",
        "beta_slow": "rope.yarn.beta_slow",
        "mscale": "rope.yarn.mscale",
        "mscale_all_dim": "rope.yarn.mscale_all_dim",
    },
}

ROPE_COMMON = ("rope_theta", "rope_type", "type", "partial_rotary_factor")
ROPE_FIXED: dict[str, Values] = {"yarn": {"attention_factor": None, "truncate": True}}

# What does not change what the model computes: the files' origin and dtype, training, the tokenizer's ids, and what
# transformers writes for every class (its 4.x also wrote all generation settings).
IGNORED = frozenset(
    """
    model_type architectures auto_map dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash
    _attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation unsloth_fixed
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    use_cache initializer_range attention_dropout pretraining_tp aux_loss_alpha seq_aux router_aux_loss_coef ep_size
    output_router_logits max_position_embeddings gradient_checkpointing
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder finetuning_task id2label label2id num_labels problem_type task_specific_params
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)

KINDS = key_hints(ModelConfig) | {"vocab_size": int}
WORDS = {int: "an integer", float: "a finite number", bool: "true or false", dict: "an object", str: "a string"}


def short(value: Any) -> str:
    """A value as errors show it: one line of bounded length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


def bad(where: str, key: str, value: Any, remedy: str) -> UserError:
    """The error for a value of a file."""
    return UserError(f"{where}: field {key!r}={short(value)} {remedy}")


def typed(where: str, key: str, value: Any, kind: type) -> Any:
    """`value` as `kind` (an integer will do for a float), or a UserError."""
    is_bool = isinstance(value, bool)
    if kind is float and isinstance(value, (int, float)) and not is_bool and math.isfinite(value):
        return float(value)
    if kind is not float and isinstance(value, kind) and is_bool == (kind is bool):
        return value
    raise bad(where, key, value, f"must be {WORDS[kind]}; correct the file")


def without_aliases(hf: Values, layout: Layout, where: str) -> Values:
    """`hf` under the released names alone; UserError where two names of one key disagree."""
    values = dict(hf)
    for alias, key in ALIASES.items():
        if alias not in hf or not (key == MTP_KEY or key in layout.mixture):
            continue
        if key in values and values[key] != hf[alias]:
            raise bad(where, alias, hf[alias], f"contradicts {key!r}={short(values[key])}; remove one of them")
        values[key] = values.pop(alias)
    return values


def check_quantization(value: Any, where: str) -> None:
    """Refuse quantized files other than DeepSeek's fp8 in blocks of 128 x 128."""
    if value is None:
        return
    typed(where, "quantization_config", value, dict)
    for key, wanted in (("quant_method", "fp8"), ("weight_block_size", [128, 128])):
        if value.get(key) != wanted:
            remedy = f"is not supported, only {wanted!r}; give files in bfloat16 or float32"
            raise bad(where, f"quantization_config.{key}", value.get(key), remedy)
