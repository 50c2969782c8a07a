"""Real processes (gloo on one machine) train as one: the same losses, and one checkpoint when one is told to stop."""

import os
import signal

import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from mtp_jax.training.checkpoint import Checkpoints
from mtp_jax.training.metrics import read_metrics
from tests.commands import CPU, DENSE, QUICK, SMALL, finish, run_process, start_two
from tests.conftest import ROOT

CONFIG = ["--config=configs/tiny.py", *SMALL, "--config.training.sample_tokens=4", "--config.training.num_steps=30"]
CONFIG += ["--config.training.eval_every=10"]
MESH = ["--config.mesh.fsdp=2", "--config.mesh.context=2"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    done = run_process("train.py", *CONFIG, f"--workdir={workdir}", env=QUICK)
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def final_biases(workdir):
    """Router biases of the last checkpoint, by name."""
    with Checkpoints(workdir / "checkpoints") as saved:
        step, state = saved.open_part(("biases",))
    assert step == 30
    return {path: leaf[...] for path, leaf in flatten_dict(state).items()}


def test_two_processes_train_as_one(alone, tmp_path):
    (code_0, out_0), (code_1, out_1) = finish(start_two("train.py", *CONFIG, *MESH, f"--workdir={tmp_path / 'run'}"))
    assert (code_0, code_1) == (0, 0), out_0 + out_1
    expected, found = read_metrics(alone[0] / "metrics.jsonl"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name in ("loss", "loss_main", "loss_mtp_1", "loss_mtp_2"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-5), (row["step"], name)
        for name in (name for name in wanted if name.startswith("validation_loss")):  # of both processes' rows
            assert row[name] == pytest.approx(wanted[name], rel=1e-3), (row["step"], name)
        # Two steps of this run have gradients three times as large as the others, with rounding magnified 1,000 times.
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=2e-3), row["step"]
    assert [row["step"] for row in expected if "validation_loss_main" in row] == [10, 20, 30]
    biases = [final_biases(workdir) for workdir in (alone[0], tmp_path / "run")]
    assert biases[0] and all(abs(bias).max() > 0.01 for bias in biases[0].values())  # they have moved
    for name, bias in biases[0].items():
        np.testing.assert_allclose(biases[1][name], bias, rtol=1e-4, atol=1e-7, err_msg=name)
    table = alone[1][alone[1].index("validation,") : alone[1].index("sample,")]
    assert table in out_0 and "peers    2 processes, found by flags\n" in out_0
    assert "peers" not in out_1 and "validation," not in out_1  # the other process measures, and prints nothing

    evaluated = finish(start_two("eval.py", f"--workdir={tmp_path / 'run'}"))
    assert [code for code, _ in evaluated] == [0, 0], evaluated
    rows = [line for line in table.splitlines()[1:] if line.strip()]
    assert rows and all(line in evaluated[0][1] for line in rows), (rows, evaluated)  # gloo talks in between
    assert "held-out" not in evaluated[1][1]


def test_hundreds_of_programs_with_collectives_can_be_enqueued_at_once():
    done = run_process("tests/many_programs.py", env={**CPU, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("number", "codes"), [(signal.SIGTERM, [75, 75]), (signal.SIGINT, [75, 130])])
def test_a_stop_signal_to_one_process_stops_both_at_one_saved_step(number, codes, tmp_path):
    workdir = tmp_path / "run"
    endless = ["--config.training.num_steps=100000", "--config.checkpoint.every=100000"]
    config = "--config=configs/tiny.py", *DENSE, "--config.mesh.fsdp=4", "--config.data.validation_fraction=0"
    processes = start_two("train.py", *config, f"--workdir={workdir}", *endless)
    for line in processes[0].stdout:
        if line.startswith("step 10/"):
            break
    os.kill(processes[1].pid, number)
    results = finish(processes)
    assert [code for code, _ in results] == codes, results
    (step,) = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert all(f"stopped by a signal at step {step}, state saved" in out for _, out in results)
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == step
