"""Continuation of a run: earlier steps, starting over, settings that change by name, and refusals."""

import json
from dataclasses import replace

import pytest

from mtp_jax.config import Config, UserError, load_config, with_values
from mtp_jax.lease import Lease
from mtp_jax.training.loop import train
from mtp_jax.training.metrics import MetricsWriter
from mtp_jax.training.resume import Resume, bent_schedule, check, is_new, set_aside
from mtp_jax.training.workdir import changes, open_workdir, read_config

CONFIG = with_values(Config(), {"checkpoint.every": 10, "training.num_steps": 100})
LOWER = with_values(CONFIG, {"optimizer.learning_rate": 1e-4})
RATE = "optimizer.learning_rate"


def a_run(workdir, checkpoints=(), logged=0):
    """A workdir with a config, steps of checkpoints and metrics up to a step."""
    open_workdir(workdir, CONFIG)
    for step in checkpoints:
        commit(workdir, step)
    with MetricsWriter(workdir, None) as writer:
        for step in range(1, logged + 1):
            writer.write(step, {"loss": 1.0})
    return workdir


def commit(workdir, step):
    folder = workdir / "checkpoints" / str(step)
    folder.mkdir(parents=True)
    (folder / "commit_success.txt").write_text("")


def refused(function, *arguments, **kwargs):
    with pytest.raises(UserError) as error:
        function(*arguments, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_goes_on_from_the_newest_checkpoint_or_the_one_asked_for(tmp_path):
    workdir = a_run(tmp_path, checkpoints=(10, 20), logged=25)
    assert not is_new(Resume(), workdir) and not is_new(Resume(10), workdir)
    message = refused(is_new, Resume(15), workdir)
    assert message == f"--resume_step=15: no checkpoint of this step in {workdir}; it has 10, 20"


def test_starting_over_keeps_the_checkpoints_under_another_name(tmp_path):
    workdir = a_run(tmp_path, checkpoints=(10, 20), logged=25)
    assert is_new(Resume(0), workdir)
    assert set_aside(workdir) == str(tmp_path / "checkpoints.superseded")
    assert sorted(path.name for path in (tmp_path / "checkpoints.superseded").iterdir()) == ["10", "20"]
    assert is_new(Resume(0), workdir) and set_aside(workdir) is None
    commit(workdir, 10)
    assert set_aside(workdir) == str(tmp_path / "checkpoints.superseded.1")


def test_checkpoints_that_have_vanished_are_not_started_over_in_silence(tmp_path):
    message = refused(is_new, Resume(), a_run(tmp_path, logged=21))
    assert "its metrics.jsonl goes to step 21 and checkpoints/ has no checkpoint" in message
    assert "--resume_step=0" in message
    (tmp_path / "checkpoints").mkdir()  # an empty folder is no better
    refused(is_new, Resume(), tmp_path)
    assert is_new(Resume(0), tmp_path)
    assert "it has none" in refused(is_new, Resume(10), tmp_path)


def test_the_checkpoints_of_a_complete_short_run_that_have_vanished_are_missed(tmp_path):
    workdir = a_run(tmp_path, logged=5)
    open_workdir(workdir, with_values(CONFIG, {"training.num_steps": 5}))
    assert "goes to step 5 and checkpoints/ has no checkpoint" in refused(is_new, Resume(), workdir)
    (workdir / "checkpoints").mkdir()  # killed in its first save
    assert is_new(Resume(), workdir)


@pytest.mark.parametrize("logged", [0, 5, 10, 20])
def test_a_run_that_died_before_its_first_checkpoint_starts_again(tmp_path, logged):
    """At step 20 the checkpoint of step 10 may not have been committed."""
    assert is_new(Resume(), a_run(tmp_path, logged=logged))


def test_a_save_that_was_interrupted_is_no_lost_checkpoint(tmp_path):
    a_run(tmp_path, logged=12)
    (tmp_path / "checkpoints" / "10.orbax-checkpoint-tmp").mkdir(parents=True)
    assert is_new(Resume(), tmp_path)


def test_a_new_run_may_have_any_config_and_reports_it(tmp_path, capsys):
    a_run(tmp_path)
    assert RATE in refused(open_workdir, tmp_path, LOWER)
    open_workdir(tmp_path, replace(LOWER, seed=3), is_new=True)
    assert read_config(tmp_path) == replace(LOWER, seed=3)
    assert f"starting over with {RATE} 0.001 -> 0.0001, seed 0 -> 3\n" in capsys.readouterr().out


def test_a_refusal_names_the_flag_and_the_other_way(tmp_path):
    a_run(tmp_path, checkpoints=(10,))
    message = refused(changes, LOWER, tmp_path)
    assert message == (
        f"--workdir={tmp_path}: holds another run: {RATE} was 0.001 and is 0.0001; set them back, go on with the new "
        f"value by --change={RATE}, or start from its weights in another folder with --config.init_from={tmp_path}"
    )
    both = refused(changes, replace(LOWER, seed=1), tmp_path, by_name=[RATE])
    assert "seed was 0 and is 1" in both and RATE not in both and "--change" not in both


def test_a_change_by_name_is_made_and_recorded(tmp_path, capsys):
    a_run(tmp_path, checkpoints=(10,))
    open_workdir(tmp_path, LOWER, by_name=[RATE], step=10)
    assert f"continuing with {RATE} 0.001 -> 0.0001" in capsys.readouterr().out
    constant = with_values(LOWER, {"optimizer.schedule": "constant", "training.log_every": 3})
    open_workdir(tmp_path, constant, by_name=["optimizer.schedule"], step=20)
    history = json.loads((tmp_path / "config.json").read_text())["history"]
    assert history == [
        {"step": 10, "key": RATE, "old": 1e-3, "new": 1e-4},
        {"step": 20, "key": "optimizer.schedule", "old": "cosine", "new": "constant"},
    ]
    # The record is no part of the config: the same command goes on, and the file can start another run.
    assert read_config(tmp_path) == constant == load_config(str(tmp_path / "config.json"))
    open_workdir(tmp_path, constant)
    assert json.loads((tmp_path / "config.json").read_text())["history"] == history


def test_flags_that_no_run_can_follow_are_refused():
    check(Resume(100, (RATE, "optimizer.weight_decay", "training.num_steps")), CONFIG)
    assert "must lie between 0 and training.num_steps=100" in refused(check, Resume(101), CONFIG)
    assert "must lie between 0" in refused(check, Resume(-1), CONFIG)
    for key in ("seed", "optimizer.learning", "model.num_layers", "optimizer.name"):
        message = refused(check, Resume(None, (key,)), CONFIG)
        assert message.startswith(f"--change={key}: cannot change in a run; by name may change {RATE}, ")


@pytest.mark.parametrize("schedule, bends", [("cosine", True), ("wsd", True), ("deepseek", True), ("constant", False)])
def test_a_longer_run_that_bends_its_schedule_is_noted(schedule, bends):
    old = with_values(CONFIG, {"optimizer.schedule": schedule, "optimizer.warmup_steps": 5})
    longer = with_values(old, {"training.num_steps": 300})
    line = bent_schedule(old, longer, 100)
    assert (line is not None) == bends
    if line:
        assert line.startswith(f"training.num_steps 100 -> 300 bends the schedule (optimizer.schedule={schedule}): ")
    assert bent_schedule(old, longer, 3) is None  # the warmup has not ended
    assert bent_schedule(old, old, 100) is None
    assert bent_schedule(old, with_values(longer, {RATE: 1e-5}), 100) is None  # asked for by name


def test_a_workdir_in_use_is_not_read_by_another_process(tmp_path, caplog, one_device):
    """A run takes the lease before it reads the workdir: else it could start over what another one is about to save."""
    config = load_config("configs/tiny.py", ["--config.data.source=synthetic", "--config.data.sequence_length=16"])
    a_run(tmp_path, logged=5)
    with Lease(tmp_path):
        message = refused(train, config, str(tmp_path))
    assert "is in use by a run on host" in message and not caplog.records
