"""Learning rate, MTP weight and curriculum against values worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import Architecture, ModelConfig, MTPConfig, OptimizerConfig
from mtp_jax.mtp import kind_of
from mtp_jax.training import schedules


def _rates(num_steps, **kwargs):
    config = OptimizerConfig(**{"learning_rate": 2.0, "warmup_steps": 10, **kwargs})
    return np.asarray(jax.jit(jax.vmap(schedules.learning_rate(config, num_steps)))(jnp.arange(num_steps)))


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd", "deepseek"])
def test_warmup_starts_above_zero_and_reaches_the_peak(name):
    rates = _rates(1000, schedule=name)
    np.testing.assert_allclose(rates[:10], 2.0 * np.arange(1, 11) / 10, rtol=1e-6)
    assert rates.max() == pytest.approx(2.0)


def test_constant_stays():
    np.testing.assert_allclose(_rates(100, schedule="constant")[9:], 2.0)


def test_cosine_ends_at_the_final_fraction_and_is_halfway_in_the_middle():
    rates = _rates(110, schedule="cosine", final_fraction=0.1)
    assert rates[-1] == pytest.approx(0.2, rel=1e-5)
    assert rates[59] == pytest.approx(2.0 * 0.55, rel=1e-5)  # s = 60: halfway from 10 to 110
    assert (np.diff(rates[9:]) < 0).all()


def test_wsd_is_stable_then_linear():
    rates = _rates(100, schedule="wsd", final_fraction=0.0, decay_fraction=0.2)
    np.testing.assert_allclose(rates[9:80], 2.0)
    np.testing.assert_allclose(rates[80:], 2.0 * (1 - np.arange(1, 21) / 20), atol=1e-6)


def test_deepseek_matches_the_paper():
    rates = _rates(14_800, schedule="deepseek", learning_rate=2.2e-4, warmup_steps=2000)
    np.testing.assert_allclose(rates[1999:10_000], 2.2e-4, rtol=1e-5)
    assert rates[10_000 + 2150 - 1] == pytest.approx(2.2e-4 * 0.55, rel=1e-4)  # the middle of the cosine
    np.testing.assert_allclose(rates[14_300:14_633], 2.2e-5, rtol=1e-4)
    np.testing.assert_allclose(rates[14_634:], 7.3e-6, rtol=1e-4)
    assert rates[14_632] > 2e-5 and len(rates[14_633:]) == 167


@pytest.mark.parametrize("name", ["constant", "cosine", "wsd", "deepseek"])
def test_a_run_shorter_than_its_warmup_only_warms_up(name):
    np.testing.assert_allclose(_rates(5, schedule=name), 2.0 * np.arange(1, 6) / 10, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    assert _rates(1000, schedule="wsd", warmup_steps=0)[0] == pytest.approx(2.0)


def _weight(step, tokens, **kwargs):
    mtp = MTPConfig(**kwargs)
    default = kind_of(Architecture(ModelConfig(), mtp)).default_weight
    return float(jax.jit(schedules.mtp_weight(mtp, default))(step, tokens))


def test_mtp_weight_defaults_follow_the_papers():
    assert _weight(0, 0.0, kind="sequential", depth=2) == pytest.approx(0.3)
    assert _weight(0, 0.0, kind="parallel", depth=3) == 3.0
    assert _weight(0, 0.0, kind="sequential", weight=0.0) == 0.0


def test_mtp_weight_changes_at_the_boundary_step():
    kwargs = dict(kind="sequential", weight=0.3, weight_values=(0.1, 0.05), weight_boundaries=(100, 200))
    steps = {0: 0.3, 99: 0.3, 100: 0.1, 199: 0.1, 200: 0.05, 2**31 - 1: 0.05}
    for step, expected in steps.items():
        assert _weight(step, 0.0, **kwargs) == pytest.approx(expected), step


def test_mtp_weight_steps_beyond_float32_integers():
    kwargs = dict(kind="sequential", weight_values=(0.1,), weight_boundaries=(2**24 + 1,))
    assert _weight(2**24, 0.0, **kwargs) == pytest.approx(0.3)
    assert _weight(2**24 + 1, 0.0, **kwargs) == pytest.approx(0.1)


def test_mtp_weight_in_trillions_of_tokens():
    # DeepSeek-V3: 0.3 for 10 T tokens, then 0.1; 15 T overflow an int32
    kwargs = dict(kind="sequential", weight_values=(0.1,), weight_boundaries=(10 * 10**12,), weight_unit="tokens")
    assert _weight(0, np.float32(9.99e12), **kwargs) == pytest.approx(0.3)
    assert _weight(0, np.float32(10e12), **kwargs) == pytest.approx(0.1)
    assert _weight(0, np.float32(14.8e12), **kwargs) == pytest.approx(0.1)


def _active(mtp, num_steps):
    return np.asarray(jax.jit(jax.vmap(schedules.active_depths(mtp, mtp.depth, num_steps)))(jnp.arange(num_steps)))


def test_curriculum_forward_adds_depths_evenly():
    active = _active(MTPConfig(kind="parallel", depth=4, curriculum="forward"), 100)
    for step in range(100):
        expected = [step >= k / 4 * 100 for k in range(4)]
        np.testing.assert_array_equal(active[step], np.float32(expected))


def test_curriculum_reverse_takes_depths_away_and_keeps_the_first():
    active = _active(MTPConfig(kind="sequential", depth=3, curriculum="reverse"), 100)
    for step in range(100):
        expected = [k == 1 or step < (3 - k + 1) / 3 * 100 for k in (1, 2, 3)]
        np.testing.assert_array_equal(active[step], np.float32(expected))
    assert active[0].sum() == 3 and active[-1].sum() == 1


def test_no_curriculum_keeps_all_and_no_mtp_has_none():
    assert (_active(MTPConfig(kind="sequential", depth=3), 10) == 1).all()
    nothing = schedules.active_depths(MTPConfig(depth=3, curriculum="reverse"), 0, 10)
    assert jax.vmap(nothing)(jnp.arange(10)).shape == (10, 0)


def test_depth_weights():
    np.testing.assert_allclose(schedules.depth_weights(MTPConfig(depth_decay=0.6), 3), [1, 0.6, 0.36], rtol=1e-6)
    assert schedules.depth_weights(MTPConfig(), 0).shape == (0,)
