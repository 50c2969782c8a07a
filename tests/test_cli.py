"""The command line: mistakes are one line with the remedy and exit code 2, failed runs one line and exit code 1."""

import os
import re
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import eval as eval_script
import train as train_script
from mtp_jax.config import CheckpointConfig, load_config
from mtp_jax.model import abstract_model
from mtp_jax.training import loop
from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.init_from import MODEL_PARTS
from mtp_jax.training.workdir import open_workdir
from tests.commands import DENSE, PLAIN, SMALL, run_here, run_process

TINY = "configs/tiny.py"


@pytest.fixture
def refused(monkeypatch, capfd, tmp_path):
    """Run a command that cannot be run: exit code 2, one line on stderr and nothing on stdout. Returns the line."""

    def check(main, *argv):
        before = files_under(tmp_path)
        code = run_here(monkeypatch, main, *argv)
        printed = capfd.readouterr()
        assert (code, printed.out) == (2, ""), printed
        (line,) = printed.err.splitlines()
        assert line.startswith("error: ")
        assert files_under(tmp_path) == before  # nothing half-written, the workdir included
        return line

    return check


def files_under(folder):
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def _not_utf8(path):
    path.write_bytes(b"caf\xe9\n" * 1000)


def _not_readable(path):
    if os.geteuid() == 0:
        pytest.skip("root reads everything")
    path.write_text("text\n" * 1000)
    path.chmod(0)


@pytest.mark.parametrize(("make", "problem"), [(_not_utf8, "not UTF-8"), (_not_readable, "cannot be read")])
def test_a_file_that_cannot_be_read_leaves_nothing_in_the_cache(make, problem, monkeypatch, capfd, tmp_path):
    cache, path = tmp_path / "cache", tmp_path / "text.txt"
    make(path)
    argv = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", "--config.data.source=text_files"]
    argv += [f"--config.data.files={path}", f"--config.data.cache_dir={cache}"]
    assert run_here(monkeypatch, train_script.main, *argv) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: ") and str(path) in line and problem in line
    assert not (tmp_path / "run").exists()
    assert {p.name for p in cache.iterdir()} <= {"sources", "tokens"}
    assert all(p.name.endswith(".lock") for p in cache.glob("*/*"))  # no entry, whole or half


def test_the_workdir_of_another_config_is_refused_with_both_values(refused, tmp_path):
    config = load_config(TINY, ["--config.model.vocab_size=264"])
    open_workdir(tmp_path / "run", config)
    _save_weights(tmp_path / "run", config, opt_state={"count": jnp.zeros(())})
    line = refused(
        train_script.main,
        *(f"--config={TINY}", f"--workdir={tmp_path / 'run'}"),
        *("--config.seed=7", "--config.mtp.kind=parallel", "--config.mesh.fsdp=2", "--config.checkpoint.every=3"),
    )
    assert "seed was 0 and is 7" in line and "mtp.kind was 'sequential' and is 'parallel'" in line
    assert "mesh" not in line and "checkpoint" not in line  # a continued run may change these


def test_a_workdir_that_is_a_file_is_refused(refused, tmp_path):
    (tmp_path / "run").write_text("")
    assert "is a file" in refused(train_script.main, f"--config={TINY}", f"--workdir={tmp_path / 'run'}")


def _save_weights(workdir, config, **state):
    """Saves a checkpoint of zeros in the shapes of config's model, and what else a run would save."""
    built = abstract_model(config.architecture)
    state |= {"params": built.params, "biases": built.biases, "step": jax.ShapeDtypeStruct((), jnp.int32)}
    with Checkpoints(workdir / "checkpoints", CheckpointConfig(async_save=False)) as saved:
        saved.save(1, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), state))


def test_init_from_a_run_that_has_saved_nothing(refused, tmp_path):
    (tmp_path / "source" / "checkpoints").mkdir(parents=True)
    argv = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", f"--config.init_from={tmp_path / 'source'}"]
    line = refused(train_script.main, *argv)
    assert f"init_from={tmp_path / 'source'}" in line and "the workdir of a trained run" in line


def test_init_from_another_main_model_names_the_weight_and_both_shapes(refused, tmp_path):
    _save_weights(tmp_path / "source", load_config(TINY, ["--config.model.vocab_size=264"]))
    argv = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", f"--config.init_from={tmp_path / 'source'}"]
    line = refused(train_script.main, *argv, "--config.model.embed_dim=32")
    assert "main model is another one" in line and "trunk." in line and "64" in line and "32" in line
    line = refused(train_script.main, *argv, "--config.mtp.kind=parallel")  # its decoder gives two blocks to the heads
    assert "mtp.parameter_matched=false" in line


def test_debug_shows_where(monkeypatch, capfd, tmp_path):
    argv = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", "--config.mtp.kind=serial", "--debug"]
    assert run_here(monkeypatch, train_script.main, *argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: mtp.kind='serial'")


def test_a_bug_shows_its_traceback(monkeypatch, capfd, tmp_path):
    def failing(*_):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(loop, "train", failing)
    assert run_here(monkeypatch, train_script.main, f"--config={TINY}", f"--workdir={tmp_path / 'run'}") == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("KeyError: ")
    assert any("in failing" in line for line in lines)


FAILING = """
    import os, sys, time
    from mtp_jax import cli
    cli.SECONDS_TO_EXIT = 1

    class Blocking:
        def __del__(self, read=os.read, end=os.pipe()[0]):
            read(end, 1)

    def main(argv):
        raise RuntimeError("a failure")

    {before}
    try:
        cli.run(main)
    except SystemExit:
        {after}
"""


@pytest.mark.parametrize(
    ("before", "after", "code", "out"),
    [
        ("block = Blocking(); block.cycle = block", "raise", 1, ""),  # the end of the interpreter never ends
        ("pass", "time.sleep(2); print('goes on')", 0, "goes on\n"),  # as in a notebook
    ],
)
def test_a_failed_command_ends_and_its_caller_may_go_on(before, after, code, out):
    program = textwrap.dedent(FAILING).format(before=before, after=after)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (code, out) and "RuntimeError: a failure" in done.stderr


def test_help_lists_the_exit_codes(monkeypatch, capfd):
    for main in (train_script.main, eval_script.main):
        assert run_here(monkeypatch, main, "--help") == 0
        printed = capfd.readouterr().out
        assert all(re.search(rf"^  {code} +\w", printed, re.MULTILINE) for code in (0, 1, 2, 75, 76, 130))


@pytest.mark.usefixtures("one_device")
def test_a_loss_that_is_not_finite_ends_the_run_and_is_in_no_checkpoint(monkeypatch, capfd, tmp_path):
    workdir = tmp_path / "run"
    argv = [f"--config={TINY}", f"--workdir={workdir}", *SMALL]
    argv += ["--config.checkpoint.every=1", "--config.training.log_every=100"]  # saved more often than looked at
    argv += [f"--config.optimizer.{text}" for text in ("learning_rate=1e15", "warmup_steps=0", "clip_norm=0")]
    assert run_here(monkeypatch, train_script.main, *argv) == 1
    (line,) = capfd.readouterr().err.splitlines()
    step = int(re.match(r"error: step (\d+): ", line)[1])
    assert "loss_mtp_1=" in line and "optimizer.learning_rate" in line
    with Checkpoints(workdir / "checkpoints") as saved:
        assert saved.steps() and max(saved.steps()) == step - 1
        for step in saved.steps():
            abstract = saved.saved_part(MODEL_PARTS, step)
            _, state = saved.restore_part(step, abstract)
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


def test_the_first_command_on_a_plain_machine(tmp_path):
    """Mistake 13: no distributed setup, no environment variable is needed."""
    workdir = tmp_path / "run"
    argv = [f"--config={TINY}", *DENSE, f"--workdir={workdir}", "--config.training.num_steps=2"]
    done = run_process("train.py", *argv, env=PLAIN)
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr and (workdir / "checkpoints" / "2").is_dir()
