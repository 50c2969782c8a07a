"""Stages of the training loop, one at a time: a session with metrics of our own and no model."""

import math
import types
from dataclasses import replace

import numpy as np
import pytest

from mtp_jax.config import Config, UserError, validate, with_values
from mtp_jax.training.clock import Clock
from mtp_jax.training.metrics import MetricsWriter
from mtp_jax.training.stages import NonFiniteLoss, ReportSpikes, Session, Stage, StopAtNonFinite
from mtp_jax.training.stages.goodput import summary
from mtp_jax.training.step import GROUP_NORMS

GROUPS = [("decoder blocks", 0), ("decoder blocks", 1), ("embedding", None)]


def session(workdir, stages, steps_saved=(), step=0, **settings):
    config = with_values(Config(), {f"training.{name}": value for name, value in settings.items()})
    run = types.SimpleNamespace(config=config, trainer=types.SimpleNamespace(groups=GROUPS))
    saved = types.SimpleNamespace(steps=lambda: list(steps_saved))
    out = Session(run, workdir, saved, Clock(), step, {})
    out.stages = stages
    for stage in stages:
        stage.start(out)
    return out


def metrics(loss_main=2.0, norms=(1.0, 2.0, 3.0), **values):
    norms = np.asarray(norms, np.float32)
    found = {"loss": loss_main, "loss_main": loss_main, "loss_mtp_1": 3.0, "moe_balance_loss": 1.0}
    return found | {"grad_norm": float(np.sqrt((norms**2).sum())), GROUP_NORMS: norms, "accuracy_main": 0.0} | values


def feed(session, rows):
    for row in rows:
        session.advance({}, row)
    session.fetch()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_step_term_and_layers(tmp_path):
    with pytest.raises(NonFiniteLoss) as error:
        feed(
            session(tmp_path, [StopAtNonFinite()]),
            [metrics(), metrics(loss=math.nan, loss_mtp_1=math.inf, norms=(math.nan, 1, math.inf)), metrics()],
        )
    assert str(error.value) == (
        "step 2: loss=nan, loss_mtp_1=inf, grad_norm=nan; gradient not finite in decoder blocks[0], embedding; there "
        "is no checkpoint yet, so lower optimizer.learning_rate or raise optimizer.warmup_steps and run the command "
        "again"
    )


@pytest.mark.parametrize("name", ["loss_mtp_1", "moe_balance_loss"])
def test_every_term_is_named(tmp_path, name):
    with pytest.raises(NonFiniteLoss, match=f"step 1: {name}=nan; there is no checkpoint"):
        feed(session(tmp_path, [StopAtNonFinite()]), [metrics(**{name: math.nan})])


def test_the_advice_is_what_the_workdir_allows(tmp_path):
    with pytest.raises(NonFiniteLoss) as error:
        feed(session(tmp_path, [StopAtNonFinite()], steps_saved=(10, 20)), [metrics(loss=math.nan)])
    assert str(error.value).endswith(
        "continue from step 20 with a lower --config.optimizer.learning_rate and --change=optimizer.learning_rate, "
        "from an earlier step with --resume_step=10, or with a higher --config.training.skip_nonfinite"
    )


def test_steps_in_a_row_are_skipped_up_to_the_limit(tmp_path, caplog):
    bad, good = metrics(loss=math.nan), metrics()
    guard = session(tmp_path, [StopAtNonFinite()], skip_nonfinite=2)
    feed(guard, [bad, bad, good, bad, bad, good])
    assert [record.step for record in caplog.records] == [1, 2, 4, 5]
    assert caplog.messages[0] == "step 1: loss=nan; skipped"
    with pytest.raises(NonFiniteLoss, match="step 9: loss=nan in 3 steps in a row, training.skip_nonfinite=2; "):
        feed(guard, [bad, bad, bad])


def test_a_term_that_is_not_finite_in_a_step_that_was_applied_is_not_skipped(tmp_path):
    """A depth of weight 0 does not reach the loss; its weights may be ruined all the same."""
    with pytest.raises(NonFiniteLoss, match="step 1: loss_mtp_1=nan; "):
        feed(session(tmp_path, [StopAtNonFinite()], skip_nonfinite=2), [metrics(loss_mtp_1=math.nan)])


def descent(num):
    """Losses that fall as in a training: no spikes."""
    rng = np.random.default_rng(0)
    return [2.0 + 3.0 * math.exp(-i / 20) + 0.05 * rng.standard_normal() for i in range(num)]


def counted(session, losses, norms=(1.0, 2.0, 3.0)):
    rows = [metrics(loss, norms) for loss in losses]
    counts = []
    session.stages = [*session.stages, types.SimpleNamespace(on_metrics=lambda s, step, m: counts.append(m))]
    feed(session, rows)
    return [row["loss_spikes"] for row in counts]


def test_a_falling_loss_has_no_spikes(tmp_path, caplog):
    assert set(counted(session(tmp_path, [ReportSpikes()]), descent(300))) == {0} and not caplog.records


def test_a_spike_is_reported_once_and_counted(tmp_path, caplog):
    losses = descent(300)
    losses[200:203] = [6.0, 7.0, 6.5]
    losses[250] = 9.0
    counts = counted(session(tmp_path, [ReportSpikes()]), losses, norms=(1.0, 50.0, 3.0))
    assert counts[199] == 0 and set(counts[200:250]) == {1} and set(counts[250:]) == {2}
    assert [record.step for record in caplog.records] == [201, 251]
    assert "loss spike: loss_main=6.000, " in caplog.messages[0] and "\n" not in caplog.messages[0]
    assert caplog.messages[0].endswith("the largest gradient norm is that of decoder blocks[1], 50")
    assert caplog.records[0].process_index == 0 and caplog.records[0].name == "mtp_jax"


def test_few_losses_and_a_threshold_of_zero_report_nothing(tmp_path, caplog):
    assert set(counted(session(tmp_path, [ReportSpikes()]), [2.0] * 10 + [100.0])) == {0}
    rows = [metrics(loss) for loss in [2.0] * 100 + [100.0]]
    feed(session(tmp_path, [ReportSpikes()], spike_threshold=0.0), rows)
    assert not caplog.records and "loss_spikes" not in rows[-1]


def test_a_resumed_run_finds_the_same_spikes(tmp_path):
    losses = descent(60)
    losses[20], losses[50] = 9.0, 9.0
    counts = counted(session(tmp_path, [ReportSpikes()]), losses)
    with MetricsWriter(tmp_path, None) as writer:
        for step in range(1, 41):
            writer.write(step, {"loss_main": losses[step - 1], "loss_spikes": counts[step - 1]})
    assert counted(session(tmp_path, [ReportSpikes()], step=30), losses[30:]) == counts[30:]


class Recorder(Stage):
    def __init__(self):
        self.seen = []

    def on_metrics(self, session, step, metrics):
        self.seen.append((step, metrics["loss"]))


def test_metrics_wait_until_they_are_fetched_and_never_pile_up(tmp_path):
    recorder = Recorder()
    running = session(tmp_path, [recorder])
    for loss in range(10):
        running.advance({}, {"loss": float(loss)})
    assert recorder.seen == []
    for loss in range(10, 300):
        running.advance({}, {"loss": float(loss)})
    assert 0 < len(recorder.seen) < 300
    running.fetch()
    assert recorder.seen == [(loss + 1, float(loss)) for loss in range(300)]


def test_a_step_with_values_of_a_stage_is_logged_whatever_log_every(tmp_path):
    running = session(tmp_path, [], log_every=4, num_steps=9)
    found = []
    for step in range(1, 10):
        running.advance({}, {})
        running.values |= {"validation_loss_main": 1.0} if step == 3 else {}
        found += [step] if running.is_grid_step else []
    assert found == [3, 4, 8, 9]


def test_time_is_divided_by_cause_and_pauses_are_not_training():
    clock = Clock()
    with clock.counting("step"):
        pass
    assert clock.seconds["step"] == 0.0  # before the start is over everything is startup
    clock.started()
    with clock.counting("step"), clock.counting("checkpoint"):
        sum(range(10_000))
    clock.training_seconds()
    clock.move(clock.seconds["checkpoint"], "checkpoint", "validation")
    assert clock.seconds["checkpoint"] == 0.0 < clock.seconds["validation"]
    expected = clock.seconds["step"] + clock.seconds["other"]
    assert clock.training_seconds() == pytest.approx(expected, abs=1e-2)
    assert sum(clock.seconds.values()) == clock.total()


def test_the_summary_names_the_causes():
    clock = Clock()
    clock.seconds = dict.fromkeys(clock.seconds, 0.0) | {"startup": 20.0, "step": 75.0, "data": 4.99, "other": 0.01}
    assert summary(clock) == "goodput  75.0% of 1:40 in steps; startup 20.0%, data 5.0%"


@pytest.mark.parametrize("text", ["5", "0:3", "4:3", "a:b", "1:2:3", "-1:3"])
def test_a_profile_that_is_no_range_of_steps_is_refused(text):
    with pytest.raises(UserError, match="training.profile='.*': must be the first and the last step to trace"):
        validate(with_values(Config(), {"training.profile": text}), 1)


def test_validation_without_held_out_documents_is_refused():
    config = with_values(Config(), {"training.eval_every": 5, "data.validation_fraction": 0.0})
    with pytest.raises(UserError, match="training.eval_every=5: there are no held-out documents"):
        validate(config, 1)
    validate(replace(config, training=Config().training), 1)
