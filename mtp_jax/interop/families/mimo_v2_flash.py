"""MiMo-V2-Flash: windows with attention sinks in five of six layers, a sigmoid router, dense MTP modules.

Layers with a window have more key/value heads and another rotary base than the others. The head dims of values and keys
differ. The MTP modules are dense blocks with a window, in a separate list.

Sources: transformers' mimo_v2_flash and its conversion of names; config.json of the released model, whose keys have
other names than those of transformers' class; serving engines for the MTP modules. Both sets of keys are written.
"""

from mtp_jax.config import ModelConfig
from mtp_jax.interop.families import common
from mtp_jax.interop.families.common import Values

_ATTENTION = common.GROUPED_ATTENTION | {"attention.sinks": "self_attn.attention_sink_bias"}
_FEED_FORWARD = ("dense", "sparse")
_MOST_LAYERS = 4096


def _derived(model: ModelConfig) -> Values:
    """Keys that follow from other fields: the per-layer lists under both sets of names, and the file's own names."""
    types = common.layer_types(model)
    is_local = [kind == common.LAYER_TYPES[True] for kind in types["layer_types"]]
    is_moe = [layer >= model.num_dense_layers for layer in range(model.num_layers)]
    value_dim = model.value_head_dim or model.head_dim
    out = types | {
        "hybrid_layer_pattern": [int(here) for here in is_local],
        "mlp_layer_types": [_FEED_FORWARD[here] for here in is_moe],
        "moe_layer_freq": [int(here) for here in is_moe],
        "layernorm_epsilon": model.norm_eps,
        "swa_num_attention_heads": model.num_heads,
        "swa_num_key_value_heads": 2 * model.num_kv_heads,
        "swa_head_dim": model.head_dim,
        "swa_v_head_dim": value_dim,
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
    }
    window = {"sliding_window_size": model.local.window - 1, "attention_chunk_size": model.local.window - 1}
    return out | (window if any(is_local) else {})


def _own_names(values: Values) -> Values:
    """Returns the released file's keys under transformers' names if those are absent; values are checked later."""
    out = dict(values)
    num_layers = out.get("num_hidden_layers", MIMO_V2_FLASH.defaults["num_hidden_layers"])
    layers = range(num_layers if isinstance(num_layers, int) and num_layers <= _MOST_LAYERS else 0)
    pattern = out.get("hybrid_layer_pattern")
    is_local = pattern if isinstance(pattern, list) else [0 < i and (i + 1) % 6 > 0 for i in layers]
    out.setdefault("layer_types", [common.LAYER_TYPES[bool(here)] for here in is_local])
    frequency, types = out.get("moe_layer_freq"), out.get("mlp_layer_types")
    is_moe = frequency if isinstance(frequency, list) else [i > 0 for i in layers]
    is_moe = [kind == _FEED_FORWARD[True] for kind in types] if isinstance(types, list) else is_moe
    out["first_k_dense_replace"] = next((i for i, here in enumerate(is_moe) if here), len(is_moe))
    if "layernorm_epsilon" in out:
        out.setdefault("rms_norm_eps", out["layernorm_epsilon"])
    if isinstance(out.get("sliding_window_size"), int):  # number of keys before the query
        out["sliding_window"] = out["sliding_window_size"] + 1
    return out


MIMO_V2_FLASH = common.Family(
    model_type="mimo_v2_flash",
    architecture="MiMoV2FlashForCausalLM",
    conventions="mimo_v2_flash",
    block=_ATTENTION | common.DENSE,
    expert_block=_ATTENTION | common.EXPERTS | common.ROUTER_BIAS,
    module={
        "embed_norm.scale": "enorm.weight",
        "hidden_norm.scale": "hnorm.weight",
        "projection": "eh_proj.weight",
        "output_norm.scale": "final_layernorm.weight",
    },
    module_block=_ATTENTION | common.DENSE | {"ffn_norm.scale": "pre_mlp_layernorm.weight"},
    module_layer="model.mtp.layers.{depth}.",
    modules=lambda model: {"window": model.local.window, "dense_ffn": True},
    fields=common.BASIC
    | common.GROUPED
    | {
        "v_head_dim": "value_head_dim",
        "attention_value_scale": "value_scale",
        "attention_bias": "qkv_bias",
    },
    mixture={key: ours for key, ours in common.ROUTED.items() if ours != "num_shared_experts"} | common.RENORMALIZE,
    defaults={
        "max_position_embeddings": 131_072,
        "vocab_size": 152_576,
        "hidden_size": 4096,
        "intermediate_size": 16_384,
        "num_hidden_layers": 48,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 192,
        "v_head_dim": 128,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "attention_value_scale": 0.707,
        "sliding_window": 129,
        "moe_intermediate_size": 2048,
        "num_experts_per_tok": 8,
        "n_routed_experts": 256,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "rope_theta": 5_000_000.0,
    },
    fixed=common.SILU,
    tolerated=common.SIGMOID | {"mlp_bias": False, "use_qk_norm": False, "hidden_dropout": 0.0, "n_shared_experts": 0},
    own_names=_own_names,
    internal=("first_k_dense_replace",),
    window="typed",
    rotary_fraction=0.334,
    local_rope_theta=10_000.0,
    derived=_derived,
    writes_derived=True,
    always_depth=True,
    implied=common.HALVES
    | common.V3_ROUTER
    | {
        "qk_norm": False,
        "sinks": False,
        "local.sinks": True,
        "local.num_kv_heads": lambda model: 2 * model.num_kv_heads,
        "num_shared_experts": 0,
        "rope.linear_factor": 1.0,
        "rope.llama3.factor": 1.0,
        "rope.yarn.factor": 1.0,
    },
)
