"""Small random models in the layouts of released checkpoints, and what they compute, by torch and transformers.

The main model is transformers' own. The multi-token prediction modules are written here from the published tensors and
the definition (DeepSeek-V3, 2412.19437, eqs. 21-25, as its weights are served), without a line of mtp_jax: an oracle
that shares a mistake with the code under test finds nothing. torch and transformers are imported inside functions, so
that the tests can be collected where they are missing.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib
from dataclasses import dataclass, field

import numpy as np
import pytest


@dataclass(frozen=True)
class Case:
    """One architecture: transformers' configuration of it and what is special about it."""

    model_type: str  # as in config.json
    config: dict  # what transformers' configuration class takes
    depth: int = 0  # multi-token prediction modules
    features: tuple[str, ...] = ()  # switched off one by one in test_hf_models.py: each must change the logits
    hf_type: str = ""  # transformers' model type where it has no class of this one's name


# No two sizes are equal where they need not be: a transposed or swapped matrix then does not fit.
COMMON = dict(
    vocab_size=96,
    hidden_size=48,
    intermediate_size=80,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=128,
)
LATENT = dict(num_key_value_heads=4, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=16, v_head_dim=10)
EXPERTS = dict(
    n_routed_experts=8, n_shared_experts=2, num_experts_per_tok=3, moe_intermediate_size=24, first_k_dense_replace=1
)
GROUPS = dict(n_group=4, topk_group=2)
NO_GROUPS = dict(n_group=1, topk_group=1)


def _rope(kind="default", theta=10_000.0, **parameters):
    return dict(rope_type=kind, rope_theta=theta, **parameters)


# The original length is short enough for the ramp of YaRN to lie inside a rotary dimension of 16. Released V3 files
# have mscale = mscale_all_dim, which makes the factor on cos and sin 1; here they differ, so that it is seen.
YARN_V3 = _rope("yarn", factor=8.0, original_max_position_embeddings=256, beta_fast=32, beta_slow=1, mscale=0.8)
YARN_V3 |= dict(mscale_all_dim=1.0)
YARN_V2 = _rope("yarn", factor=4.0, original_max_position_embeddings=256, beta_fast=32, beta_slow=1, mscale=0.707)
YARN_V2 |= dict(mscale_all_dim=0.707)
YARN_K2 = YARN_V3 | dict(beta_fast=1.0, beta_slow=1.0, mscale=1.0)
# Wavelengths of a head of 16: 6, 20, 63, 199, ... on both sides of 64 / 4 and 64 / 1.
LLAMA3 = _rope("llama3", factor=8.0, original_max_position_embeddings=64, low_freq_factor=1.0, high_freq_factor=4.0)

GLM = COMMON | EXPERTS | NO_GROUPS
GLM |= dict(n_shared_experts=1, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5, norm_topk_prob=True)

CASES: dict[str, Case] = {
    "deepseek_v3": Case(
        "deepseek_v3",
        COMMON | LATENT | EXPERTS | GROUPS | dict(q_lora_rank=28, rope_parameters=YARN_V3, routed_scaling_factor=2.5),
        depth=1,
        features=("rope", "mscale", "mscale_all_dim", "router_bias", "groups", "interleave", "scaling", "renormalize"),
    ),
    "moonlight": Case(
        "deepseek_v3",
        COMMON
        | LATENT
        | EXPERTS
        | NO_GROUPS
        | dict(q_lora_rank=None, rms_norm_eps=1e-5, rope_parameters=_rope(theta=50_000.0), num_experts_per_tok=2)
        | dict(num_hidden_layers=4, routed_scaling_factor=2.446),
        depth=2,
        features=("norm_eps", "latent_eps", "router_bias", "theta"),
    ),
    "deepseek_v3_next_token": Case(
        "deepseek_v3",
        COMMON | LATENT | EXPERTS | NO_GROUPS | dict(q_lora_rank=28, rope_parameters=_rope(), first_k_dense_replace=2),
        features=("latent_eps", "router_bias"),
    ),
    "deepseek_v2": Case(
        "deepseek_v2",
        COMMON
        | LATENT
        | EXPERTS
        | GROUPS
        | dict(q_lora_rank=28, topk_method="group_limited_greedy", rope_parameters=YARN_V2, routed_scaling_factor=2.0),
        features=("rope", "mscale_all_dim", "groups", "scaling"),
    ),
    "deepseek_v2_lite": Case(
        "deepseek_v2",
        COMMON | LATENT | EXPERTS | NO_GROUPS | dict(q_lora_rank=None, topk_method="greedy", rope_parameters=_rope()),
        features=("latent_eps",),
    ),
    "kimi_k2": Case(
        "kimi_k2",
        COMMON
        | LATENT
        | EXPERTS
        | NO_GROUPS
        | dict(q_lora_rank=28, rope_parameters=YARN_K2, routed_scaling_factor=2.827, n_shared_experts=1),
        features=("rope", "router_bias", "scaling", "renormalize"),
        hf_type="deepseek_v3",
    ),
    "glm4_moe": Case(
        "glm4_moe",
        GLM
        | dict(rope_parameters=_rope(theta=50_000.0, partial_rotary_factor=0.5), attention_bias=True, use_qk_norm=True)
        | dict(routed_scaling_factor=2.5),
        depth=1,
        features=("norm_eps", "router_bias", "rotary", "theta", "qk_norm", "bias"),
    ),
    "glm4_moe_air": Case(
        "glm4_moe",
        GLM | dict(rope_parameters=_rope(partial_rotary_factor=0.5), num_experts_per_tok=2),
        depth=1,
        features=("router_bias", "rotary"),
    ),
    "mimo": Case(
        "mimo",
        COMMON | dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=_rope(theta=640_000.0)),
        depth=1,
        features=("norm_eps", "theta", "bias"),
        hf_type="qwen2",
    ),
    "llama": Case(
        "llama",
        COMMON | dict(num_key_value_heads=2, rms_norm_eps=1e-5, rope_parameters=_rope()),
        features=("norm_eps",),
    ),
    "llama3_tied": Case(
        "llama",
        COMMON | dict(num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3, tie_word_embeddings=True),
        features=("rope",),
    ),
    "llama_linear": Case(
        "llama", COMMON | dict(num_key_value_heads=4, rope_parameters=_rope("linear", factor=4.0)), features=("rope",)
    ),
    "mistral": Case(
        "mistral",
        COMMON | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_rope(theta=100_000.0), sliding_window=None),
        features=("theta",),
    ),
    "mistral_wide_window": Case(
        "mistral", COMMON | dict(num_key_value_heads=2, rope_parameters=_rope(theta=50_000.0), sliding_window=128)
    ),
    "qwen2_tied": Case(
        "qwen2",
        COMMON | dict(num_key_value_heads=2, rope_parameters=_rope(theta=100_000.0), tie_word_embeddings=True),
        features=("theta", "bias"),
    ),
    "qwen3": Case(
        "qwen3",
        COMMON | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_rope(theta=100_000.0)),
        features=("theta", "qk_norm"),
    ),
}

# Texts of the tests are four times longer than these windows.
CASES |= {
    "mistral_window": Case(
        "mistral",
        COMMON | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_rope(theta=100_000.0), sliding_window=5),
        features=("theta", "window"),
    ),
    "ministral": Case(
        "ministral",
        COMMON
        | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_rope(theta=50_000.0), sliding_window=7)
        | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        features=("theta", "window"),
    ),
    "qwen2_window": Case(
        "qwen2",
        COMMON
        | dict(num_key_value_heads=2, rope_parameters=_rope(theta=100_000.0))
        | dict(use_sliding_window=True, sliding_window=6, max_window_layers=1),
        features=("bias", "window"),
    ),
    "qwen3_window": Case(
        "qwen3",
        COMMON
        | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_rope(), use_sliding_window=True, sliding_window=1)
        | dict(layer_types=["full_attention", "sliding_attention", "full_attention"]),
        features=("qk_norm", "window"),
    ),
}

# gpt-oss's ramp of YaRN, not rounded to whole dims, and a limit that many of these small values reach.
YARN_GPT = _rope("yarn", 150_000.0, factor=32.0, original_max_position_embeddings=64, beta_fast=32.0, beta_slow=1.0)
YARN_GPT |= dict(truncate=False)
GPT_OSS = COMMON | dict(num_key_value_heads=2, head_dim=16, rope_parameters=YARN_GPT, sliding_window=5)
GPT_OSS |= dict(num_local_experts=8, num_experts_per_tok=3, intermediate_size=64, swiglu_limit=0.7, hidden_size=64)

CASES |= {
    "gpt_oss": Case(
        "gpt_oss",
        GPT_OSS,
        features=("window", "rope", "truncate", "limit", "alpha", "sinks", "router_logits", "expert_bias", "all_bias"),
    ),
    "gpt_oss_other_types": Case(
        "gpt_oss",
        GPT_OSS
        | dict(rope_parameters=_rope(theta=1000.0), swiglu_limit=2.0, attention_bias=False, tie_word_embeddings=True)
        | dict(layer_types=["full_attention", "sliding_attention", "sliding_attention"]),
        features=("window", "theta", "limit", "sinks"),
    ),
}

CASES |= {
    "qwen3_moe": Case(
        "qwen3_moe",
        COMMON
        | dict(num_key_value_heads=2, head_dim=16, rope_parameters=_rope(theta=100_000.0), norm_topk_prob=True)
        | dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24),
        features=("theta", "qk_norm", "renormalize"),
    ),
    "qwen3_moe_plain_gates": Case(
        "qwen3_moe",
        COMMON
        | dict(num_key_value_heads=4, rope_parameters=_rope(), tie_word_embeddings=True, norm_topk_prob=False)
        | dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=24),
        features=("qk_norm",),
    ),
}

CASES |= {
    "ernie4_5_moe": Case(
        "ernie4_5_moe",
        COMMON
        | dict(num_key_value_heads=2, rope_parameters=_rope(theta=100_000.0), tie_word_embeddings=True)
        | dict(moe_num_experts=8, moe_k=3, moe_num_shared_experts=2, moe_intermediate_size=24, moe_layer_start_index=1),
        features=("theta", "router_bias"),
    ),
    "ernie4_5_moe_untied": Case(
        "ernie4_5_moe",
        COMMON
        | dict(num_key_value_heads=4, rope_parameters=_rope(theta=500_000.0), tie_word_embeddings=False)
        | dict(moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, moe_intermediate_size=24, moe_layer_start_index=2),
        features=("router_bias",),
    ),
}

# Seven layers and the released bases: what transformers' class takes for the keys of released files, which it ignores.
FLASH = COMMON | dict(num_key_value_heads=1, head_dim=24, v_head_dim=10, sliding_window=5, n_routed_experts=8)
FLASH |= dict(num_experts_per_tok=3, moe_intermediate_size=24, num_hidden_layers=7)


def _two_ropes(first, second, fraction):
    ropes = zip(("full_attention", "sliding_attention"), (first, second), strict=True)
    return {kind: _rope(theta=theta, partial_rotary_factor=fraction) for kind, theta in ropes}


CASES |= {
    "mimo_v2_flash": Case(
        "mimo_v2_flash",
        FLASH | dict(rope_parameters=_two_ropes(5_000_000.0, 10_000.0, 0.334)),
        depth=3,
        features=("window", "sinks", "value_scale", "router_bias", "thetas", "norm_eps"),
    ),
    "mimo_v2_flash_other_lists": Case(
        "mimo_v2_flash",
        FLASH
        | dict(rope_parameters=_two_ropes(1000.0, 100.0, 0.5), num_hidden_layers=4, attention_value_scale=1.5)
        | dict(layer_types=["sliding_attention", "full_attention", "sliding_attention", "full_attention"])
        | dict(mlp_layer_types=["dense", "dense", "sparse", "sparse"], num_key_value_heads=2, norm_topk_prob=False),
        depth=1,
        features=("window", "sinks", "value_scale", "thetas"),
    ),
}

# Published names of what surrounds the block of an MTP module. The weights of the first two are as wide as the model.
EXTRAS = {
    "deepseek_v3": {"e": "enorm", "h": "hnorm", "proj": "eh_proj", "out": "shared_head.norm"},
    "kimi_k2": {"e": "enorm", "h": "hnorm", "proj": "eh_proj", "out": "shared_head.norm"},
    "glm4_moe": {"e": "enorm", "h": "hnorm", "proj": "eh_proj", "out": "shared_head.norm"},
    "mimo_v2_flash": {"e": "enorm", "h": "hnorm", "proj": "eh_proj", "out": "final_layernorm"},
    "mimo": {"e": "token_layernorm", "h": "hidden_layernorm", "proj": "input_proj", "out": "final_layernorm"},
}
FROM_MAIN = {"mimo_v2_flash"}  # every depth reads the main model's hidden state
HIDDEN_FIRST = {"mimo"}  # which half of the projection's input comes first; the embedding everywhere else


def needs_torch():
    """Skips the test where torch, transformers or safetensors is missing, and fails it where CI promises them."""
    missing = [n for n in ("torch", "transformers", "safetensors") if importlib.util.find_spec(n) is None]
    if not missing:
        import transformers

        if int(transformers.__version__.split(".")[0]) >= 5:
            return
        missing = [f"transformers 5 or newer (found {transformers.__version__})"]
    message = f"needs {', '.join(missing)}: pip install 'mtp_jax[hf]'"
    if os.environ.get("CI") == "true":
        pytest.fail(message)
    pytest.skip(message)


@dataclass
class Reference:
    """A folder as released, and what its model computes in fp32."""

    case: Case
    folder: pathlib.Path
    config: dict  # config.json
    tensors: dict  # name -> torch tensor, as in the files
    model: object = field(repr=False)  # transformers' model, in fp32, with the values of the files

    def logits(self, tokens, *, swap_halves=False, output_norm=True, recycled="before_norm") -> np.ndarray:
        """int[B, N] -> float32[B, N - D, 1 + D, V]; [..., k, :] predicts tokens[i + 1 + k].

        The keywords are mistakes, for tests that must fail, but `recycled`: what depth k + 1 receives of h_k, seen from
        the output norm of depth k. Training passes it on before that norm, serving engines after it.
        """
        import torch

        tokens = torch.as_tensor(np.asarray(tokens), dtype=torch.long)
        num = tokens.shape[1] - self.case.depth
        with torch.no_grad():
            hidden = self.model.model(tokens, use_cache=False).last_hidden_state[:, :num]  # after the final norm
            main = hidden
            logits = [self.model.lm_head(hidden)]
            for k in range(1, self.case.depth + 1):
                embedded = self.model.model.embed_tokens(tokens[:, k : k + num])
                module = self._mtp(k)
                hidden = module["block"](self._join(module, embedded, hidden, swap_halves))
                normed = module["out"](hidden)
                logits.append(self.model.lm_head(normed if output_norm else hidden))
                hidden = hidden if recycled == "before_norm" else normed
                hidden = main if self.case.model_type in FROM_MAIN else hidden
        return torch.stack(logits, 2).numpy()

    def greedy(self, prompt, num) -> list[int]:
        """The `num` most likely next tokens by the main model, one forward pass of the whole text each."""
        import torch

        ids = [int(t) for t in prompt]
        with torch.no_grad():
            for _ in range(num):
                ids.append(int(self.model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        return ids[len(prompt) :]

    def changed_logits(self, tokens, config=None, edit=None) -> np.ndarray:
        """Main logits [B, N, V] of the same weights under another configuration, or after `edit(model)`."""
        import torch

        kwargs = self.case.config | (config or {})
        model = _new_model(dataclasses.replace(self.case, config=kwargs))
        model.load_state_dict(self.model.state_dict(), strict=False)
        with torch.no_grad():
            if edit is not None:
                edit(model)
            return model(torch.as_tensor(np.asarray(tokens), dtype=torch.long), use_cache=False).logits.numpy()

    def _join(self, module, embedded, hidden, swap_halves):
        import torch

        halves = [module["e"](embedded), module["h"](hidden)]
        if (self.case.model_type in HIDDEN_FIRST) != swap_halves:
            halves.reverse()
        return torch.nn.functional.linear(torch.cat(halves, -1), module["proj"])

    def _mtp(self, k) -> dict:
        """The functions of depth k, from the published tensors."""
        prefix = _mtp_prefix(self.case, k)
        own = {n.removeprefix(prefix): t.float() for n, t in self.tensors.items() if n.startswith(prefix)}
        names = EXTRAS[self.case.model_type]
        eps = self.model.config.rms_norm_eps
        layer = _new_block(self.model)
        kind = self.case.model_type
        layer.load_state_dict(_fused({n: own[_renamed(kind, n)] for n in _published(layer.state_dict())}))
        functions = {n: _rms_norm(own[names[n] + ".weight"], eps) for n in ("e", "h", "out")}
        return functions | {"proj": own[names["proj"] + ".weight"], "block": self._causal(layer)}

    def _causal(self, layer):
        """The decoder layer as a function of [B, N, d]: positions 0 .. N - 1, each sees itself and what is before."""
        import torch

        def block(x):
            positions = torch.arange(x.shape[1])[None]
            mask = torch.full((1, 1, x.shape[1], x.shape[1]), torch.finfo(x.dtype).min).triu(1)
            local = ()
            if self.case.model_type == "mimo_v2_flash":
                mask += torch.full_like(mask, torch.finfo(x.dtype).min).tril(-self.model.config.sliding_window)
                local = ("sliding_attention",)
            rotary = self.model.model.rotary_emb(x, positions, *local)
            return layer(x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)

        return block


def build(name, folder, dtype="float32", seed=0, style="new", shards=1) -> Reference:
    """Writes the random model `name` of `CASES` to `folder` in its published layout.

    style: "new" leaves config.json as transformers writes it today, "released" gives it the keys of released files.
    shards: above 1, that many files with an index, neighbouring tensors in different ones.
    dtype: of the files, except the router's correction bias, which released files keep in float32. The reference
    computes in float32 from the rounded values.
    """
    needs_torch()
    import torch

    case, folder = CASES[name], pathlib.Path(folder)
    generator = torch.Generator().manual_seed(seed)
    model = _new_model(case)
    with torch.no_grad():
        _randomize(model.state_dict(), dtype, generator)
        tensors = _saved_tensors(model, folder)
        for k in range(1, case.depth + 1):
            tensors |= _mtp_tensors(case, model, k, dtype, generator)
    tensors = {n: t if "e_score" in n else t.to(getattr(torch, dtype)) for n, t in tensors.items()}
    _write(folder, tensors, shards)
    config = _rewrite_config(case, folder / "config.json", dtype, style)
    return Reference(case, folder, config, tensors, model)


def tokens_of(name, batch=2, length=24) -> np.ndarray:
    """Random text for a case."""
    vocab_size = CASES[name].config["vocab_size"]
    return np.random.default_rng(7).integers(0, vocab_size, (batch, length), dtype=np.int32)


def _new_model(case: Case):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)  # its threads and XLA's wait for each other: seconds for what takes milliseconds
    config = AutoConfig.for_model(case.hf_type or case.model_type, **json.loads(json.dumps(case.config)))
    return AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype="float32"
    ).eval()


def _new_block(model):
    """Another layer as modules have it, mostly like the model's last: a mixture of experts where the model has one."""
    layer = type(model.model.layers[-1])
    if model.config.model_type == "mimo_v2_flash":  # its modules are dense and have a window
        return layer(model.config, layer_idx=_dense_and_local(model.config)).eval()
    return layer(model.config, layer_idx=model.config.num_hidden_layers - 1).eval()


def _randomize(state: dict, dtype, generator):
    """Values at which every part of the model matters, rounded to `dtype`. In place."""
    import torch

    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if "norm" in name:
            value = 1 + 0.3 * noise
        elif name.endswith("e_score_correction_bias"):
            tensor.copy_(0.3 * noise)  # of the size of the scores' own differences; never rounded
            continue
        elif name.endswith("bias"):
            value = 0.3 * noise
        elif "embed_tokens" in name:
            value = 0.1 * noise  # small, so that the eps of the first norm shows
        else:
            value = noise / tensor.shape[-1] ** 0.5
        if "kv_a_proj_with_mqa" in name:
            value[: LATENT["kv_lora_rank"]] *= 0.02  # so that the eps of the latent norms shows
        if "q_a_proj" in name:
            value *= 0.02
        if "lm_head" in name:
            value *= 1.5
        tensor.copy_(value.to(getattr(torch, dtype)).float())


def _saved_tensors(model, folder) -> dict:
    """The main model's tensors as transformers writes them."""
    from safetensors.torch import load_file

    model.save_pretrained(folder, max_shard_size="1GB")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


def _mtp_prefix(case: Case, k) -> str:
    if case.model_type in ("mimo", "mimo_v2_flash"):
        return {"mimo": f"model.mtp_layers.{k - 1}.", "mimo_v2_flash": f"model.mtp.layers.{k - 1}."}[case.model_type]
    return f"model.layers.{case.config['num_hidden_layers'] + k - 1}."


def _mtp_tensors(case: Case, model, k, dtype, generator) -> dict:
    """The published tensors of depth k, random; embedding and head repeat the main model's where files have them."""
    import torch

    width, names = case.config["hidden_size"], EXTRAS[case.model_type]
    own = _new_block(model).state_dict()
    own |= {f"{names[n]}.weight": torch.empty(width) for n in ("e", "h", "out")}
    own |= {names["proj"] + ".weight": torch.empty(width, 2 * width)}
    _randomize(own, dtype, generator)
    if not case.model_type.startswith("mimo"):
        own["embed_tokens.weight"] = model.model.embed_tokens.weight.clone()
        own["shared_head.head.weight"] = model.lm_head.weight.clone()
    own = {_renamed(case.model_type, n): t for n, t in _published(own).items()}
    return {_mtp_prefix(case, k) + n: t.contiguous() for n, t in own.items()}


def _renamed(model_type, name) -> str:
    """The published name of a tensor of an MTP module's block."""
    if model_type != "mimo_v2_flash":
        return name
    return name.replace("post_attention", "pre_mlp").replace("self_attn.sinks", "self_attn.attention_sink_bias")


def _published(state: dict) -> dict:
    """transformers' fused experts -> one gate, up and down matrix an expert."""
    out = {}
    for name, tensor in state.items():
        if name == "mlp.experts.gate_up_proj":
            for expert, matrix in enumerate(tensor):
                gate, up = matrix.chunk(2)
                out[f"mlp.experts.{expert}.gate_proj.weight"] = gate
                out[f"mlp.experts.{expert}.up_proj.weight"] = up
        elif name == "mlp.experts.down_proj":
            out |= {f"mlp.experts.{expert}.down_proj.weight": matrix for expert, matrix in enumerate(tensor)}
        else:
            out[name] = tensor
    return out


def _fused(published: dict) -> dict:
    """The way back."""
    import torch

    out = {n: t for n, t in published.items() if ".experts." not in n}
    num = sum(".experts." in n for n in published) // 3
    if num:
        gate, up, down = (
            torch.stack([published[f"mlp.experts.{e}.{part}_proj.weight"] for e in range(num)])
            for part in ("gate", "up", "down")
        )
        out |= {"mlp.experts.gate_up_proj": torch.cat([gate, up], 1), "mlp.experts.down_proj": down}
    return out


def _rms_norm(weight, eps):
    return lambda x: weight * (x * (x.pow(2).mean(-1, keepdim=True) + eps).rsqrt())


def _write(folder, tensors, shards):
    from safetensors.torch import save_file

    if shards == 1:
        return save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
        here = names[shard::shards]
        save_file({n: tensors[n] for n in here}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(here, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _rewrite_config(case: Case, path, dtype, style) -> dict:
    config = json.loads(path.read_text()) | {"dtype": dtype}
    if case.hf_type:
        config["model_type"] = case.model_type
    if case.model_type == "mimo":
        config |= {"architectures": ["MiMoForCausalLM"], "attention_bias": True}
    if case.depth or case.model_type in EXTRAS:
        config["num_nextn_predict_layers"] = case.depth
    if style == "released":
        config = _released_flash(config) if case.model_type == "mimo_v2_flash" else _released(config)
    path.write_text(json.dumps(config, indent=2))
    return config


def _dense_and_local(config) -> int:
    """Number of a layer beyond the last in a configuration that gets it."""
    config.layer_types = [*config.layer_types[: config.num_hidden_layers], "sliding_attention"]
    config.mlp_layer_types = [*config.mlp_layer_types[: config.num_hidden_layers], "dense"]
    return config.num_hidden_layers


def _released_flash(config: dict) -> dict:
    """The keys of the released MiMo-V2-Flash, written for its own modelling code."""
    own = ("rope_parameters", "dtype", "layer_types", "mlp_layer_types", "rms_norm_eps", "output_router_logits")
    out = {k: v for k, v in config.items() if k not in own}
    ropes = config["rope_parameters"]
    window = config["sliding_window"] - 1
    return out | {
        "torch_dtype": config["dtype"],
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in config["layer_types"]],
        "moe_layer_freq": [int(kind == "sparse") for kind in config["mlp_layer_types"]],
        "layernorm_epsilon": config["rms_norm_eps"],
        "rope_theta": ropes["full_attention"]["rope_theta"],
        "swa_rope_theta": ropes["sliding_attention"]["rope_theta"],
        "partial_rotary_factor": ropes["full_attention"]["partial_rotary_factor"],
        "sliding_window": window,
        "sliding_window_size": window,
        "attention_chunk_size": window,
        "swa_num_attention_heads": config["num_attention_heads"],
        "swa_num_key_value_heads": 2 * config["num_key_value_heads"],
        "swa_head_dim": config["head_dim"],
        "swa_v_head_dim": config["v_head_dim"],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "routed_scaling_factor": None,
        "n_shared_experts": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }


def _released(config: dict) -> dict:
    """The keys of files written before transformers 5: rope in two places, no derived sizes, the gate spelled out."""
    derived = ("rope_parameters", "dtype", "qk_head_dim", "rope_interleave", "output_router_logits")
    if "sliding_attention" not in config.get("layer_types", ()):
        derived += ("layer_types",)
    out = {k: v for k, v in config.items() if k not in derived}
    out["torch_dtype"] = config["dtype"]
    rope = dict(config["rope_parameters"])
    out["rope_theta"] = rope.pop("rope_theta")
    if "partial_rotary_factor" in rope:
        out["partial_rotary_factor"] = rope.pop("partial_rotary_factor")
    kind = rope.pop("rope_type")
    key = "rope_type" if kind == "llama3" else "type"
    out["rope_scaling"] = {key: kind} | rope if kind != "default" else None
    if "moe_layer_end_index" in out:
        out |= {"moe_layer_end_index": -1, "moe_use_aux_free": True, "moe_capacity": [64, 64, 64], "moe_gate": "topk"}
    if config["model_type"] == "gpt_oss":
        original = config["rope_parameters"].get("original_max_position_embeddings", 4096)
        out |= {"experts_per_token": config["num_experts_per_tok"], "initial_context_length": original}
        if kind == "default":  # absent, it is transformers' YaRN
            out["rope_parameters"] = config["rope_parameters"]
            del out["rope_scaling"], out["rope_theta"]
    elif "num_local_experts" in out:
        out["num_experts"] = out.pop("num_local_experts")
    if "kv_lora_rank" in config:
        del out["head_dim"]  # transformers' own addition, the width of the rotated part
        sigmoid = config["model_type"] != "deepseek_v2"
        out |= {"scoring_func": "sigmoid" if sigmoid else "softmax", "moe_layer_freq": 1, "ep_size": 1}
        out.setdefault("topk_method", "noaux_tc")
    if out.get("use_sliding_window") is False:
        out["sliding_window"] = 4  # set, and switched off: to be ignored
    return out
