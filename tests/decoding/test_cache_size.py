"""Cache size per token: in the formula, and in the arrays that are really there."""

from dataclasses import replace

import jax
import pytest

from mtp_jax.config import Config, ModelConfig
from mtp_jax.decoding.inference_model import cache_bytes_per_token
from tests.decoding.models import GQA, MLA, build, parallel, sequential


@pytest.mark.parametrize(("dtype", "itemsize"), [("float32", 4), ("bfloat16", 2)])
@pytest.mark.parametrize("num_heads", [1, 4])
def test_latent_attention_keeps_a_latent_and_one_rotary_key_per_layer(dtype, itemsize, num_heads):
    model = replace(MLA, num_layers=3, num_heads=num_heads, compute_dtype=dtype)
    kept = cache_bytes_per_token(Config(model=model))["kept"]
    assert kept == (model.kv_lora_rank + model.qk_rope_head_dim) * 3 * itemsize == bytes_a_slot(model)


def test_grouped_queries_keep_keys_and_values_of_their_groups():
    model = replace(GQA, num_heads=4, num_kv_heads=2)
    sizes = cache_bytes_per_token(Config(model=model))
    assert sizes["kept"] == 2 * 2 * model.head_dim * model.num_layers * 4 == bytes_a_slot(model)
    assert sizes["multi_head"] == 2 * sizes["kept"]


@pytest.mark.parametrize(("mtp", "num"), [(sequential(3), 3), (parallel(3), 2), (sequential(1), 4)])
def test_each_drafting_depth_keeps_one_layer_more(mtp, num):
    depths = min(num, mtp.depth)
    assert bytes_a_slot(MLA, mtp, num) == bytes_a_slot(MLA) // MLA.num_layers * (MLA.num_layers + depths)
    assert bytes_a_slot(MLA, mtp, 0) == bytes_a_slot(MLA)  # and none where nothing is drafted


def bytes_a_slot(model, mtp=None, num_speculative_tokens=0):
    state = build(model, mtp).decoder().start([[1, 2]] * 3, 10, num_speculative_tokens=num_speculative_tokens)
    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves((state.caches, state.mtp_caches)))
    return num_bytes // state.tokens_BS.size


# Of the DeepSeek-V2 report (2405.04434): 60 layers, 128 heads, latents of 512, rotary keys of 64.
V2 = ModelConfig(
    *(102_400, 60, 5120),
    compute_dtype="bfloat16",
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)


def test_the_report_of_deepseek_v2_saves_93_percent_of_the_cache():
    """Its 93.3 %: against DeepSeek 67B (95 layers, 8 key/value heads of 128, 16 bits), V2 at 6 bits a number."""
    bits = cache_bytes_per_token(Config(model=V2))["kept"] / 2 * 6
    grouped = replace(V2, attention="gqa", num_layers=95, num_heads=64, num_kv_heads=8, head_dim=128)
    bits_67b = cache_bytes_per_token(Config(model=grouped))["kept"] * 8
    assert cache_bytes_per_token(Config(model=V2))["kept"] == (512 + 64) * 60 * 2
    assert bits_67b == 2 * 8 * 128 * 95 * 16
    assert round(100 * (1 - bits / bits_67b), 1) == 93.3


def test_deepseek_v2_beside_plain_heads_of_its_own():
    """Table 1 of the report: 4.5 d_h numbers per layer, where plain attention keeps 2 n_h d_h."""
    sizes = cache_bytes_per_token(Config(model=V2))
    assert sizes["kept"] == 4.5 * 128 * 60 * 2 and sizes["multi_head"] == 2 * 128 * 128 * 60 * 2
