"""The names of released layouts: one table per model_type, ours on the left, theirs on the right, for both directions.

How a weight lies in memory is not said here: a matrix of theirs is [out, in] and flat over heads, and what ours sums
over and produces is declared where the weight is made (`ParamInfo`), so `weights.py` derives the transpose.

Sources: the loaders of the released modelling code (transformers, DeepSeek-V3 and MiMo repositories).
"""

from dataclasses import dataclass, field

Names = dict[str, str]

OUTSIDE_BLOCKS: Names = {
    "embed": "model.embed_tokens.weight",
    "final_norm.scale": "model.norm.weight",
    "unembed": "lm_head.weight",
}
NORMS: Names = {
    "attention_norm.scale": "input_layernorm.weight",
    "ffn_norm.scale": "post_attention_layernorm.weight",
}
LATENT_ATTENTION: Names = {
    "attention.q": "self_attn.q_proj.weight",
    "attention.q_a": "self_attn.q_a_proj.weight",
    "attention.q_a_norm.scale": "self_attn.q_a_layernorm.weight",
    "attention.q_b": "self_attn.q_b_proj.weight",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa.weight",
    "attention.kv_a_norm.scale": "self_attn.kv_a_layernorm.weight",
    "attention.kv_b": "self_attn.kv_b_proj.weight",
    "attention.o": "self_attn.o_proj.weight",
}
GROUPED_ATTENTION: Names = {
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
MIMO_MODULE: Names = {
    "embed_norm.scale": "token_layernorm.weight",
    "hidden_norm.scale": "hidden_layernorm.weight",
    "projection": "input_proj.weight",
    "output_norm.scale": "final_layernorm.weight",
}


@dataclass(frozen=True)
class Layout:
    """How one model_type names its tensors.

    block, expert_block: of a dense block and of one with experts. module: of an MTP module beside its block.
    layer, module_layer: what stands before them; {layer} counts blocks from 0, and MTP modules on from there;
      {depth} counts MTP modules from 0.
    repeated: tensors that an MTP layer holds once more, with the weights of ours they repeat.
    """

    block: Names
    expert_block: Names = field(default_factory=dict)
    module: Names = field(default_factory=lambda: DEEPSEEK_MODULE)
    layer: str = "model.layers.{layer}."
    module_layer: str = "model.layers.{layer}."
    repeated: Names = field(default_factory=dict)


SHARED_AGAIN: Names = {"embed_tokens.weight": "embed", "shared_head.head.weight": "unembed"}
_GROUPED = Layout(block=NORMS | GROUPED_ATTENTION | DENSE)

LAYOUTS: dict[str, Layout] = {
    "deepseek_v3": Layout(
        block=NORMS | LATENT_ATTENTION | DENSE,
        expert_block=NORMS | LATENT_ATTENTION | EXPERTS | ROUTER_BIAS,
        repeated=SHARED_AGAIN,
    ),
    "deepseek_v2": Layout(
        block=NORMS | LATENT_ATTENTION | DENSE,
        expert_block=NORMS | LATENT_ATTENTION | EXPERTS,
        repeated=SHARED_AGAIN,
    ),
    "glm4_moe": Layout(
        block=NORMS | GROUPED_ATTENTION | DENSE,
        expert_block=NORMS | GROUPED_ATTENTION | EXPERTS | ROUTER_BIAS,
        repeated=SHARED_AGAIN,
    ),
    "mimo": Layout(
        block=NORMS | GROUPED_ATTENTION | DENSE, module=MIMO_MODULE, module_layer="model.mtp_layers.{depth}."
    ),
    # These have no MTP layers of their own; ours are kept in DeepSeek's names behind the last layer.
    "llama": _GROUPED,
    "qwen2": _GROUPED,
    "qwen3": _GROUPED,
}

# Buffers that old files carry; they follow from config.json.
DERIVED_SUFFIXES = (".rotary_emb.inv_freq", ".attn.bias", ".masked_bias")
