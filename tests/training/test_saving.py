"""The schedule of saves, with and without failures."""

import pytest

from mtp_jax.training.saving import SaveSchedule


def attempts(every, num_steps, fails):
    """Steps at which a run saves; `fails(step)` decides whether a save does."""
    schedule, out = SaveSchedule(every), []
    for step in range(1, num_steps + 1):
        if schedule.is_due(step):
            out.append(step)
            schedule.started()
            if fails(step):
                schedule.failed(step)
            else:
                schedule.succeeded()
    return out


def test_saves_are_regular_while_they_succeed():
    assert attempts(5, 21, lambda step: False) == [5, 10, 15, 20]


def test_attempts_after_failures_come_sooner_and_then_less_often():
    assert attempts(32, 130, lambda step: step >= 64) == [32, 64, 66, 70, 78, 94, 96, 128]
    assert attempts(32, 130, lambda step: 64 <= step < 70) == [32, 64, 66, 70, 96, 128]


@pytest.mark.parametrize("every", [1, 2, 3, 16, 17, 500])
def test_no_regular_attempt_is_left_out(every):
    assert set(attempts(every, 40 * every, lambda step: True)) >= set(range(every, 40 * every, every))
