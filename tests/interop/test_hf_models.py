"""The reference of the parity tests, held against transformers, and its layouts against the published names."""

import json

import numpy as np
import pytest

from tests.interop import hf_models
from tests.interop.hf_models import CASES, tokens_of

WITH_MTP = [name for name, case in CASES.items() if case.depth]


@pytest.fixture(scope="module", autouse=True)
def torch_is_there():
    hf_models.needs_torch()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """References by their arguments, each built once."""
    cache = {}

    def get(name, **how):
        key = (name, *sorted(how.items()))
        if key not in cache:
            cache[key] = hf_models.build(name, tmp_path_factory.mktemp(name), **how)
        return cache[key]

    return get


def main_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens, dtype=torch.long), use_cache=False).logits.numpy()


@pytest.mark.parametrize("ci, outcome", [("true", pytest.fail.Exception), ("", pytest.skip.Exception)])
def test_missing_torch_fails_only_in_ci(monkeypatch, ci, outcome):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(hf_models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(outcome, match="needs torch, transformers, safetensors"):
        hf_models.needs_torch()


# --- what is computed ---


@pytest.mark.parametrize(
    ("name", "style"),
    [
        (name, style)
        for name, case in CASES.items()
        for style in ("new", "released")
        if not case.hf_type and (name, style) != ("mimo_v2_flash_other_lists", "released")  # its class ignores the keys
    ],
)
def test_the_files_are_the_model(built, name, style):
    """transformers reads the folder, in either style of config.json, and computes the reference's values."""
    from transformers import AutoModelForCausalLM

    reference, tokens = built(name, style=style), tokens_of(name)
    model = AutoModelForCausalLM.from_pretrained(reference.folder, attn_implementation="eager", dtype="float32")
    ours = reference.logits(tokens)
    assert ours.shape == (2, 24 - reference.case.depth, 1 + reference.case.depth, 96) and ours.dtype == np.float32
    np.testing.assert_allclose(ours[:, :, 0], main_logits(model, tokens)[:, : ours.shape[1]], atol=1e-5, rtol=0)


@pytest.mark.parametrize("recycled", ["before_norm", "after_norm"])
@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight", "glm4_moe", "glm4_moe_air"])
def test_mtp_is_that_of_transformers(built, name, recycled):
    """transformers' own MTP modules, filled with the published tensors, give the reference's logits.

    They chain the depths after the output norm, as serving engines do: beyond depth 1 the reference agrees with them
    when it does so too, and only then.
    """
    import torch
    from transformers.modeling_layers import MtpModel

    reference, tokens = built(name), tokens_of(name)
    depth, num = reference.case.depth, 24 - reference.case.depth
    mtp = MtpModel(reference.model, depth).eval()
    for k, layer in enumerate(mtp.layers, start=1):
        prefix = hf_models._mtp_prefix(reference.case, k)
        own = {n.removeprefix(prefix): t for n, t in reference.tensors.items() if n.startswith(prefix)}
        outside = {n: own.pop(f"{n}.weight") for n in ("enorm", "hnorm", "eh_proj")}
        outside["post_norm"] = own.pop("shared_head.norm.weight")
        del own["embed_tokens.weight"], own["shared_head.head.weight"]
        state = {f"{n}.weight": t for n, t in outside.items()}
        layer.load_state_dict(state | {f"mtp_block.{n}": t for n, t in hf_models._fused(own).items()})
    ids = torch.tensor(tokens, dtype=torch.long)
    ours = reference.logits(tokens, recycled=recycled)
    with torch.no_grad():
        hidden = reference.model.model(ids, use_cache=False).last_hidden_state[:, :num]
        for k in range(1, depth + 1):
            # Their positions are those of the tokens read, i + k, and ours i: rotary attention sees differences only.
            positions = torch.arange(k, k + num)[None]
            hidden = mtp.forward_layer(k - 1, hidden, positions, None, input_ids=ids[:, k : k + num])
            theirs = reference.model.lm_head(hidden).numpy()
            difference = np.abs(ours[:, :, k] - theirs).max()
            if k == 1 or recycled == "after_norm":
                assert difference < 1e-5
            else:
                assert difference > 0.1


@pytest.mark.parametrize("name", WITH_MTP)
def test_mistakes_show(built, name):
    """Swapped halves and a missing output norm change the extra depths by far more than any tolerance."""
    reference, tokens = built(name), tokens_of(name)
    right = reference.logits(tokens)
    for mistake in (dict(swap_halves=True), dict(output_norm=False)):
        wrong = reference.logits(tokens, **mistake)
        np.testing.assert_array_equal(wrong[:, :, 0], right[:, :, 0])
        for k in range(1, 1 + reference.case.depth):
            assert np.abs(wrong[:, :, k] - right[:, :, k]).max() > 0.3, (mistake, k)


@pytest.mark.parametrize("name", WITH_MTP)
def test_depth_k_reads_its_own_token(built, name):
    """Changing token j moves depth k from position j - k on, and nothing before it."""
    reference, tokens = built(name), tokens_of(name)
    before, j = reference.logits(tokens), 12
    tokens[:, j] = (tokens[:, j] + 1) % 96
    moved = np.abs(reference.logits(tokens) - before).max((0, 3)) > 1e-3  # [i, k]
    for k in range(1 + reference.case.depth):
        assert not moved[: j - k, k].any() and moved[j - k, k]


def test_greedy_continues_the_prompt(built):
    reference, prompt = built("llama"), tokens_of("llama")[0, :8]
    ids = reference.greedy(prompt, 4)
    text = np.concatenate([prompt, ids])
    choice = reference.logits(text[None])[0, :, 0].argmax(-1)
    assert len(ids) == 4 and (choice[7:11] == ids).all()


# --- every feature of a case matters: switched off, the logits change ---


def plain_rope(case):
    rope = case.config["rope_parameters"]
    return {k: v for k, v in rope.items() if k in ("rope_theta", "partial_rotary_factor")} | {"rope_type": "default"}


def rope_with(case, **changes):
    return {"rope_parameters": case.config["rope_parameters"] | changes}


def swapped(ropes):
    return dict(zip(ropes, reversed(ropes.values()), strict=True))


CONFIG_SWITCHES = {
    "rope": lambda case: {"rope_parameters": plain_rope(case)},
    "mscale": lambda case: rope_with(case, mscale=1.0),
    "mscale_all_dim": lambda case: rope_with(case, mscale_all_dim=0.5, mscale=0.5),
    "groups": lambda case: {"n_group": 1, "topk_group": 1},
    "interleave": lambda case: {"rope_interleave": False},
    "scaling": lambda case: {"routed_scaling_factor": 1.0},
    "renormalize": lambda case: {"norm_topk_prob": False},
    "norm_eps": lambda case: {"rms_norm_eps": 1e-6},
    "theta": lambda case: rope_with(case, rope_theta=10_000.0),
    "truncate": lambda case: rope_with(case, truncate=True),
    "limit": lambda case: {"swiglu_limit": 100.0},
    "alpha": lambda case: {"swiglu_alpha": 1.0},
    "value_scale": lambda case: {"attention_value_scale": 1.0},
    "thetas": lambda case: {"rope_parameters": swapped(case.config["rope_parameters"])},
    "window": lambda case: {"sliding_window": 64},
    "rotary": lambda case: rope_with(case, partial_rotary_factor=1.0),
}
# suffix of the modules, attribute, new value
MODEL_SWITCHES = {
    "router_bias": ((".gate", "moe_statics"), "e_score_correction_bias", 0.0),
    "latent_eps": ("_a_layernorm", "variance_epsilon", 1e-5),
    "qk_norm": (("q_norm", "k_norm"), "weight", 1.0),
    "bias": (("q_proj", "k_proj", "v_proj"), "bias", 0.0),
    "all_bias": (("o_proj",), "bias", 0.0),
    "sinks": (("self_attn",), "sinks", -1e4),
    "router_logits": ((".router",), "bias", 0.0),
    "expert_bias": ((".experts",), "down_proj_bias", 0.0),
}


def switched_off(model, feature):
    suffix, attribute, value = MODEL_SWITCHES[feature]
    modules = [m for n, m in model.named_modules() if n.endswith(suffix) and getattr(m, attribute, None) is not None]
    assert modules
    for module in modules:
        if attribute == "variance_epsilon":
            module.variance_epsilon = value
        else:
            getattr(module, attribute).fill_(value)


@pytest.mark.parametrize("name, feature", [(n, f) for n, case in CASES.items() for f in case.features])
def test_each_feature_matters(built, name, feature):
    reference, tokens = built(name), tokens_of(name)
    if feature in CONFIG_SWITCHES:
        config = CONFIG_SWITCHES[feature](reference.case)
        without = reference.changed_logits(tokens, config=config)
    else:
        without = reference.changed_logits(tokens, edit=lambda model: switched_off(model, feature))
    num = 24 - reference.case.depth
    assert np.abs(without[:, :num] - reference.logits(tokens)[:, :, 0]).max() > 4e-4  # parity holds to 2e-5


def test_changed_logits_of_nothing(built):
    reference, tokens = built("deepseek_v3"), tokens_of("deepseek_v3")
    same = reference.changed_logits(tokens)[:, :23]
    np.testing.assert_array_equal(same, reference.logits(tokens)[:, :, 0])


# --- what is in the files ---

MLA = "kv_a_proj_with_mqa.weight kv_a_layernorm.weight kv_b_proj.weight o_proj.weight"
Q_LORA = "q_a_proj.weight q_a_layernorm.weight q_b_proj.weight"
QKV = "q_proj.weight k_proj.weight v_proj.weight"
QKV_BIAS = "q_proj.bias k_proj.bias v_proj.bias"
QK_NORM = "q_norm.weight k_norm.weight"
ATTENTION = {
    "deepseek_v3": f"{MLA} {Q_LORA}",
    "moonlight": f"{MLA} q_proj.weight",
    "deepseek_v3_next_token": f"{MLA} {Q_LORA}",
    "deepseek_v2": f"{MLA} {Q_LORA}",
    "deepseek_v2_lite": f"{MLA} q_proj.weight",
    "kimi_k2": f"{MLA} {Q_LORA}",
    "glm4_moe": f"{QKV} o_proj.weight {QKV_BIAS} {QK_NORM}",
    "glm4_moe_air": f"{QKV} o_proj.weight",
    "mimo": f"{QKV} o_proj.weight {QKV_BIAS}",
    "llama": f"{QKV} o_proj.weight",
    "llama3_tied": f"{QKV} o_proj.weight",
    "llama_linear": f"{QKV} o_proj.weight",
    "mistral": f"{QKV} o_proj.weight",
    "mistral_wide_window": f"{QKV} o_proj.weight",
    "ministral": f"{QKV} o_proj.weight",
    "mistral_window": f"{QKV} o_proj.weight",
    "qwen2_window": f"{QKV} o_proj.weight {QKV_BIAS}",
    "qwen3_window": f"{QKV} o_proj.weight {QK_NORM}",
    "qwen2_tied": f"{QKV} o_proj.weight {QKV_BIAS}",
    "gpt_oss": f"{QKV} o_proj.weight {QKV_BIAS} o_proj.bias sinks",
    "mimo_v2_flash": f"{QKV} o_proj.weight",
    "mimo_v2_flash_other_lists": f"{QKV} o_proj.weight",
    "gpt_oss_other_types": f"{QKV} o_proj.weight sinks",
    "qwen3": f"{QKV} o_proj.weight {QK_NORM}",
    "ernie4_5_moe": f"{QKV} o_proj.weight",
    "ernie4_5_moe_untied": f"{QKV} o_proj.weight",
    "qwen3_moe": f"{QKV} o_proj.weight {QK_NORM}",
    "qwen3_moe_plain_gates": f"{QKV} o_proj.weight {QK_NORM}",
}
SWIGLU = ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]


def block_names(name, is_moe):
    names = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    names |= {f"self_attn.{n}" for n in ATTENTION[name].split()}
    if name.startswith("gpt_oss"):
        stacked = {f"experts.{n}_proj{end}" for n in ("gate_up", "down") for end in ("", "_bias")}
        return names | {f"mlp.{n}" for n in (*stacked, "router.weight", "router.bias")}
    if not is_moe:
        return names | {f"mlp.{n}" for n in SWIGLU}
    names |= {f"mlp.experts.{e}.{n}" for e in range(8) for n in SWIGLU}
    names.add("mlp.gate.weight")
    if not name.startswith(("qwen3", "mimo_v2")):
        names |= {f"mlp.shared_experts.{n}" for n in SWIGLU}
    has_bias = not name.startswith(("deepseek_v2", "qwen3"))
    bias = "mlp.moe_statics" if name.startswith("ernie") else "mlp.gate"
    return names | ({f"{bias}.e_score_correction_bias"} if has_bias else set())


def case_types(case):
    """The kinds of attention of MiMo-V2-Flash's layers: the first and every sixth see everything."""
    sixths = ["full_attention" if i in (0, 5) else "sliding_attention" for i in range(7)]
    return case.config.get("layer_types", sixths)


def published_names(name):
    case = CASES[name]
    layers, dense = case.config["num_hidden_layers"], case.config.get("first_k_dense_replace", 99)
    dense = case.config.get("mlp_layer_types", ["dense"]).count("dense") if name.startswith("mimo_v2") else dense
    dense = 0 if case.model_type == "qwen3_moe" else case.config.get("moe_layer_start_index", dense)
    names = {"model.embed_tokens.weight", "model.norm.weight"}
    if not case.config.get("tie_word_embeddings"):
        names.add("lm_head.weight")
    for i in range(layers):
        names |= {f"model.layers.{i}.{n}" for n in block_names(name, i >= dense)}
        if name.startswith("mimo_v2") and case_types(case)[i] == "sliding_attention":
            names.add(f"model.layers.{i}.self_attn.attention_sink_bias")
    for k in range(case.depth):
        if name == "mimo":
            extras = "token_layernorm hidden_layernorm input_proj final_layernorm"
            prefix = f"model.mtp_layers.{k}."
        elif name.startswith("mimo_v2"):
            extras = "enorm hnorm eh_proj final_layernorm pre_mlp_layernorm"
            prefix = f"model.mtp.layers.{k}."
        else:
            extras = "enorm hnorm eh_proj shared_head.norm shared_head.head embed_tokens"
            prefix = f"model.layers.{layers + k}."
        names |= {f"{prefix}{n}.weight" for n in extras.split()}
        if name.startswith("mimo_v2"):
            block = block_names(name, False) - {"post_attention_layernorm.weight"} | {"self_attn.attention_sink_bias"}
            names |= {prefix + n for n in block}
        else:
            names |= {prefix + n for n in block_names(name, dense < 99)}
    return names


@pytest.mark.parametrize("name", CASES)
def test_names_are_the_published_ones(built, name):
    from safetensors.torch import load_file

    reference = built(name)
    tensors = load_file(reference.folder / "model.safetensors")
    assert set(tensors) == published_names(name)
    assert all((tensors[n] == t).all() for n, t in reference.tensors.items())
    assert not list(reference.folder.glob("*.index.json"))


@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight", "glm4_moe"])
def test_embedding_and_head_are_repeated(built, name):
    reference = built(name)
    for k in range(1, 1 + reference.case.depth):
        prefix = hf_models._mtp_prefix(reference.case, k)
        for copy, original in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
            assert (reference.tensors[f"{prefix}{copy}.weight"] == reference.tensors[f"{original}.weight"]).all()


def test_shards_hold_the_same_tensors(built):
    from safetensors.torch import load_file

    whole, parts = built("deepseek_v3"), built("deepseek_v3", shards=3)
    weight_map = json.loads((parts.folder / "model.safetensors.index.json").read_text())["weight_map"]
    files = {f.name: load_file(f) for f in parts.folder.glob("*.safetensors")}
    assert len(files) == 3 and set(weight_map) == set(whole.tensors) == set().union(*files.values())
    assert all((files[file][n] == whole.tensors[n]).all() for n, file in weight_map.items())


def test_bfloat16_files(built):
    """All rounded but the correction bias, and the reference computes with what the files hold."""
    import torch

    reference, exact = built("deepseek_v3", dtype="bfloat16"), built("deepseek_v3")
    for name, tensor in reference.tensors.items():
        assert tensor.dtype == (torch.float32 if "e_score" in name else torch.bfloat16)
        assert (tensor == exact.tensors[name].to(tensor.dtype)).all()
    weight = reference.tensors["lm_head.weight"].float()
    assert (reference.model.lm_head.weight == weight).all()
    tokens = tokens_of("deepseek_v3")
    difference = np.abs(reference.logits(tokens) - exact.logits(tokens)).max()
    assert difference > 1e-3


def test_config_files(built):
    config = built("deepseek_v3", style="released").config
    assert "rope_parameters" not in config and config["rope_theta"] == 10_000.0
    assert config["rope_scaling"]["type"] == "yarn" and config["num_nextn_predict_layers"] == 1
    assert built("moonlight", style="released").config["rope_scaling"] is None
    assert built("deepseek_v3_next_token").config["num_nextn_predict_layers"] == 0
    config = built("mimo").config
    assert (config["model_type"], config["architectures"]) == ("mimo", ["MiMoForCausalLM"])
