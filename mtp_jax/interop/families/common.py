"""Description of a released layout, and the tables that several families share.

Tensor names: ours on the left, the layout's on the right, used in both directions. The memory layout of a weight is not
stated here: a matrix in the files is [out, in] with heads flattened, and the dims that our weight contracts and
produces are declared where the weight is made (`ParamInfo`), so `weights.py` derives the transpose.

Fields of config.json: the layout's key on the left, our field below `ModelConfig` on the right.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from mtp_jax.config import ModelConfig
from mtp_jax.layers.spec import layer_specs

Names = dict[str, str]
Values = dict[str, Any]

# --- tensor names -----------------------------------------------------------------------------------------------------

OUTSIDE_BLOCKS: Names = {
    "embed": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembed": "lm_head.weight",
}
_NORMS: Names = {
    "attention_norm.scale": "input_layernorm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
}
LATENT_ATTENTION: Names = _NORMS | {
    "attention.q": "self_attn.q_proj.weight",
    "attention.q_a": "self_attn.q_a_proj.weight",
    "attention.q_a_norm.scale": "self_attn.q_a_layernorm.weight",
    "attention.q_b": "self_attn.q_b_proj.weight",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.scale": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": "self_attn.kv_b_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
}
GROUPED_ATTENTION: Names = _NORMS | {
    "attention.q": "self_attn.q_proj.weight",
    "attention.q_bias": "self_attn.q_proj.bias",
    "attention.q_norm.scale": "self_attn.q_norm.weight",
    "attention.k": "self_attn.k_proj.weight",
    "attention.k_bias": "self_attn.k_proj.bias",
    "attention.k_norm.scale": "self_attn.k_norm.weight",
    "attention.v": "self_attn.v_proj.weight",
    "attention.v_bias": "self_attn.v_proj.bias",
    "attention.o": "self_attn.o_proj.weight",
}
DENSE: Names = {
    "ffn.gate": "mlp.gate_proj.weight",
    "ffn.up": "mlp.up_proj.weight",
    "ffn.down": "mlp.down_proj.weight",
}
EXPERTS: Names = {
    "ffn.router.weight": "mlp.gate.weight",
    "ffn.gate": "mlp.experts.{expert}.gate_proj.weight",
    "ffn.up": "mlp.experts.{expert}.up_proj.weight",
    "ffn.down": "mlp.experts.{expert}.down_proj.weight",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj.weight",
    "ffn.shared.up": "mlp.shared_experts.up_proj.weight",
    "ffn.shared.down": "mlp.shared_experts.down_proj.weight",
}
ROUTER_BIAS: Names = {"ffn.router.bias": "mlp.gate.e_score_correction_bias"}
DEEPSEEK_MODULE: Names = {
    "embed_norm.scale": "enorm.weight",
    "hidden_norm.scale": "hnorm.weight",
    "projection": "eh_proj.weight",
    "output_norm.scale": "shared_head.norm.weight",
}
REPEATED: Names = {"embed_tokens.weight": "embed", "shared_head.head.weight": "unembed"}

# --- config.json ------------------------------------------------------------------------------------------------------

BASIC: Names = {
    "vocab_size": "vocab_size",
    "hidden_size": "embed_dim",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "intermediate_size": "ffn_dim",
    "rms_norm_eps": "norm_eps",
    "tie_word_embeddings": "tie_embeddings",
}
LATENT: Names = {
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
GROUPED: Names = {"num_key_value_heads": "num_kv_heads", "head_dim": "head_dim"}
ROUTED: Names = {
    "n_routed_experts": "num_experts",
    "first_k_dense_replace": "num_dense_layers",
    "num_experts_per_tok": "num_experts_per_token",
    "n_shared_experts": "num_shared_experts",
    "moe_intermediate_size": "expert_dim",
    "n_group": "router.num_groups",
    "topk_group": "router.groups_per_token",
    "routed_scaling_factor": "routed_scaling_factor",
}
RENORMALIZE: Names = {"norm_topk_prob": "router.renormalize"}
# Written for a model without experts. Nothing is built from them; loaders that read them all find usable numbers.
NO_EXPERTS: Values = {
    "n_routed_experts": 1,
    "num_experts_per_tok": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
}

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
NO_BIAS: Values = SILU | {"attention_bias": False}  # true would also add one to the output projection
NO_WINDOW: Values = {"use_sliding_window": False}
WINDOW_KEYS = ("sliding_window", "max_window_layers")  # no effect while use_sliding_window is false
WINDOW_DEFAULTS: Values = {"sliding_window": 4096, "max_window_layers": 28}
LAYER_TYPES = ("full_attention", "sliding_attention")
SIGMOID: Values = {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
EVERY_LAYER: Values = {"moe_layer_freq": 1}
NOT_IN_CLASS: Values = {"use_mrope": False}

# Keys that do not change what the model computes: origin and dtype of the files, training, token ids of the tokenizer,
# and keys that transformers writes for every class (4.x also wrote all generation settings).
IGNORED = frozenset(
    """
    model_type architectures auto_map dtype torch_dtype transformers_version _name_or_path name_or_path _commit_hash
    _attn_implementation attn_implementation _attn_implementation_autoset _experts_implementation unsloth_fixed
    bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id tokenizer_class prefix
    use_cache initializer_range attention_dropout pretraining_tp aux_loss_alpha seq_aux router_aux_loss_coef ep_size
    output_router_logits max_position_embeddings gradient_checkpointing moe_capacity
    return_dict output_hidden_states output_attentions torchscript use_bfloat16 tf_legacy_loss pruned_heads
    chunk_size_feed_forward is_encoder_decoder is_decoder cross_attention_hidden_size add_cross_attention
    tie_encoder_decoder finetuning_task id2label label2id num_labels problem_type task_specific_params
    max_length min_length do_sample early_stopping num_beams num_beam_groups diversity_penalty temperature top_k top_p
    typical_p repetition_penalty length_penalty no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids
    num_return_sequences output_scores return_dict_in_generate forced_bos_token_id forced_eos_token_id
    remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens
    """.split()
)

LATENT_NORM: Values = {"attention": "mla", "latent_norm_eps": 1e-6}  # latent norms take the default of their class
HALVES: Values = {"attention": "gqa", "rope.interleaved": False}
NO_MIXTURE: Values = HALVES | {"num_experts": 0, "rotary_fraction": 1.0}
UNGROUPED: Values = {"router.num_groups": 1, "router.groups_per_token": 1, "routed_scaling_factor": 1.0}
V3_ROUTER: Values = {"router.score": "sigmoid", "router.group_score": "top2_sum"}


def layer_types(model: ModelConfig) -> Values:
    """Keys of config.json that follow from other fields."""
    specs = layer_specs(model, model.num_layers)
    return {"layer_types": [LAYER_TYPES[spec.attention.window > 0] for spec in specs]}


def latent_sizes(model: ModelConfig) -> Values:
    """Keys that follow from other fields with latent attention; head_dim is written as in transformers."""
    return layer_types(model) | {
        "num_key_value_heads": model.num_heads,
        "head_dim": model.qk_rope_head_dim,
        "qk_head_dim": model.qk_nope_head_dim + model.qk_rope_head_dim,
    }


@dataclass(frozen=True)
class Family:
    """One released layout: the names of its tensors, and the contents of its config.json.

    model_type: of config.json; the key in the registry. architecture: class in transformers.
    accepts: other model_types that `--family` of this name accepts.
    conventions: preset of `mtp_jax.config.CONVENTIONS` that its MTP modules follow.

    Tensors:
      block, expert_block: names of a dense block and of one with experts. module: of an MTP module outside its block.
      module_block: names of an MTP module's block; None: as those of the main model.
      layer, module_layer: prefix of those names; {layer} counts blocks from 0 and continues with the MTP modules;
        {depth} counts MTP modules from 0.
      row_vectors: our weights that are vectors and stored as [1, n].
      stacked: weights of the experts that are stored in one tensor per layer, in the order of our dims, as every n-th
        element of its last dim starting at first: (first, n). mxfp4 files have {name}_blocks and {name}_scales instead.
      repeated: tensors of an MTP layer that repeat weights of the main model -> our names of those weights.
      left_out: prefixes of tensors that mtp_jax does not support and does not load; left_out_because: the reason.
      ignored_layers: indices of the MTP layers that transformers ignores on loading.

    config.json:
      fields: the layout's keys -> our fields; mixture: those that apply only if there are experts.
      defaults: meaning of an absent key; a key without an entry is required.
      fixed: required values of keys, also the meaning of absent keys; written on export. tolerated: the same, but not
        written.
      implied: values of our model that follow from the layout, or functions of the model that return one; fields in no
        table have our default.
      modules: fields of MTPConfig that follow from the layout, as a function of the model.
      derived: keys that follow from the model, checked if a file has them. unset: values of these that mean absent.
      no_experts: written for a model without experts, besides num_dense_layers; None: the layout cannot represent one.
      writes_derived: derived keys are also written to a new file.
      own_names: function from a released file's keys to those of these tables, if files and transformers' class differ.
      internal: keys that own_names adds for these tables; they are not in files.
      rotary_fraction: default of partial_rotary_factor; None: always 1.
      local_rope_theta: default of the rotary base of layers with windows; None: that of the other layers. If set,
        rope_parameters has a section for each of LAYER_TYPES, and swa_rope_theta is next to rope_theta.
      window: layers to which `sliding_window` applies: "every" layer, the "last" ones if use_sliding_window is true, or
        those "typed" sliding_attention in layer_types; empty: the layout has no windows.
      default_pattern: `local.pattern` if layer_types is absent.
      groups_by_method: topk_method determines whether n_group and topk_group apply.
      always_depth: num_nextn_predict_layers is written even if it is 0.
      heads_divide: transformers refuses a hidden_size that is not a multiple of the number of heads.
    """

    model_type: str
    architecture: str
    fields: Names
    defaults: Values
    implied: Values
    accepts: tuple[str, ...] = ()
    conventions: str = "deepseek_v3"
    block: Names = field(default_factory=lambda: GROUPED_ATTENTION | DENSE)
    expert_block: Names = field(default_factory=dict)
    module: Names = field(default_factory=lambda: DEEPSEEK_MODULE)
    module_block: Names | None = None
    layer: str = "model.layers.{layer}."
    module_layer: str = "model.layers.{layer}."
    row_vectors: tuple[str, ...] = ()
    stacked: dict[str, tuple[int, int]] = field(default_factory=dict)
    repeated: Names = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    left_out_because: str = ""
    ignored_layers: tuple[int, ...] = ()
    mixture: Names = field(default_factory=dict)
    fixed: Values = field(default_factory=dict)
    tolerated: Values = field(default_factory=dict)
    modules: Callable[[ModelConfig], Values] = lambda model: {}
    derived: Callable[[ModelConfig], Values] = layer_types
    unset: Values = field(default_factory=dict)
    no_experts: Values | None = None
    writes_derived: bool = False
    own_names: Callable[[Values], Values] = lambda values: values
    internal: tuple[str, ...] = ()
    rotary_fraction: float | None = None
    local_rope_theta: float | None = None
    window: str = ""
    default_pattern: str = "L"
    groups_by_method: bool = False
    always_depth: bool = False
    heads_divide: bool = False

    @property
    def keys(self) -> Names:
        """Our fields -> the layout's keys."""
        return {ours: theirs for theirs, ours in (self.fields | self.mixture).items()}

    @property
    def has_router_bias(self) -> bool:
        """True if a tensor of the layout stores the router's correction bias."""
        return "ffn.router.bias" in self.expert_block
