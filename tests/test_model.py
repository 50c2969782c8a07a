"""The model and its loss against the oracles: every attention, feed-forward, strategy and convention."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import config as configs
from mtp_jax import targets
from mtp_jax.config import (
    Config,
    GatedUnitConfig,
    Llama3Config,
    LocalConfig,
    ModelConfig,
    MTPConfig,
    RopeConfig,
    RouterConfig,
    TrainingConfig,
    YarnConfig,
    conventions,
    with_values,
)
from mtp_jax.layers.spec import layer_places
from mtp_jax.model import abstract_model, count_parameters, init
from mtp_jax.mtp import kind_of
from mtp_jax.training.step import loss_scales, make_loss, rows_of
from tests.bridge import packed_rows, to_model
from tests.reference.model import forward
from tests.reference.params import random_params

BASE = ModelConfig(
    vocab_size=24,
    num_layers=3,
    embed_dim=16,
    num_heads=2,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=4,
    v_head_dim=6,
    num_kv_heads=1,
    head_dim=8,
    ffn_dim=20,
    expert_dim=8,
)
MOE = replace(BASE, num_experts=8, num_experts_per_token=3, routed_scaling_factor=1.7)
GPT_OSS = replace(
    MOE,
    router=RouterConfig("softmax", logit_bias=True),
    expert_bias=True,
    num_shared_experts=0,
    gated_unit=GatedUnitConfig(1.702, 1.0, 0.8),
)
YARN = RopeConfig(theta=100.0, yarn=YarnConfig(factor=4.0, original_length=16))
YARN_MSCALES = with_values(YARN, {"yarn.mscale": 0.7, "yarn.mscale_all_dim": 1.0})
HALVES = RopeConfig(interleaved=False)

MODELS = {
    "mla": BASE,
    "mla_q_lora_two_eps_tied": replace(BASE, q_lora_rank=6, norm_eps=1e-2, latent_norm_eps=1e-4, tie_embeddings=True),
    "mla_yarn": replace(BASE, rope=YARN_MSCALES),
    "mla_yarn_not_truncated": replace(BASE, rope=with_values(YARN, {"yarn.truncate": False})),
    "gqa": replace(BASE, attention="gqa", rope=HALVES),
    "gqa_yarn": replace(BASE, attention="gqa", rope=replace(YARN_MSCALES, interleaved=False)),
    "gqa_qwen": replace(BASE, attention="gqa", rope=HALVES, qk_norm=True, qkv_bias=True, rotary_fraction=0.5),
    "gqa_llama3": replace(
        BASE, attention="gqa", rope=replace(HALVES, theta=50.0, llama3=Llama3Config(factor=8.0, original_length=24))
    ),
    "gqa_linear": replace(BASE, attention="gqa", rope=replace(HALVES, linear_factor=4.0)),
    "moe": MOE,
    "moe_ragged": replace(MOE, moe_dispatch="ragged"),
    "moe_groups_no_shared": replace(MOE, router=RouterConfig(num_groups=4, groups_per_token=2), num_shared_experts=0),
    "moe_v2": replace(
        MOE,
        router=RouterConfig("softmax", num_groups=4, groups_per_token=2, group_score="max", renormalize=False),
        num_shared_experts=2,
        num_dense_layers=0,
    ),
    "moe_biases": GPT_OSS,
    "moe_biases_ragged": replace(GPT_OSS, moe_dispatch="ragged"),
    "mla_window": replace(BASE, local=LocalConfig(window=3, sinks=True)),
    "gqa_flash": replace(
        BASE,
        attention="gqa",
        rope=HALVES,
        num_layers=6,
        num_heads=4,
        value_head_dim=6,
        value_scale=0.7,
        qkv_bias=True,
        output_bias=True,
        local=LocalConfig(window=2, pattern="GL", rope_theta=30.0, num_kv_heads=2, sinks=True),
    ),
    "moe_sinks_window": replace(
        MOE, attention="gqa", num_layers=6, num_kv_heads=2, sinks=True, local=LocalConfig(window=4, pattern="LLG")
    ),
}
SEQUENTIAL = MTPConfig(kind="sequential", depth=2, weight=0.7, depth_decay=0.6)
STRATEGIES = {
    "none": MTPConfig(),
    "sequential": SEQUENTIAL,
    "sequential_valid": replace(SEQUENTIAL, normalize="valid", depth=3),
    "sequential_shared": replace(SEQUENTIAL, shared_depths=True, depth=3),
    "sequential_recycled_normed": replace(SEQUENTIAL, recycled_hidden="after_norm"),
    "sequential_mimo": replace(SEQUENTIAL, family="mimo"),
    "sequential_flash": replace(SEQUENTIAL, family="mimo_v2_flash"),
    "sequential_window": replace(SEQUENTIAL, window=2, dense_ffn=True),
    "sequential_paper": replace(
        SEQUENTIAL, concat_order="hidden_first", decoder_hidden="before_norm", output_norm="main"
    ),
    "parallel": MTPConfig(kind="parallel", depth=1),
    "parallel_unmatched": MTPConfig(kind="parallel", depth=3, parameter_matched=False),
}
# Rotations, which a module for MTP has in common with any layer.
ROTATED = ("mla_yarn_not_truncated", "gqa_yarn", "gqa_llama3", "gqa_linear")
CASES = [(name, "none" if name in ROTATED else "sequential") for name in MODELS]
CASES += [("mla", name) for name in STRATEGIES if name not in ("sequential", "parallel")] + [("moe", "parallel")]
CASES += [("gqa_flash", "parallel"), ("moe_sinks_window", "sequential_window")]


@pytest.mark.parametrize(("model_name", "strategy_name"), CASES)
def test_model_and_loss_equal_the_oracle(model_name, strategy_name):
    config = Config(
        model=MODELS[model_name],
        mtp=STRATEGIES[strategy_name],
        training=TrainingConfig(z_loss_weight=0.01, loss_chunk=7),
    )
    chosen = conventions(config.mtp)
    reference_params = random_params(config, kind_of(config).num_main_layers, chosen.output_norm)
    depth, length = kind_of(config).depth, 12
    rng = np.random.default_rng(1)
    tokens, segments, positions = packed_rows(rng, 3, length + 1 + depth, config.model.vocab_size, num_padding=3)
    expected = forward(reference_params, config, tokens, segments, positions[:, :length], chosen)

    params, biases = to_model(reference_params)
    built = abstract_model(config.architecture)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda s: s.shape, built.params)
    rows = rows_of({"tokens": tokens, "segment_ids": segments, "positions": positions}, kind_of(config))
    out = jax.jit(lambda p, b, rows: built.merge(p, b)(rows))(params, biases, rows)

    valid = expected["targets"].valid
    np.testing.assert_array_equal(np.asarray(rows.weight_KBT), valid)
    np.testing.assert_allclose(np.asarray(out.hidden)[valid], expected["hidden"][valid], rtol=2e-4, atol=2e-4)
    places = layer_places(config.model, kind_of(config).num_main_layers)
    names = [name for name, _ in places if name in out.decoder_stats]  # of layers with experts
    assert len(names) == len(expected["aux"]["trunk"])
    pairs = [
        (stats, [aux for aux, of in zip(expected["aux"]["trunk"], names, strict=True) if of == name])
        for name, stats in out.decoder_stats.items()
    ]
    for stats, aux in (*pairs, (out.mtp_stats, expected["aux"]["mtp"])):
        aux = [a for a in aux if a is not None]
        assert (stats is None) == (not aux)
        if aux:
            np.testing.assert_array_equal(np.asarray(stats.load_E), [a["loads"] for a in aux])
            mean = np.asarray(stats.balance / stats.num_rows)
            np.testing.assert_allclose(mean, [a["balance"] for a in aux], rtol=1e-4)

    scales = loss_scales(config, rows.weight_KBT.sum((1, 2)), jnp.int32(0))
    quiet = replace(config, model=replace(config.model, balance_loss_weight=0.0))
    ones = jnp.ones(depth + 1)
    loss, aux = jax.jit(make_loss(quiet, built))(params, {}, biases, rows, scales, ones)
    np.testing.assert_allclose(float(loss), expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(np.asarray(aux.sums.nll), expected["nll_sums"], rtol=1e-4)
    np.testing.assert_array_equal(np.asarray(aux.sums.num), expected["counts"])
    np.testing.assert_allclose(np.asarray(aux.sums.correct), expected["accuracy"] * expected["counts"], atol=1e-3)
    agreed = np.asarray(expected["agreement_sums"]).reshape(-1, 2)
    np.testing.assert_array_equal(np.asarray(aux.sums.agree)[1:], agreed[:, 0])
    np.testing.assert_array_equal(np.asarray(aux.sums.num_compared)[1:], agreed[:, 1])


@pytest.mark.parametrize("strategy", ["sequential_shared", "parallel_unmatched"])
def test_rows_of_one_document_need_no_segments(strategy):
    config = Config(model=BASE, mtp=STRATEGIES[strategy])
    built = abstract_model(config.architecture)
    params, biases = jax.jit(lambda: init(config.architecture, 0))()
    tokens = jax.random.randint(jax.random.key(1), (2, 10 + kind_of(config).depth), 0, BASE.vocab_size)
    rows = targets.one_document_rows(tokens, kind_of(config).depth)
    run = jax.jit(lambda rows: built.merge(params, biases)(rows))
    jax.tree.map(np.testing.assert_array_equal, run(rows._replace(segments_KBT=None)), run(rows))


def test_a_matched_parallel_model_has_as_many_weights_as_the_next_token_model():
    none = count_parameters(Config(model=replace(BASE, num_layers=6)).architecture)
    parallel = count_parameters(
        Config(model=replace(BASE, num_layers=6), mtp=MTPConfig(kind="parallel", depth=3)).architecture
    )
    assert parallel.mtp_total > 0 and parallel.total + parallel.mtp_total == none.total


def test_every_family_has_conventions():
    for family in configs.CONVENTIONS:
        assert conventions(MTPConfig(family=family)) == configs.CONVENTIONS[family]
