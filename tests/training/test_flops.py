"""Counts against published models, FLOPs against a sum written out by hand."""

import dataclasses

import pytest

from mtp_jax.config import Config, DataConfig, ModelConfig, MTPConfig
from mtp_jax.model import count_parameters
from mtp_jax.training.flops import peak_flops, train_flops_per_token

DEEPSEEK_V3 = ModelConfig(
    vocab_size=129_280, num_layers=61, embed_dim=7168, num_heads=128, q_lora_rank=1536, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ffn_dim=18_432, num_experts=256, num_dense_layers=3,
    num_experts_per_token=8, num_shared_experts=1, expert_dim=2048,
)  # fmt: skip
DEEPSEEK_V2_LITE = ModelConfig(
    vocab_size=102_400, num_layers=27, embed_dim=2048, num_heads=16, kv_lora_rank=512,
    qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, ffn_dim=10_944, num_experts=64, num_dense_layers=1,
    num_experts_per_token=6, num_shared_experts=2, expert_dim=1408,
)  # fmt: skip
SMALL = ModelConfig(vocab_size=64, num_layers=6, embed_dim=16, ffn_dim=24, kv_lora_rank=8, expert_dim=12)
MOE = dataclasses.replace(SMALL, num_experts=4, num_experts_per_token=2, num_dense_layers=2, q_lora_rank=10)


def test_deepseek_v3_has_its_published_size():
    counts = count_parameters(Config(model=DEEPSEEK_V3, mtp=MTPConfig(kind="sequential", depth=1)).architecture)
    assert counts.total == pytest.approx(671.0e9, rel=5e-4)
    assert counts.active == pytest.approx(37e9, rel=0.02)
    assert counts.mtp_total == pytest.approx(11.5e9, rel=0.01)  # the 14 B released with it repeat embedding and head


def test_deepseek_v2_lite_has_its_published_size():
    counts = count_parameters(Config(model=DEEPSEEK_V2_LITE).architecture)
    assert counts.total == pytest.approx(15.7e9, rel=2e-3)
    assert counts.active == pytest.approx(2.4e9, rel=0.03)
    assert counts.mtp_total == counts.mtp_active == 0


def test_parameter_matched_heads_cost_the_baseline_nothing_but_their_logits():
    parallel, none = (Config(model=SMALL, mtp=MTPConfig(kind=kind, depth=2)) for kind in ("parallel", "none"))
    a, b = count_parameters(parallel.architecture), count_parameters(none.architecture)
    assert a.total + a.mtp_total == b.total
    more = train_flops_per_token(parallel) - train_flops_per_token(none)
    assert more == 6 * 2 * SMALL.embed_dim * SMALL.vocab_size


def test_flops_written_out_by_hand():
    data = DataConfig(sequence_length=100)
    moe = dataclasses.replace(MOE, q_lora_rank=0, num_layers=3)
    config = Config(model=moe, mtp=MTPConfig(kind="sequential", depth=2), data=data)
    d, heads, nope, rope, v, latent = 16, 4, 32, 16, 32, 8
    attention = d * heads * (nope + rope) + d * (latent + rope) + latent * heads * (nope + v) + heads * v * d
    dense, sparse = 3 * d * 24, d * 4 + (2 + 1) * 3 * d * 12
    blocks = 5 * attention + 2 * dense + 1 * sparse + 2 * (sparse + 2 * d * d)
    scores = 5 * 2 * heads * (nope + rope + v) * 100 / 2
    assert train_flops_per_token(config) == 6 * (blocks + 3 * d * 64) + 3 * scores


def test_shared_depths_compute_as_much_as_separate_ones():
    separate, shared = (
        Config(model=SMALL, mtp=MTPConfig(kind="sequential", depth=3, shared_depths=s)) for s in (False, True)
    )
    assert train_flops_per_token(separate) == train_flops_per_token(shared)
    totals = [count_parameters(each.architecture).mtp_total for each in (separate, shared)]
    assert totals[0] == 3 * totals[1]


@pytest.mark.parametrize(
    "kind, tflops",
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("TPU7x", 1153.5),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
    ],
)
def test_peak_flops(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


@pytest.mark.parametrize("kind", ["cpu", "Tesla T4", "NVIDIA L40", "", "NVIDIA A1000"])
def test_unknown_devices_have_no_peak(kind):
    assert peak_flops(kind) is None
