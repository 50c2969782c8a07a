"""The oracles themselves: cases computed by hand, by another formula, or known from a symmetry."""

import dataclasses
import math
from types import SimpleNamespace

import numpy as np
import pytest

from mtp_jax.config import Conventions, ModelConfig, MTPConfig, RopeConfig, RouterConfig, YarnConfig, with_values
from tests.reference import loss as loss_module
from tests.reference import moe as moe_module
from tests.reference import rope, router, targets
from tests.reference.attention import attend, softmax
from tests.reference.block import block
from tests.reference.decoder import decoder
from tests.reference.gqa import gqa
from tests.reference.mla import mla
from tests.reference.model import forward
from tests.reference.norm import rms_norm
from tests.reference.params import random_params, stack
from tests.reference.swiglu import swiglu
from tests.reference.tree import as_float64, entry

SMALL = ModelConfig(
    vocab_size=11, num_layers=3, embed_dim=6, num_heads=2, kv_lora_rank=5, qk_nope_head_dim=3, qk_rope_head_dim=4,
    v_head_dim=3, num_kv_heads=1, head_dim=4, ffn_dim=7, num_experts=4, num_dense_layers=1, expert_dim=5,
)  # fmt: skip
SEQUENTIAL = MTPConfig(kind="sequential", depth=2)
PARALLEL = MTPConfig(kind="parallel", depth=2)
NONE = MTPConfig(kind="none")
RNG = np.random.default_rng(0)


def config_of(mtp=SEQUENTIAL, conventions=None, **model):
    conventions = conventions or Conventions()
    return SimpleNamespace(model=dataclasses.replace(SMALL, **model), mtp=mtp, conventions=conventions)


def params_of(config):
    return random_params(config, 2, config.conventions.output_norm)


def batch(lengths, total, seed=0):
    """One row of documents of these lengths, padded to `total`; positions start anew in each document."""
    tokens = np.random.default_rng(seed).integers(0, SMALL.vocab_size, total)
    segment_ids, positions, start = np.zeros(total, int), np.zeros(total, int), 0
    for number, length in enumerate(lengths, 1):
        segment_ids[start : start + length] = number
        positions[start : start + length] = np.arange(length)
        start += length
    return tokens[None], segment_ids[None], positions[None]


def run(config, params, lengths=(7,), total=7, **kwargs):
    D = 0 if config.mtp.kind == "none" else config.mtp.depth
    tokens, segment_ids, positions = batch(lengths, total)
    return forward(params, config, tokens, segment_ids, positions[:, : total - 1 - D], **kwargs)


# ---------------------------------------------------------------------------------------------------------------
# norm, rope


def test_rms_norm_by_hand():
    out = rms_norm({"scale": np.array([1.0, 2.0])}, np.array([[3.0, 4.0]]), 0.5)
    np.testing.assert_allclose(out, [[3 / math.sqrt(13), 8 / math.sqrt(13)]])


def test_rope_by_hand():
    model = ModelConfig(rope=RopeConfig(theta=100.0))
    out = rope.rotate(np.array([1.0, 0.0, 0.0, 1.0]), 3, model)  # angles 3 and 0.3
    np.testing.assert_allclose(out, [math.cos(3), math.sin(3), -math.sin(0.3), math.cos(0.3)])
    out = rope.rotate(np.array([1.0, 0.0, 0.0, 1.0]), 3, with_values(model, {"rope.interleaved": False}))
    np.testing.assert_allclose(out, [math.cos(3), -math.sin(0.3), math.sin(3), math.cos(0.3)])


@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_keeps_norms_and_sees_relative_positions_only(interleaved):
    model = ModelConfig(rope=RopeConfig(interleaved=interleaved))
    q, k = RNG.standard_normal((2, 8))
    np.testing.assert_allclose(rope.rotate(q, 0, model), q)
    np.testing.assert_allclose(np.linalg.norm(rope.rotate(q, 17, model)), np.linalg.norm(q))
    near = rope.rotate(q, 5, model) @ rope.rotate(k, 2, model)
    far = rope.rotate(q, 105, model) @ rope.rotate(k, 102, model)
    np.testing.assert_allclose(near, far)
    assert abs(near - rope.rotate(q, 6, model) @ rope.rotate(k, 2, model)) > 1e-3


def test_rope_styles_differ_by_a_permutation():
    order = [0, 2, 4, 1, 3, 5]  # interleaved slots -> halves
    vector = RNG.standard_normal(6)
    split = rope.rotate(vector[order], 4, ModelConfig(rope=RopeConfig(interleaved=False)))
    np.testing.assert_allclose(rope.rotate(vector, 4, ModelConfig())[order], split)


def _yarn(**fields):
    return ModelConfig(rope=RopeConfig(yarn=YarnConfig(**fields)))


def test_yarn_as_deepseek_v3_sets_it():
    model = _yarn(factor=40.0, mscale=1.0, mscale_all_dim=1.0)
    assert rope.correction_range(64, model) == (10, 23)
    assert rope.correction_range(40, model) == (6, 15)  # floor of 6.5, ceiling of 14.1
    frequencies = rope.inverse_frequencies(64, model)
    plain = [10_000.0 ** (-2 * i / 64) for i in range(32)]
    np.testing.assert_allclose(frequencies[:11], plain[:11])
    np.testing.assert_allclose(frequencies[23:], np.array(plain[23:]) / 40)
    np.testing.assert_allclose(frequencies[15], plain[15] * (8 / 13) + plain[15] / 40 * (5 / 13))
    assert rope.attention_factor(model) == 1.0
    np.testing.assert_allclose(rope.softmax_factor(model), (0.1 * math.log(40) + 1) ** 2)


def test_yarn_attention_factors():
    paper = _yarn(factor=4.0)
    np.testing.assert_allclose(rope.attention_factor(paper), 0.1 * math.log(4) + 1)
    assert rope.softmax_factor(paper) == 1.0
    v2 = _yarn(factor=40.0, mscale=0.5, mscale_all_dim=0.707)
    ratio = (0.05 * math.log(40) + 1) / (0.0707 * math.log(40) + 1)
    np.testing.assert_allclose(rope.attention_factor(v2), ratio)
    off = _yarn(mscale_all_dim=1.0)
    assert rope.attention_factor(off) == rope.softmax_factor(off) == 1.0
    assert rope.inverse_frequencies(8, off) == rope.inverse_frequencies(8, ModelConfig())


def test_yarn_scales_what_rope_returns():
    model = _yarn(factor=4.0)
    np.testing.assert_allclose(np.linalg.norm(rope.rotate(np.array([3.0, 4.0]), 9, model)), 5 * (0.1 * math.log(4) + 1))


# ---------------------------------------------------------------------------------------------------------------
# attention


def test_attention_averages_what_it_sees():
    v = RNG.standard_normal((1, 4, 1, 2))
    zero = np.zeros((1, 4, 1, 3))
    out = attend(zero, zero, v, np.array([[1, 1, 2, 2]]), 1.0)
    expected = [v[0, 0, 0], v[0, :2, 0].mean(0), v[0, 2, 0], v[0, 2:, 0].mean(0)]
    np.testing.assert_allclose(out[0, :, 0], expected)


def _attention(kind, **overrides):
    config = config_of(attention=kind, **overrides)
    params = as_float64(entry(params_of(config)["trunk"]["dense_blocks"], 0)["attention"])
    return (mla if kind == "mla" else gqa), params, config.model


@pytest.mark.parametrize(
    ("kind", "overrides"),
    [
        ("mla", {}),
        ("mla", {"q_lora_rank": 4, "rope": RopeConfig(yarn=YarnConfig(factor=8.0, mscale_all_dim=1.0))}),
        ("gqa", {}),
        ("gqa", {"qk_norm": True, "qkv_bias": True, "rotary_fraction": 0.5, "rope": RopeConfig(interleaved=False)}),
    ],
)
def test_attention_of_packed_documents_is_that_of_each_alone(kind, overrides):
    attention, params, model = _attention(kind, **overrides)
    x = RNG.standard_normal((1, 7, 6))
    _, segment_ids, positions = batch((3, 2), 7)
    out = attention(params, model, x, segment_ids, positions)
    for start, end in ((0, 3), (3, 5)):
        alone = (x[:, start:end], np.ones((1, end - start), int), np.arange(end - start)[None])
        np.testing.assert_allclose(out[:, start:end], attention(params, model, *alone))
    shifted = attention(params, model, x, segment_ids, positions + 50)
    np.testing.assert_allclose(out, shifted, err_msg="only distances count")
    x[0, 2] += 1.0
    changed = attention(params, model, x, segment_ids, positions)
    np.testing.assert_allclose(changed[0, [0, 1, 3, 4, 5, 6]], out[0, [0, 1, 3, 4, 5, 6]])
    assert np.abs(changed[0, 2] - out[0, 2]).max() > 1e-3


def test_mla_absorbed_is_mla():
    """Scores against the latent itself: q_nope . (W_uk c) = (q_nope W_uk^T) . c (2405.04434, section 2.1.2)."""
    _, params, model = _attention("mla")
    N, C, T = model.qk_nope_head_dim, model.kv_lora_rank, 5
    x = RNG.standard_normal((T, 6))
    compressed = x @ params["kv_a"]
    latent = rms_norm(params["kv_a_norm"], compressed[:, :C], model.norm_eps)
    rope_keys = np.array([rope.rotate(compressed[t, C:], t, model) for t in range(T)])
    out = np.zeros((T, 6))
    for h in range(model.num_heads):
        q = x @ params["q"][:, h]
        absorbed = q[:, :N] @ params["kv_b"][:, h, :N].T
        rotated = np.array([rope.rotate(q[t, N:], t, model) for t in range(T)])
        scores = (absorbed @ latent.T + rotated @ rope_keys.T) / math.sqrt(N + model.qk_rope_head_dim)
        for t in range(T):
            attended = softmax(scores[t, : t + 1]) @ latent[: t + 1]
            out[t] += attended @ params["kv_b"][:, h, N:] @ params["o"][h]
    expected = mla(params, model, x[None], np.ones((1, T), int), np.arange(T)[None])[0]
    np.testing.assert_allclose(out, expected)


def test_mla_norms_both_latents_and_not_the_rope_key():
    attention, params, model = _attention("mla", q_lora_rank=4, norm_eps=0.0, latent_norm_eps=0.0)
    arguments = (model, RNG.standard_normal((1, 4, 6)), np.ones((1, 4), int), np.arange(4)[None])
    out = attention(params, *arguments)
    np.testing.assert_allclose(attention({**params, "q_a": 7 * params["q_a"]}, *arguments), out)
    latent_only = np.where(np.arange(params["kv_a"].shape[1]) < model.kv_lora_rank, 7.0, 1.0)
    np.testing.assert_allclose(attention({**params, "kv_a": latent_only * params["kv_a"]}, *arguments), out)
    assert np.abs(attention({**params, "kv_a": 7 * params["kv_a"]}, *arguments) - out).max() > 1e-3


def test_gqa_with_repeated_heads_is_multi_head_attention():
    _, params, model = _attention("gqa", num_heads=4, num_kv_heads=2)
    repeated = {**params, **{name: np.repeat(params[name], 2, axis=1) for name in ("k", "v")}}
    x, segment_ids, positions = RNG.standard_normal((1, 4, 6)), np.ones((1, 4), int), np.arange(4)[None]
    full = gqa(repeated, dataclasses.replace(model, num_kv_heads=4), x, segment_ids, positions)
    np.testing.assert_allclose(gqa(params, model, x, segment_ids, positions), full)


def test_partial_rotary_of_nothing_ignores_positions():
    _, params, model = _attention("gqa", rotary_fraction=0.0)
    x, segment_ids = RNG.standard_normal((1, 4, 6)), np.ones((1, 4), int)
    here = gqa(params, model, x, segment_ids, np.arange(4)[None])
    np.testing.assert_allclose(here, gqa(params, model, x, segment_ids, np.zeros((1, 4), int)))


def test_gqa_by_hand():
    """Two positions, one head of 2 + 2 dims, first two rotated: norm and bias come before the rotation."""
    model = ModelConfig(
        attention="gqa", embed_dim=4, num_heads=1, num_kv_heads=1, head_dim=4, qk_norm=True, qkv_bias=True,
        rotary_fraction=0.5, norm_eps=0.0,
    )  # fmt: skip
    eye, bias = np.eye(4)[:, None, :], np.array([[0.0, 0.0, 0.0, 1.0]])
    params = {"q": eye, "k": eye, "v": eye, "o": np.eye(4)[None], "q_bias": bias, "k_bias": bias, "v_bias": 0 * bias}
    params |= {"q_norm": {"scale": np.ones(4)}, "k_norm": {"scale": np.ones(4)}}
    x = np.array([[[1.0, 0, 0, 0], [1.0, 0, 0, 0]]])
    out = gqa(params, model, x * [[[1.0], [3.0]]], np.ones((1, 2), int), np.array([[0, 1]]))
    key_0 = np.array([math.sqrt(2), 0, 0, math.sqrt(2)])  # (1, 0, 0, 1) over its rms 1 / sqrt 2
    normed = np.array([3.0, 0, 0, 1.0]) / math.sqrt(10 / 4)
    query_1 = np.array([normed[0] * math.cos(1), normed[0] * math.sin(1), 0, normed[3]])
    weights = softmax(np.array([query_1 @ key_0, query_1 @ query_1]) / 2)
    np.testing.assert_allclose(out[0], [[1.0, 0, 0, 0], [weights[0] + 3 * weights[1], 0, 0, 0]])


# ---------------------------------------------------------------------------------------------------------------
# router, mixture of experts


def _router(num_experts_per_token=2, routed_scaling_factor=1.0, **fields):
    return ModelConfig(
        num_experts=6,
        num_experts_per_token=num_experts_per_token,
        routed_scaling_factor=routed_scaling_factor,
        router=RouterConfig(**fields),
    )


def test_router_ties_go_to_the_lower_index():
    assert router.best([1.0, 2.0, 2.0, 0.0], 1) == [1]
    assert router.choose(np.full(6, 0.5), np.zeros(6), _router()) == [0, 1]
    grouped = _router(num_groups=3, groups_per_token=1)
    assert router.choose(np.full(6, 0.5), np.zeros(6), grouped) == [0, 1]


def test_router_bias_moves_the_choice_and_not_the_gate():
    s, bias = np.array([0.9, 0.8, 0.1, 0.1, 0.1, 0.2]), np.array([0, -1.0, 0, 0, 0, 0])
    chosen = router.choose(s, bias, _router())
    assert chosen == [0, 5]
    np.testing.assert_allclose(router.gates(s, chosen, _router()), [0.9 / 1.1, 0.2 / 1.1])
    raw = _router(renormalize=False, routed_scaling_factor=2.5)
    np.testing.assert_allclose(router.gates(s, chosen, raw), [2.25, 0.5])
    assert router.gates(np.zeros(6), [0, 1], _router()) == [0.0, 0.0]


def test_router_groups_limit_the_choice():
    s = np.array([0.9, 0.0, 0.5, 0.5, 0.3, 0.3])
    limited = {"num_groups": 3, "groups_per_token": 1}
    assert router.choose(s, np.zeros(6), _router(**limited)) == [2, 3]  # 1.0 beats 0.9 and 0.6
    assert router.choose(s, np.zeros(6), _router(**limited, group_score="max")) == [0, 1]
    threes = np.array([0.5, 0.5, 0.0, 0.6, 0.3, 0.3])  # two best: 1.0 and 0.9; all three: 1.0 and 1.2
    assert router.choose(threes, np.zeros(6), _router(num_groups=2)) == [0, 1]
    two = _router(num_groups=3, groups_per_token=2, num_experts_per_token=3)
    assert router.choose(s, np.zeros(6), two) == [0, 2, 3]
    negative = router.choose(np.full(6, 0.1), np.array([-1.0, -1, -1, -1, -2, -2]), _router(**limited))
    assert negative == [0, 1], "a masked group does not count as 0, above a negative s + b"
    singles = _router(num_groups=6, groups_per_token=2)
    assert router.choose(s, np.zeros(6), singles) == [0, 2], "a group of one has no second best"


def test_router_scores():
    x, params = np.array([1.0]), {"router": np.array([[0.0, math.log(3), 0.0, 0.0, 0.0, 0.0]])}
    np.testing.assert_allclose(router.scores(params, _router(), x)[:2], [0.5, 0.75])
    np.testing.assert_allclose(router.scores(params, _router(score="softmax"), x)[:2], [1 / 8, 3 / 8])


def test_swiglu_by_hand():
    params = {"gate": np.array([[1.0]]), "up": np.array([[3.0]]), "down": np.array([[0.5]])}
    np.testing.assert_allclose(swiglu(params, np.array([[2.0]])), [[2 / (1 + math.exp(-2)) * 6 * 0.5]])


def _moe(**overrides):
    config = config_of(**overrides)
    return as_float64(entry(params_of(config)["trunk"]["blocks"], 0)["ffn"]), config.model


def test_experts_that_are_alike_are_one_dense_layer():
    params, model = _moe(routed_scaling_factor=2.0, num_shared_experts=0)
    one = {name: params[name][0] for name in ("gate", "up", "down")}
    params |= {name: np.stack([weight] * 4) for name, weight in one.items()}
    x = RNG.standard_normal((2, 3, 6))
    out, _, _ = moe_module.moe(params, model, x, np.ones((2, 3), bool))
    np.testing.assert_allclose(out, 2.0 * swiglu(one, x))


def test_shared_experts_are_added():
    params, model = _moe(num_shared_experts=2)
    assert params["shared"]["gate"].shape == (6, 10)
    x, valid = RNG.standard_normal((1, 3, 6)), np.ones((1, 3), bool)
    routed = {name: value for name, value in params.items() if name != "shared"}
    difference = moe_module.moe(params, model, x, valid)[0] - moe_module.moe(routed, model, x, valid)[0]
    np.testing.assert_allclose(difference, swiglu(params["shared"], x))


def test_statistics_do_not_count_padding():
    params, model = _moe()
    x = RNG.standard_normal((2, 5, 6))
    valid = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    out, loads, balance = moe_module.moe(params, model, x, valid)
    alone, loads_alone, balance_alone = moe_module.moe(params, model, x[:1, :3], np.ones((1, 3), bool))
    np.testing.assert_allclose(out[:1, :3], alone)
    np.testing.assert_array_equal(loads, loads_alone)
    np.testing.assert_allclose(balance, balance_alone)
    assert loads.sum() == 3 * model.num_experts_per_token
    assert moe_module.moe(params, model, x, np.zeros((2, 5), bool))[2] == 0.0


def test_balance_loss_by_hand():
    model = ModelConfig(num_experts=4, num_experts_per_token=1)
    even = [(np.full(4, 0.7), [e]) for e in range(4)]
    np.testing.assert_allclose(moe_module.balance_loss([even, []], model), 1.0)
    pairs = [(np.full(4, 0.7), [e, (e + 1) % 4]) for e in range(4)]
    two = dataclasses.replace(model, num_experts_per_token=2)
    np.testing.assert_allclose(moe_module.balance_loss([pairs], two), 1.0)
    s = np.array([0.6, 0.2, 0.1, 0.1]) * 3  # s' = s / sum s
    np.testing.assert_allclose(moe_module.balance_loss([[(s, [0]), (s, [0])]], model), 4 * 0.6)
    np.testing.assert_allclose(moe_module.balance_loss([even, [(s, [0])]], model), (1.0 + 4 * 0.6) / 2)


def test_block_of_zero_outputs_is_the_identity():
    params = as_float64(entry(params_of(config_of())["trunk"]["blocks"], 0))
    params["attention"]["o"] *= 0
    params["ffn"]["down"] *= 0
    params["ffn"]["shared"]["down"] *= 0
    h = RNG.standard_normal((1, 4, 6))
    out, statistics = block(params, SMALL, h, np.array([[1, 1, 1, 0]]), np.arange(4)[None])
    np.testing.assert_array_equal(out, h)
    assert statistics["loads"].sum() == 3 * SMALL.num_experts_per_token


# ---------------------------------------------------------------------------------------------------------------
# the whole model


@pytest.mark.parametrize("mtp", [NONE, SEQUENTIAL, PARALLEL, dataclasses.replace(SEQUENTIAL, shared_depths=True)])
def test_packed_documents_are_documents_alone(mtp):
    config = config_of(mtp)
    params, D, lengths = params_of(config), config.mtp.depth * (mtp.kind != "none"), (4, 1, 6)
    total = 13
    tokens, segment_ids, positions = batch(lengths, total)
    packed = forward(params, config, tokens, segment_ids, positions[:, : total - 1 - D])
    start, nll, loads = 0, 0.0, 0.0
    for length in lengths:
        alone_tokens, alone_segments = np.zeros((2, 1, length + 1 + D), int)
        alone_tokens[0, :length], alone_segments[0, :length] = tokens[0, start : start + length], 1
        alone = forward(params, config, alone_tokens, alone_segments, np.arange(length)[None])
        valid = alone["targets"].valid[:, 0]
        seen = min(length, total - 1 - D - start)
        assert not valid[:, seen:].any()
        here = packed["logits"][:, 0, start : start + seen]
        np.testing.assert_allclose(here[valid[:, :seen]], alone["logits"][:, 0][valid])
        nll, loads = nll + alone["nll_sums"], loads + _loads(alone)
        start += length
    np.testing.assert_allclose(packed["nll_sums"], nll)
    np.testing.assert_array_equal(_loads(packed), loads)


def _loads(out):
    return np.array([s["loads"] for s in [*out["aux"]["trunk"], *out["aux"]["mtp"]]])


@pytest.mark.parametrize("mtp", [SEQUENTIAL, PARALLEL])
def test_statistics_of_a_depth_count_its_valid_positions(mtp):
    out = run(config_of(mtp), params_of(config_of(mtp)), (4, 3), 9)  # valid: 3 + 2, 2 + 1, 1 + 0
    np.testing.assert_array_equal(_loads(out).sum(-1), np.array([5, 3, 1]) * SMALL.num_experts_per_token)
    np.testing.assert_array_equal(out["counts"], [5, 3, 1])


def test_blocks_follow_each_other():
    config = config_of(NONE)
    params = as_float64(params_of(config)["trunk"])
    tokens, segment_ids, positions = batch((5,), 5)
    main = decoder(params, SMALL, tokens, segment_ids, positions)
    h = params["embed"][tokens]
    h, _ = block(entry(params["dense_blocks"], 0), SMALL, h, segment_ids, positions)
    np.testing.assert_allclose(main.z, h)
    h, _ = block(entry(params["blocks"], 0), SMALL, h, segment_ids, positions)
    np.testing.assert_allclose(main.h, h)


@pytest.mark.parametrize(
    ("token", "changed"),
    [(4, {(0, 4), (1, 3), (1, 4), (2, 2), (2, 3), (2, 4)}), (5, {(1, 4), (2, 3), (2, 4)}), (6, {(2, 4)}), (7, set())],
)
def test_depth_k_reads_k_tokens_ahead_and_no_further(token, changed):
    """(depth, position) pairs of T = 5 positions that a token reaches."""
    config = config_of()
    params = params_of(config)
    tokens, segment_ids, positions = batch((8,), 8)
    arguments = (segment_ids, positions[:, :5])
    before = forward(params, config, tokens, *arguments)["hidden"][:, 0]
    tokens[0, token] = (tokens[0, token] + 1) % SMALL.vocab_size
    after = forward(params, config, tokens, *arguments)["hidden"][:, 0]
    moved = np.abs(before - after).max(-1) > 1e-9
    assert {(int(k), int(i)) for k, i in np.argwhere(moved)} == changed


def test_hidden_first_swaps_the_halves_of_the_projection():
    config = config_of()
    params = params_of(config)
    swapped = {**params, "mtp": {**params["mtp"], "projection": np.roll(params["mtp"]["projection"], 6, axis=1)}}
    other = config_of(conventions=Conventions(concat_order="hidden_first"))
    np.testing.assert_allclose(run(config, params)["hidden"], run(other, swapped)["hidden"])
    assert np.abs(run(config, params)["hidden"] - run(other, params)["hidden"])[1:].max() > 1e-3


def test_output_norm_of_the_main_model():
    config = config_of(conventions=Conventions(output_norm="main"))
    params = params_of(config)
    assert "output_norm" not in params["mtp"]
    own = {**params, "mtp": {**params["mtp"], "output_norm": stack([params["trunk"]["final_norm"]] * 2)}}
    np.testing.assert_allclose(run(config, params)["hidden"], run(config_of(), own)["hidden"])


@pytest.mark.parametrize(
    ("name", "value", "first_depth"), [("decoder_hidden", "before_norm", 1), ("recycled_hidden", "after_norm", 2)]
)
def test_where_a_hidden_state_is_taken_shows_from_the_next_depth_on(name, value, first_depth):
    params = params_of(config_of())
    base, other = run(config_of(), params), run(config_of(conventions=Conventions(**{name: value})), params)
    np.testing.assert_allclose(base["hidden"][:first_depth], other["hidden"][:first_depth])
    assert np.abs(base["hidden"] - other["hidden"])[first_depth].max() > 1e-3


def test_chain_from_the_decoder_makes_depths_independent():
    params = params_of(config_of())
    changed = {**params, "mtp": {**params["mtp"], "projection": params["mtp"]["projection"] * [[[2.0]], [[1.0]]]}}
    for chain, same in (("decoder", True), ("previous", False)):
        config = config_of(conventions=Conventions(chain=chain))
        before, after = run(config, params)["hidden"], run(config, changed)["hidden"]
        assert np.allclose(before[2], after[2]) == same, chain
        assert not np.allclose(before[1], after[1])


def test_shared_depths_are_one_module_twice():
    shared = config_of(dataclasses.replace(SEQUENTIAL, shared_depths=True))
    params = params_of(shared)
    twice = {**params, "mtp": stack([entry(params["mtp"], 0)] * 2)}
    np.testing.assert_allclose(run(shared, params)["hidden"], run(config_of(), twice)["hidden"])


def test_parallel_heads_like_the_last_block_predict_as_the_main_head():
    config = config_of(PARALLEL)
    params = params_of(config)
    last = entry(params["trunk"]["blocks"], 0)
    out = run(config, {**params, "mtp": {"block": stack([last] * 2)}})
    valid = out["targets"].valid
    for k in (1, 2):
        np.testing.assert_allclose(out["hidden"][k][valid[k]], out["hidden"][0][valid[k]])
    assert np.abs(run(config, params)["hidden"][1] - out["hidden"][1]).max() > 1e-3


def test_tied_embeddings_and_dense_models():
    config = config_of(NONE, tie_embeddings=True, num_experts=0)
    params = params_of(config)
    assert set(params["trunk"]) == {"embed", "blocks", "final_norm"}
    out = run(config, params)
    np.testing.assert_allclose(out["logits"], out["hidden"] @ params["trunk"]["embed"].T)
    assert out["aux"] == {"trunk": [], "mtp": []} and len(out["depth_losses"]) == 1


# ---------------------------------------------------------------------------------------------------------------
# loss


def _sharp(tokens, vocab, nll):
    """Logits that give each of these tokens exp(-nll) and share the rest evenly."""
    p = math.exp(-nll)
    out = np.full((*tokens.shape, vocab), math.log((1 - p) / (vocab - 1)))
    for where in np.ndindex(*tokens.shape):
        out[where][tokens[where]] = -nll
    return out


def test_loss_by_hand():
    segment_ids = np.array([[1, 1, 1, 2, 2, 0, 0, 0]])
    tokens = np.array([[1, 2, 3, 4, 5, 0, 0, 0]])
    built = targets.build(tokens, segment_ids, 2)  # valid targets: 3, 1, 0
    logits = np.stack([_sharp(built.targets[k], 7, nll) for k, nll in enumerate((0.1, 0.4, 9.0))])
    paper = loss_module.loss(logits, built, segment_ids[:, :5], 0.3, [1.0, 0.5])
    np.testing.assert_array_equal(paper["counts"], [3, 1, 0])
    np.testing.assert_allclose(paper["depth_losses"], [0.1, 0.4 / 3, 0.0])
    np.testing.assert_allclose(paper["loss"], 0.1 + 0.3 * (0.4 / 3) / 1.5)
    own = loss_module.loss(logits, built, segment_ids[:, :5], 0.3, [1.0, 0.5], "valid")
    np.testing.assert_allclose(own["loss"], 0.1 + 0.3 * 0.4 / 1.5)
    np.testing.assert_allclose(own["accuracy"], [1.0, 1.0, 0.0])
    np.testing.assert_array_equal(own["agreement_sums"], [(1, 1), (0, 0)])
    np.testing.assert_allclose(own["expected_tokens"], 2.0)


def test_z_loss_is_weighted_like_the_nll():
    built = targets.build(np.array([[1, 2, 3, 4]]), np.ones((1, 4), int), 1)  # two positions, all valid
    logits = np.stack([_sharp(built.targets[k], 7, 0.5) + shift for k, shift in enumerate((2.0, 3.0))])
    out = loss_module.loss(logits, built, np.ones((1, 2), int), 0.3, [1.0], z_loss_weight=0.01)
    np.testing.assert_allclose(out["z_losses"], [4.0, 9.0])
    np.testing.assert_allclose(out["loss"], 0.5 + 0.3 * 0.5 + 0.01 * (4.0 + 0.3 * 9.0))


def test_agreement_compares_with_the_main_head_k_positions_later():
    segment_ids = np.array([[1, 1, 1, 1, 2, 2, 2, 2]])
    built = targets.build(np.arange(8)[None], segment_ids, 1)  # T = 6
    says = np.array([[[0, 1, 2, 3, 4, 5]], [[1, 2, 9, 9, 9, 9]]])
    logits = np.stack([_sharp(says[k], 10, 0.1) for k in range(2)])
    # i = 0, 1 agree; i = 2 is invalid at depth 1; i = 3 lies before the boundary; 4 differs; 5 + 1 is past the row
    assert loss_module.agreement_sums(logits, built.valid, segment_ids[:, :6], 1) == (2, 3)


def test_agreement_requires_a_main_prediction_in_the_same_document():
    logits = np.zeros((2, 1, 3, 4))
    valid = np.array([[[1, 1, 0]], [[1, 1, 1]]], bool)
    assert loss_module.agreement_sums(logits, valid, np.array([[1, 1, 1]]), 1) == (1, 1)
    assert loss_module.agreement_sums(logits, valid, np.array([[1, 2, 2]]), 1) == (0, 0)


def test_expected_tokens():
    assert loss_module.expected_tokens([]) == 1.0
    np.testing.assert_allclose(loss_module.expected_tokens([0.5, 0.5]), 1.75)


def test_no_valid_target_is_no_nan():
    out = run(config_of(), params_of(config_of()), (1, 1, 1), 7)
    assert out["loss"] == 0.0 and np.isfinite(out["depth_losses"]).all()


@pytest.mark.parametrize(("mtp", "expected"), [(SEQUENTIAL, 0.15), (PARALLEL, 1.0), (NONE, 0.0)])
def test_default_weights(mtp, expected):
    """0.3 / D each for sequential depths, the plain sum for parallel heads."""
    config = config_of(mtp)
    out = run(config, params_of(config))
    losses = out["depth_losses"]
    np.testing.assert_allclose(out["loss"], losses[0] + expected * losses[1:].sum())


def test_depth_decay_weighs_the_depths():
    config = config_of(dataclasses.replace(SEQUENTIAL, depth_decay=0.5, weight=0.2))
    out = run(config, params_of(config))
    losses = out["depth_losses"]
    np.testing.assert_allclose(out["loss"], losses[0] + 0.2 * (losses[1] + 0.5 * losses[2]) / 1.5)
    heavier = run(config, params_of(config), mtp_weight=0.7)["loss"]
    np.testing.assert_allclose(heavier, losses[0] + 0.7 * (losses[1] + 0.5 * losses[2]) / 1.5)
