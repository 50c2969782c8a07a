"""A step whose loss or gradients are not finite changes nothing, on any number of devices (training.skip_nonfinite)."""

import jax
import numpy as np
import pytest

from mtp_jax.training import gradient_groups
from mtp_jax.training.step import GROUP_NORMS
from tests.test_mistakes import rows, scalars, tiny, trainer_of

SMALL = ["--config.model.num_layers=2", "--config.training.skip_nonfinite=2"]


def batch(config, seed, weight=1.0):
    """A batch, one token of which has a loss weight that may be NaN."""
    out = rows(config, seed)
    out["loss_mask"] = np.ones(out["tokens"].shape, np.float32)
    out["loss_mask"][3, 5] = weight
    return out


def train(mesh, trainer, batches):
    """(states, metrics) after each batch; the first state is the initial one."""
    with jax.set_mesh(mesh):
        state = trainer.init()
        states, found = [jax.device_get(state)], []
        for each in batches:
            state, metrics = trainer.step(state, jax.device_put(each, trainer.batch_sharding))
            states.append(jax.device_get(state))
            found.append(scalars(metrics) | {GROUP_NORMS: np.asarray(metrics[GROUP_NORMS])})
    return states, found


def assert_same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("num_devices, num_parts", [(1, 1), (4, 2)])
def test_a_step_that_is_not_finite_leaves_the_state_as_it_is(num_devices, num_parts):
    config = tiny(*SMALL, f"--config.training.grad_accum_steps={num_parts}")
    good, bad, better = batch(config, 0), batch(config, 1, np.nan), batch(config, 2)
    mesh, trainer = trainer_of(config, num_devices)
    states, found = train(mesh, trainer, [good, bad, bad, better])
    for before, after in ((1, 2), (2, 3)):
        for name in ("params", "biases", "opt_state"):
            assert_same(states[before][name], states[after][name])
    assert [int(state["step"]) for state in states] == [0, 1, 2, 3, 4]
    assert [row["skipped_steps"] for row in found] == [0, 1, 2, 2]
    assert [np.isfinite(row["loss"]) for row in found] == [True, False, False, True]
    assert gradient_groups.not_finite(trainer.groups, found[1][GROUP_NORMS])
    assert not gradient_groups.not_finite(trainer.groups, found[3][GROUP_NORMS])
    # The state goes on as if the skipped batches had not been there: the schedule counts updates.
    expected, rates = train(mesh, trainer, [good, better])
    for name in ("params", "biases", "opt_state"):
        assert_same(states[4][name], expected[2][name])
    assert found[3]["learning_rate"] == rates[1]["learning_rate"] > found[0]["learning_rate"]


def test_without_the_setting_the_numbers_are_the_same_and_nothing_is_skipped():
    batches = [batch(tiny(), seed) for seed in (0, 1)]
    kept, with_setting = train(*trainer_of(tiny(*SMALL), 1), batches)
    without_setting = trainer_of(tiny(SMALL[0]), 1)
    plain, without = train(*without_setting, batches)
    for a, b in zip(with_setting, without, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6)
        assert "skipped_steps" in a and "skipped_steps" not in b
    assert kept[0].keys() == plain[0].keys()
    ruined, _ = train(*without_setting, [batch(tiny(), 1, np.nan)])
    assert not np.isfinite(ruined[1]["params"]["trunk"]["embed"]).all()
