"""Whole runs: the same numbers on any mesh and after any interruption, and what a run leaves behind."""

import json
import math
import re
import shutil
import signal
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from mtp_jax import data
from mtp_jax.config import MeshConfig, load_config, to_dict
from mtp_jax.mtp import KINDS, kind_of
from mtp_jax.training import loop
from mtp_jax.training.metrics import read_metrics
from mtp_jax.training.run import with_vocabulary
from mtp_jax.training.workdir import read_config
from tests.commands import QUICK, command, run_process
from tests.conftest import ROOT
from tests.test_mistakes import run_steps

TINY = "configs/tiny.py"
NUM_STEPS = 20
MESH = ["--config.mesh.fsdp=2", "--config.mesh.expert=2", "--config.mesh.context=2"]
COMPARED = ("loss", "loss_main", "loss_mtp_1", "loss_mtp_2", "grad_norm")
UNTIMED = ("tokens_per_second", "mfu", "peak_memory_gib")


def metrics(workdir):
    return read_metrics(workdir / "metrics.jsonl")


def assert_same_run(found, expected, rel):
    """Each step once and in order, and the numbers of the reference run."""
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name in COMPARED:
            assert row[name] == pytest.approx(wanted[name], rel=rel), (row["step"], name)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """(workdir, what was printed): configs/tiny.py on one device, a process of its own."""
    workdir = tmp_path_factory.mktemp("reference") / "run"
    done = run_process("train.py", f"--config={TINY}", f"--workdir={workdir}", env=QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    return workdir, done.stdout


# ---------------------------------------------------------------------------------------------------------------
# What a run leaves behind


def test_metrics_hold_every_step_and_every_key(reference):
    lines = metrics(reference[0])
    assert [row["step"] for row in lines] == list(range(1, NUM_STEPS + 1))
    depths = [f"{name}_mtp_{k}" for name in ("loss", "accuracy", "agreement") for k in (1, 2)]
    names = {"step", "tokens", "loss", "loss_main", "accuracy_main", *depths, "learning_rate", "mtp_lambda"}
    names |= {"grad_norm", "tokens_per_second", "mfu", "peak_memory_gib", "moe_load_max_over_mean"}
    for row in lines:
        assert names <= set(row)
        assert row["tokens"] == 8 * 64 * row["step"]
        assert all(math.isfinite(row[name]) for name in names - set(UNTIMED))
        assert all(0 <= row[name] <= 1 for name in names if name.startswith(("accuracy", "agreement")))
    assert all(row["tokens_per_second"] > 0 for row in lines[1:])
    assert 0 < lines[0]["peak_memory_gib"] <= lines[-1]["peak_memory_gib"] < 64
    assert lines[0]["loss"] == pytest.approx(1.3 * math.log(264), rel=0.01) and lines[-1]["loss"] < 5


def test_config_json_is_the_resolved_config_and_there_are_events(reference):
    workdir, _ = reference
    config = with_vocabulary(load_config(TINY), 261)
    assert json.loads((workdir / "config.json").read_text()) == json.loads(json.dumps(to_dict(config)))
    assert read_config(workdir) == config and config.model.vocab_size == 264
    (events,) = workdir.glob("events.out.tfevents.*")
    assert events.stat().st_size > 1000
    assert {path.name for path in (workdir / "checkpoints").iterdir() if path.is_dir()} == {"10", "20"}


def closing_table(printed):
    """Label -> the numbers of its row in a table of depths."""
    found = re.findall(r"^(main|\+\d)\s+(.*)$", printed, re.MULTILINE)
    return {label: [float(x.rstrip("%")) for x in row.replace(" -", "").split()] for label, row in found}


def test_the_run_ends_with_a_table_and_a_sample(reference):
    workdir, printed = reference
    table = closing_table(printed)
    assert list(table) == ["main", "+1", "+2"]
    for loss, bits_per_byte, *_ in table.values():
        assert 2 < loss < 5 and bits_per_byte == pytest.approx(loss / math.log(2), rel=0.01)
    assert "sample, temperature 0.7" in printed and "\ndef " in printed
    *_, files, heading, first, _, _ = printed.splitlines()
    assert files.startswith(f"{workdir}: ") and heading == "next:"
    assert first.endswith(f" -m mtp_jax.tools.eval --tasks=loss,acceptance,speculative --workdir={workdir}")


def test_eval_agrees_with_the_closing_table(reference, tmp_path):
    workdir, printed = reference
    output = tmp_path / "results.json"
    argv = f"--workdir={workdir}", "--tasks=loss,acceptance", f"--output={output}"
    done = run_process("eval.py", *argv, env=QUICK)
    assert (done.returncode, done.stderr) == (0, "")
    table = closing_table(printed)
    assert closing_table(done.stdout) == table
    results = json.loads(output.read_text())
    assert results["step"] == NUM_STEPS
    for label, name in (("main", "main"), ("+1", "mtp_1"), ("+2", "mtp_2")):
        loss, acceptance = results["loss"][name], results["acceptance"][name]
        values = [loss["loss"], loss["bits_per_byte"], 100 * loss["accuracy"]]
        values += [100 * acceptance["agreement"]] if label != "main" else []
        assert [*values, acceptance["expected_tokens"]] == pytest.approx(table[label], abs=0.06)
        assert loss["loss"] == pytest.approx(table[label][0], abs=6e-4)


# ---------------------------------------------------------------------------------------------------------------
# Interruptions and meshes


def run_until(step, signal_number, argv):
    """Start train.py and send it a signal when it shows `step`: (exit code, stdout, stderr)."""
    process = subprocess.Popen(
        command("train.py", *argv), cwd=ROOT, env=QUICK, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    shown = []
    try:
        for line in process.stdout:
            shown.append(line)
            if line.startswith(f"step {step}/"):
                process.send_signal(signal_number)
                break
        rest, errors = process.communicate(timeout=120)
    finally:
        process.kill()
        process.wait()
    return process.returncode, "".join(shown) + rest, errors


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """One command, three times: told to stop at step 5, killed at step 13, left alone."""
    workdir = tmp_path_factory.mktemp("interrupted") / "run"
    argv = [
        f"--config={TINY}",
        f"--workdir={workdir}",
        "--config.checkpoint.every=4",
        "--config.training.sample_tokens=0",
    ]
    stopped = run_until(5, signal.SIGTERM, argv)
    saved = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())
    after_stop, goodput = metrics(workdir), json.loads((workdir / "goodput.json").read_text())
    killed = run_until(13, signal.SIGKILL, argv)
    after_kill = metrics(workdir)
    last = run_process("train.py", *argv, env=QUICK)
    return {
        **{"stopped": stopped, "saved": saved, "after_stop": after_stop, "goodput": goodput},
        **{"killed": killed, "after_kill": after_kill, "last": last, "metrics": metrics(workdir)},
    }


def test_a_run_that_is_told_to_stop_saves_its_state_and_goes_on(interrupted, reference):
    code, printed, errors = interrupted["stopped"]
    assert code == 75 and "goodput  " in printed
    (line,) = errors.splitlines()
    step = int(re.match(r"error: stopped by a signal at step (\d+), state saved; run the same command", line)[1])
    assert step < NUM_STEPS and step == interrupted["saved"][-1] == interrupted["goodput"]["last_step"]
    assert_same_run(interrupted["after_stop"], metrics(reference[0])[:step], rel=1e-6)
    assert f"resumed  from step {step}\n" in interrupted["killed"][1]


def test_a_killed_run_continues_with_no_step_missing_or_repeated(interrupted, reference):
    code, _, _ = interrupted["killed"]
    assert code == -signal.SIGKILL
    logged = interrupted["after_kill"][-1]["step"]
    resumed = int(re.search(r"resumed  from step (\d+)\n", interrupted["last"].stdout)[1])
    assert interrupted["last"].returncode == 0 and 8 <= resumed < logged < NUM_STEPS  # some steps come a second time
    expected = metrics(reference[0])
    assert_same_run(interrupted["metrics"], expected, rel=1e-6)
    for row, wanted in zip(interrupted["metrics"], expected, strict=True):
        for name in set(wanted) - set(UNTIMED):
            assert row[name] == pytest.approx(wanted[name], rel=1e-6), (row["step"], name)


def test_a_run_of_one_device_goes_on_with_eight(reference, tmp_path, capsys):
    """Eight devices read the same batches and compute the same losses; test_meshes.py compares whole runs."""
    workdir = tmp_path / "run"
    shutil.copytree(reference[0], workdir, ignore=shutil.ignore_patterns("20", "20.*", "events*"))
    run = loop.train(load_config(TINY, MESH), str(workdir))
    printed = capsys.readouterr().out
    assert "mesh.fsdp 1 -> 2" in printed and "resumed  from step 10\n" in printed
    assert run.step == NUM_STEPS and len(run.state["params"]["trunk"]["embed"].sharding.device_set) == 8
    assert_same_run(metrics(workdir), metrics(reference[0]), rel=1e-4)


# ---------------------------------------------------------------------------------------------------------------
# One switch: none, parallel, sequential


def of_kind(kind, *overrides):
    return with_vocabulary(load_config(TINY, [f"--config.mtp.kind={kind}", *overrides]), 261)


def test_every_kind_reads_the_same_batches(reference):
    configs = {kind: of_kind(kind) for kind in KINDS}
    corpora = {kind: data.prepare(config, kind_of(config).lookahead) for kind, config in configs.items()}
    length = 64 + 1
    for split in ("train", "validation"):
        for step in (0, 1, 7, 5000):
            if split == "validation" and step > 1:
                continue
            batches = {kind: corpus.batches(split).batch_at(step) for kind, corpus in corpora.items()}
            lookahead = {kind: b["tokens"].shape[1] - length for kind, b in batches.items()}
            assert lookahead == {"none": 0, "parallel": 2, "sequential": 2, "top": 63, "nextlat": 2}
            for name in ("tokens", "segment_ids", "positions"):
                for kind in KINDS:
                    np.testing.assert_array_equal(batches[kind][name][:, :length], batches["none"][name])


def test_parallel_heads_learn(reference):
    """Sequential modules are the reference run. Both start at the same loss: of the main head, ln V."""
    config = replace(of_kind("parallel"), mesh=MeshConfig())
    batches = data.prepare(config, kind_of(config).lookahead).batches("train")
    _, found = run_steps(config, [batches.batch_at(step) for step in range(NUM_STEPS)])
    names = ["loss_main", "loss_mtp_1", "loss_mtp_2"]
    assert {name for name in found[0] if name.startswith("loss_")} == set(names)
    for name in names:
        assert found[0][name] == pytest.approx(metrics(reference[0])[0]["loss_main"], rel=0.02)
        assert found[-1][name] < 0.75 * found[0][name]
    assert all(row["mtp_lambda"] == 2.0 for row in found)  # parallel heads default to the plain sum
