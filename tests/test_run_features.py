"""Runs with heads on trained models, schedules, validation, profiles and trouble."""

import json
import math
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax.config import UserError, load_config
from mtp_jax.mtp import kind_of
from mtp_jax.training import loop
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.metrics import read_metrics
from mtp_jax.training.run import restore, set_up, with_vocabulary
from mtp_jax.training.validation import validate
from mtp_jax.training.workdir import open_workdir
from tests.commands import SMALL
from tests.test_mistakes import rows, run_steps, tiny

TINY = "configs/tiny.py"
UNTIMED = ("tokens_per_second", "mfu", "peak_memory_gib")


def metrics(workdir):
    return read_metrics(workdir / "metrics.jsonl")


# ---------------------------------------------------------------------------------------------------------------
# Heads on a trained model


def small(*overrides):
    return load_config(TINY, [*SMALL, *overrides])


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.usefixtures("one_device")
def test_heads_bolted_on_to_a_frozen_model_leave_it_as_it_is(tmp_path):
    source, bolted = tmp_path / "source", tmp_path / "bolted"
    loop.train(small("--config.mtp.kind=none", "--config.training.num_steps=4"), str(source))
    overrides = ["--config.mtp.freeze_decoder=true", f"--config.init_from={source}", "--config.training.num_steps=3"]
    config = small(*overrides, "--config.optimizer.weight_decay=0.5")
    before = restore(str(source)).state
    fresh = set_up(config).trainer.init()
    after = loop.train(config, str(bolted)).state
    for part in ("params", "biases"):
        wanted = leaves(before[part]["trunk"])
        assert any(np.abs(leaf).max() > 0 for leaf in wanted.values())
        for name, leaf in leaves(after[part]["trunk"]).items():
            np.testing.assert_array_equal(leaf, wanted[name], err_msg=name)
        changed = leaves(after[part]["mtp"])
        for name, leaf in leaves(fresh[part]["mtp"]).items():
            assert (leaf != changed[name]).any(), name
    assert not any("trunk" in name for name in leaves(after["opt_state"]))  # no moments for what does not train
    lines = metrics(bolted)
    assert lines[0]["loss_main"] == pytest.approx(metrics(source)[-1]["loss_main"], rel=0.05)
    assert lines[-1]["loss_mtp_1"] < lines[0]["loss_mtp_1"]

    source.rename(tmp_path / "moved")  # it was read once; a run that has checkpoints of its own needs it no more
    assert restore(str(bolted)).step == 3
    assert loop.train(config, str(bolted)).step == 3
    shorter = replace(config, training=replace(config.training, num_steps=2))
    with pytest.raises(UserError, match="training.num_steps=2: the run in .* is at step 3 already"):
        loop.train(shorter, str(bolted))


def test_a_run_is_measured_on_devices_that_do_not_divide_its_batch(tmp_path):
    config = small("--config.training.num_steps=1", "--config.data.batch_size=6", "--config.mesh.data=2")
    with pytest.raises(UserError, match="takes 2 devices, there are 8"):
        loop.train(config, str(tmp_path / "run"))
    open_workdir(tmp_path / "run", with_vocabulary(config, 261))
    run = set_up(config, num_devices=2)
    with jax.set_mesh(run.mesh), Checkpoints(tmp_path / "run" / "checkpoints", config.checkpoint) as saved:
        saved.save(1, run.trainer.init())
    restored = restore(str(tmp_path / "run"))
    assert (restored.step, restored.mesh.size) == (1, 6)


# With eps = 1 an Adam step is g / (|g| + 1): it tells gradients apart, where the usual eps makes signs of them.
ONE_PLAIN_STEP = [
    *("--config.optimizer.learning_rate=1.0", "--config.optimizer.schedule=constant", "--config.optimizer.eps=1.0"),
    *("--config.optimizer.warmup_steps=0", "--config.optimizer.weight_decay=0.0", "--config.optimizer.clip_norm=0.0"),
]


def decoder_after_a_step(*overrides):
    config = tiny(*ONE_PLAIN_STEP, "--config.mtp.parameter_matched=false", "--config.model.num_layers=2", *overrides)
    batch = rows(tiny())
    length = config.data.sequence_length + 1 + kind_of(config).depth
    state, _ = run_steps(config, [{name: array[:, :length] for name, array in batch.items()}])
    return leaves(state["params"]["trunk"])


@pytest.fixture(scope="module")
def next_token_step():
    return {
        tied: decoder_after_a_step("--config.mtp.kind=none", f"--config.model.tie_embeddings={tied}") for tied in TIED
    }


TIED = ("false", "true")


def compare_detached(next_token_step, kind, tied, is_compared):
    heavy = [f"--config.mtp.kind={kind}", f"--config.model.tie_embeddings={tied}", "--config.mtp.weight=100.0"]
    detached = decoder_after_a_step(*heavy, "--config.mtp.detach_decoder=true")
    wanted = next_token_step[tied]
    assert set(detached) == set(wanted)
    return [
        name
        for name, leaf in detached.items()
        if is_compared(name) and not np.allclose(leaf, wanted[name], rtol=1e-4, atol=1e-6)
    ]


def is_head(name, tied):
    return name == ("['embed']" if tied == "true" else "['unembed']")


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_detached_heads_leave_the_gradients_of_the_decoder_alone(kind, next_token_step):
    different = compare_detached(next_token_step, kind, "false", lambda name: not is_head(name, "false"))
    assert not different, f"an MTP gradient reaches {different}"


@pytest.mark.parametrize("tied", TIED)
def test_detached_heads_leave_the_shared_output_head_alone(tied, next_token_step):
    different = compare_detached(next_token_step, "sequential", tied, lambda name: is_head(name, tied))
    assert not different, f"mtp.detach_decoder: no MTP gradient may reach the main model, and one reaches {different}"


# ---------------------------------------------------------------------------------------------------------------
# Schedules


@pytest.mark.usefixtures("one_device")
def test_lambda_and_the_curriculum_show_in_the_metrics(tmp_path):
    config = small(
        *("--config.training.num_steps=6", "--config.model.balance_loss_weight=0.0"),
        *("--config.mtp.weight=0.5", "--config.mtp.weight_values=(0.1,)", "--config.mtp.weight_boundaries=(4,)"),
        "--config.mtp.curriculum=forward",
    )
    loop.train(config, str(tmp_path))
    lines = metrics(tmp_path)
    assert [row["mtp_lambda"] for row in lines] == pytest.approx([0.5] * 4 + [0.1] * 2)
    for row in lines:
        active = row["loss_mtp_1"] + (row["loss_mtp_2"] if row["step"] > 3 else 0)  # depth 2 from half way on
        assert row["loss"] == pytest.approx(row["loss_main"] + row["mtp_lambda"] * active / 2, rel=1e-5), row["step"]


# ---------------------------------------------------------------------------------------------------------------
# Validation during training, profiles, goodput, trouble

SHORT = ["--config.training.num_steps=8", "--config.checkpoint.every=4", "--config.mtp.depth=1"]
VALIDATED = [*SHORT, "--config.training.eval_every=3", "--config.training.log_every=2"]
VALUES = ["loss_main", "loss_mtp_1", "bits_per_byte", "agreement_mtp_1", "tokens_per_forward"]


@pytest.mark.usefixtures("one_device")
def test_validation_during_training_changes_no_weight_and_resumes(tmp_path, capsys):
    plain = loop.train(small(*SHORT), str(tmp_path / "plain")).state
    config = small(*VALIDATED, "--config.training.profile=2:3")
    workdir = tmp_path / "run"
    run = loop.train(config, str(workdir))
    printed = capsys.readouterr().out
    for part in ("params", "biases", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, plain[part], run.state[part])
    lines = metrics(workdir)
    assert [row["step"] for row in lines] == [2, 3, 4, 6, 8]
    names = {f"validation_{name}" for name in VALUES}
    for row in lines:
        found = {name for name in row if name.startswith("validation_")}
        assert found == (names if row["step"] in (3, 6) else set())
        if found:
            assert row["validation_bits_per_byte"] == pytest.approx(row["validation_loss_main"] / math.log(2), rel=0.01)
            assert row["validation_tokens_per_forward"] == pytest.approx(1 + row["validation_agreement_mtp_1"])
            assert f"validation {row['validation_loss_main']:.3f}" in printed
    # It is what eval.py measures on the same weights.
    with jax.set_mesh(run.mesh):
        results = validate(run, run.state, config.training.eval_batches)
    (held_out,) = results.values()
    assert held_out[0].loss < lines[1]["validation_loss_main"] and held_out[0].num_targets > 50

    assert list((workdir / "profile").rglob("*.xplane.pb")) and "profile  steps up to 3 in " in printed
    goodput = json.loads((workdir / "goodput.json").read_text())
    assert (goodput["first_step"], goodput["last_step"]) == (0, 8) and "goodput  " in printed
    assert all(goodput["seconds"][cause] > 0 for cause in ("startup", "step", "checkpoint", "validation", "profile"))

    # From an earlier step by name: the same lines come again, and the newer checkpoint is out of the way.
    resumed = loop.train(config, str(workdir), loop.Resume(step=4))
    for part in ("params", "biases", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, plain[part], resumed.state[part])
    for row, wanted in zip(metrics(workdir), lines, strict=True):
        assert {k: v for k, v in row.items() if k not in UNTIMED} == {
            k: v for k, v in wanted.items() if k not in UNTIMED
        }
    assert "resumed  from step 4\n" in capsys.readouterr().out


@pytest.mark.usefixtures("one_device")
def test_a_diverged_run_is_rescued_in_its_workdir(tmp_path, capsys, caplog):
    """The learning rate that ruins it is replaced before the first checkpoint freely, and after it by name."""
    ruinous = ["--config.optimizer.learning_rate=1e30", "--config.optimizer.warmup_steps=0"]
    steady = ["--config.optimizer.learning_rate=1e-3", "--config.optimizer.warmup_steps=0"]
    workdir = str(tmp_path / "run")
    with pytest.raises(loop.NonFiniteLoss, match="step 2: loss=nan, .*; there is no checkpoint yet, so") as error:
        loop.train(small(*SHORT, *ruinous), workdir)
    assert "gradient not finite in " in str(error.value)
    loop.train(small(*SHORT, *steady, "--config.training.num_steps=4"), workdir)
    assert "starting over with optimizer.learning_rate 1e+30 -> 0.001" in capsys.readouterr().out

    with pytest.raises(UserError, match="--change=optimizer.learning_rate, or start from its weights"):
        loop.train(small(*SHORT, *ruinous), workdir)
    by_name = loop.Resume(changes=("optimizer.learning_rate",))
    skipping = small(*SHORT, *ruinous, "--config.training.skip_nonfinite=2", "--config.checkpoint.every=100")
    with pytest.raises(loop.NonFiniteLoss, match="step 8: .* in 3 steps in a row, training.skip_nonfinite=2; cont"):
        loop.train(skipping, workdir, by_name)
    assert "training.num_steps 4 -> 8" in capsys.readouterr().out and "; skipped" in caplog.text
    assert loop.train(small(*SHORT, *steady), workdir, by_name).step == 8
    history = json.loads((tmp_path / "run" / "config.json").read_text())["history"]
    assert [(row["step"], row["new"]) for row in history] == [(4, 1e30), (4, 1e-3)]
    assert [row["step"] for row in metrics(tmp_path / "run")] == list(range(1, 9))
    assert loop.train(small(*SHORT, *steady), workdir, loop.Resume(step=0)).step == 8
    assert (tmp_path / "run" / "checkpoints.superseded" / "8").is_dir()
