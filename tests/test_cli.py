"""The command line: mistakes are one line with the remedy and exit code 2, failed runs one line and exit code 1."""

import os
import re

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
from tests.commands import PLAIN, SMALL, run_here, run_process

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


PARALLEL = ("mtp.kind=parallel",)
TEXT = "data.source=text_files"

# overrides -> what the line must name: the key, its value, the remedy
UNUSABLE = {
    "unknown key": (["optimizer.learning_rat=1"], ["optimizer.learning_rat:", "did you mean optimizer.learning_rate?"]),
    "key of another section": (["training.depth=1"], ["training.depth:", "did you mean mtp.depth?"]),
    "a section": (["mtp=1"], ["mtp:", "no such config key"]),
    "no value": (["mtp.depth"], ["--config.mtp.depth:", "--config.section.key=value"]),
    "text for a number": (["training.num_steps=many"], ["training.num_steps='many'", "type int", "the command line"]),
    "a fraction for a count": (["training.num_steps=1.5"], ["training.num_steps=1.5", "type int"]),
    "a number for a switch": (["mtp.detach_decoder=1"], ["mtp.detach_decoder=1", "type bool"]),
    "bad choice": (["mtp.kind=serial"], ["mtp.kind='serial'", "'none' or 'parallel' or 'sequential'"]),
    "no steps": (["training.num_steps=0"], ["training.num_steps=0", "at least 1"]),
    "too deep": (["mtp.depth=99"], ["mtp.depth=99", "between 1 and 16"]),
    "no decoder left": ([*PARALLEL, "mtp.depth=3"], ["mtp.depth=3", "model.num_layers=4", "a depth of at most 2"]),
    "no layer for experts": (["model.num_dense_layers=4"], ["model.num_dense_layers=4", "set model.num_experts=0"]),
    "dense layers given up": (
        [*PARALLEL, "model.num_dense_layers=3"],
        ["mtp.depth=2", "model.num_dense_layers=3", "use mtp.parameter_matched=false"],
    ),
    "nothing to freeze around": (
        ["mtp.kind=none", "mtp.freeze_decoder=true"],
        ["mtp.freeze_decoder=true", "set mtp.kind"],
    ),
    "odd rotary": (["model.attention=gqa", "model.rotary_fraction=0.34"], ["model.rotary_fraction=0.34", "in pairs"]),
    "no key heads": (["model.attention=gqa", "model.num_kv_heads=0"], ["model.num_kv_heads=0", "at least 1"]),
    "below zero": (["optimizer.warmup_steps=-1"], ["optimizer.warmup_steps=-1", "at least 0"]),
    "not finite": (["optimizer.learning_rate=1e999"], ["optimizer.learning_rate=inf", "finite"]),
    "decay of one": (["optimizer.beta2=1.0"], ["optimizer.beta2=1.0", "below 1"]),
    "huge seed": (["seed=99999999999999999999"], ["seed=9999", "below 2^31"]),
    "schedule in halves": (["mtp.weight_values=(0.1,)"], ["mtp.weight_values=(0.1,)", "mtp.weight_boundaries=()"]),
    "batch and mesh": (["data.batch_size=6", "mesh.data=8"], ["data.batch_size=6", "data=8", "a multiple of 8"]),
    "batch and parts": (["training.grad_accum_steps=3"], ["training.grad_accum_steps=3", "a multiple of"]),
    "context axis": (["data.sequence_length=60", "mesh.context=8"], ["mesh.context=8", "data.sequence_length=60"]),
    "tensor axis": (["mesh.tensor=8"], ["mesh.tensor=8", "model.num_heads=4"]),
    "expert axis": (["model.num_experts=0", "mesh.expert=2"], ["mesh.expert=2", "no experts", "use mesh.data"]),
    "experts and mesh": (["model.num_experts=12", "mesh.expert=8"], ["mesh.expert=8", "model.num_experts=12"]),
    "mesh product": (["mesh.data=3"], ["data=3", "takes 3 devices, there are 8", "set one axis to -1"]),
    "two free axes": (["mesh.fsdp=-1"], ["mesh.data=-1 and mesh.fsdp=-1", "only one"]),
    "axis of no devices": (["mesh.tensor=0"], ["mesh.tensor=0", "at least 1"]),
    "small vocabulary": (["model.vocab_size=256"], ["model.vocab_size=256", "261", "use at least 261"]),
    "no tokenizer": (["data.tokenizer=none/tokenizer.json"], ["data.tokenizer=none/tokenizer.json", "use bytes"]),
    "no files": ([TEXT, "data.files=none/*.txt"], ["data.files=none/*.txt", "matches no file"]),
    "files not given": ([TEXT], ["data.files is empty"]),
    "a huge batch": (["data.batch_size=999999999999"], ["data.batch_size=999999999999", "at most 2^24"]),
    "a long queue": (["data.prefetch=1000000000"], ["data.prefetch=1000000000", "at most 2^10"]),
    "a queue larger than memory": (
        ["data.batch_size=16777216", "data.sequence_length=16777216"],
        ["data.batch_size=16777216", "data.sequence_length=16777216", "data.prefetch=4", "GiB", "lower one"],
    ),
    "too many workers": (["data.num_workers=10000"], ["data.num_workers=10000", "at most 2^9"]),
    "no splits": (["data.split=x"], ["data.split=x", "data.source=python_source has no splits"]),
    "a folder": ([TEXT, "data.files=configs"], ["data.files=configs", "is a folder", "configs/**/*.txt"]),
    "source nowhere": (["init_from=none/run"], ["init_from=none/run", "has no checkpoints/ folder"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_config_that_cannot_be_used(name, refused, tmp_path):
    overrides, expected = UNUSABLE[name]
    workdir = tmp_path / "run"
    line = refused(
        train_script.main, f"--config={TINY}", f"--workdir={workdir}", *(f"--config.{text}" for text in overrides)
    )
    for part in expected:
        assert part in line
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([f"--config={TINY}"], "--workdir"),
        (["--workdir=RUN"], "--config"),
        ([f"--config={TINY}", "--workdir=RUN", "--steps=3"], "--steps=3"),
        ([f"--config={TINY}", "--workdir=RUN", "configs/tiny.py"], "configs/tiny.py"),
        ([f"--config={TINY}", "--workdir=RUN", "--work=x"], "--work=x"),  # no flag is guessed from its beginning
    ],
)
def test_flags_that_are_missing_or_unknown(argv, expected, refused, tmp_path):
    line = refused(train_script.main, *(a.replace("RUN", str(tmp_path / "run")) for a in argv))
    assert expected in line and "--help" in line


CONFIG_FILES = {
    "missing": (None, ["no such file", "get_config()"]),
    "syntax error": ("def get_config(:\n", ["invalid syntax"]),
    "no function": ("x = 1\n", ["has no get_config()"]),
    "unknown key": (
        "from mtp_jax.config import default_config\n\n\ndef get_config():\n    config = default_config()\n"
        "    config.mtp.depht = 2\n    return config\n",
        ["(line 6)", "depht", "depth"],
    ),
    "unknown key in a dict": ("def get_config():\n    return {'mtp': {'depht': 2}}\n", ["mtp.depht", "mtp.depth?"]),
    "wrong type": ("def get_config():\n    return {'seed': 'one'}\n", ["seed='one'", "type int"]),
    "raises": ("def get_config():\n    return 1 / 0\n", ["(line 2)", "division by zero"]),
    "exits": ("import sys\n\nsys.exit(0)\n", ["(line 3)", "exits with 0", "return the config"]),
    "exits in the function": ("def get_config():\n    raise SystemExit\n", ["(line 2)", "exits with None"]),
    "exits with a message": ("def get_config():\n    exit('two\\nlines')\n", ["exits with 'two\\nlines'"]),
    "nothing returned": ("def get_config():\n    pass\n", ["returned NoneType", "ConfigDict"]),
}


@pytest.mark.parametrize("name", CONFIG_FILES)
def test_a_config_file_that_cannot_be_used(name, refused, tmp_path):
    text, expected = CONFIG_FILES[name]
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    line = refused(train_script.main, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    for part in (str(path), *expected):
        assert part in line


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
    _save_weights(tmp_path / "run", config)
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


def _save_weights(workdir, config):
    """A checkpoint of zeros in the shapes of config's model, as a run would save them."""
    built = abstract_model(config.architecture)
    state = {"params": built.params, "biases": built.biases, "step": jax.ShapeDtypeStruct((), jnp.int32)}
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


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "--workdir"),
        (["--workdir=none/run"], "--workdir=none/run: no such folder"),
        (["--workdir=configs"], "--workdir=configs: has no config.json"),
        (["--workdir=RUN"], "has no checkpoints yet; train it first"),
        (["--workdir=RUN", "--tasks=loss,aceptance"], "--tasks=aceptance: no such task; did you mean acceptance?"),
        (["--workdir=RUN", "--tasks="], "--tasks="),
        (["--workdir=RUN", "--limit=0"], "--limit=0: must be at least 1"),
        (["--workdir=RUN", "--limit=few"], "--limit"),
        (["--workdir=RUN", "--config.seed=1"], "--config.seed=1: eval.py takes the config of the workdir"),
        (["--workdir=RUN", "--out=x.json"], "--out=x.json"),
        (["--workdir=RUN", "--output=RUN/none/out.json"], "its folder does not exist"),
    ],
)
def test_eval_refuses_what_it_cannot_measure(argv, expected, refused, tmp_path):
    open_workdir(tmp_path / "run", load_config(TINY, ["--config.model.vocab_size=264"]))
    assert expected in refused(eval_script.main, *(a.replace("RUN", str(tmp_path / "run")) for a in argv))


def test_debug_shows_where(monkeypatch, capfd, tmp_path):
    argv = [f"--config={TINY}", f"--workdir={tmp_path / 'run'}", "--config.mtp.kind=serial", "--debug"]
    assert run_here(monkeypatch, train_script.main, *argv) == 2
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("error: mtp.kind='serial'")


def test_a_bug_shows_its_traceback(monkeypatch, capfd, tmp_path):
    def broken(*_):
        raise KeyError("first line\nsecond line")

    monkeypatch.setattr(loop, "train", broken)
    assert run_here(monkeypatch, train_script.main, f"--config={TINY}", f"--workdir={tmp_path / 'run'}") == 1
    lines = capfd.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback") and lines[-1].startswith("KeyError: ")
    assert any("in broken" in line for line in lines)


def test_help_lists_the_exit_codes(monkeypatch, capfd):
    for main in (train_script.main, eval_script.main):
        assert run_here(monkeypatch, main, "--help") == 0
        printed = capfd.readouterr().out
        assert all(re.search(rf"^  {code} +\w", printed, re.MULTILINE) for code in (0, 1, 2, 75, 76, 130))


@pytest.mark.usefixtures("one_device", "quick_compilation")
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
    done = run_process(
        "train.py", f"--config={TINY}", f"--workdir={workdir}", "--config.training.num_steps=2", env=PLAIN
    )
    assert done.returncode == 0, done.stderr
    assert "error" not in done.stderr and (workdir / "checkpoints" / "2").is_dir()
