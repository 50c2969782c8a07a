"""Real processes (gloo on one machine) train as one: the same losses, and one checkpoint when one is told to stop."""

import os
import signal
import socket
import subprocess
import sys

import pytest

from mtp_jax.training.metrics import read_metrics
from tests.commands import CPU, SMALL, run_process
from tests.conftest import ROOT

CONFIG = ["--config=configs/tiny.py", *SMALL, "--config.training.sample_tokens=4"]
# What a launcher does before train.py: find the peers.
LAUNCH = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
index, port = int(sys.argv[1]), sys.argv[2]
jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=10)
sys.argv = ["train.py", *sys.argv[3:]]
import train
from mtp_jax import cli
cli.run(train.main)
"""


def start_two(workdir, *overrides):
    """Two processes of two devices each, as a list of Popen; stdout and stderr together."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    env = {
        **CPU,
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    argv = [*CONFIG, f"--workdir={workdir}", "--config.mesh.fsdp=2", "--config.mesh.context=2", *overrides]
    return [
        subprocess.Popen(
            [sys.executable, "-u", "-c", LAUNCH, str(index), port, *argv],
            **{"cwd": ROOT, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT},
        )
        for index in range(2)
    ]


def finish(processes):
    """(return code, output) of each; none is left behind."""
    try:
        return [(p.returncode, out) for p in processes for out in [p.communicate(timeout=240)[0]]]
    finally:
        for process in processes:
            process.kill()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("alone") / "run"
    done = run_process("train.py", *CONFIG, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    return workdir, done.stdout


def test_two_processes_train_as_one(alone, tmp_path):
    (code_0, out_0), (code_1, out_1) = finish(start_two(tmp_path / "run"))
    assert (code_0, code_1) == (0, 0), out_0 + out_1
    expected, found = read_metrics(alone[0] / "metrics.jsonl"), read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for row, wanted in zip(found, expected, strict=True):
        for name in ("loss", "loss_main", "loss_mtp_1", "loss_mtp_2"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-4), (row["step"], name)
        assert row["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-3), row["step"]
    table = alone[1][alone[1].index("validation,") : alone[1].index("sample,")]
    assert table in out_0 and "validation," not in out_1  # the other process measures, and says nothing


def test_a_stop_signal_to_one_process_stops_both_at_one_saved_step(tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(workdir, "--config.training.num_steps=100000", "--config.checkpoint.every=100000")
    for line in processes[0].stdout:
        if line.startswith("step 10/"):
            break
    os.kill(processes[1].pid, signal.SIGTERM)
    results = finish(processes)
    assert [code for code, _ in results] == [1, 1], results
    (step,) = {int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()}
    assert all(f"stopped by a signal at step {step}, state saved" in out for _, out in results)
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == step
