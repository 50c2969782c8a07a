"""Peers are found where there are some and nowhere else; a dead one ends the others, and a restart goes on."""

import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest

import train as train_script
from mtp_jax import cli, distributed
from mtp_jax.config import UserError
from mtp_jax.training.metrics import read_metrics
from tests.commands import CPU, DENSE, finish, run_here, start_two
from tests.conftest import ROOT

FLAGS = ["--coordinator=10.0.0.1:8476", "--num_processes=4", "--process_id=3"]
ADDRESS = {"coordinator_address": "10.0.0.1:8476", "num_processes": 4, "process_id": 3}
BY_FLAGS = ADDRESS | {"cluster_detection_method": "deactivate"}
MTP = {"MTP_COORDINATOR": "10.0.0.1:8476", "MTP_NUM_PROCESSES": "4", "MTP_PROCESS_ID": "3"}
JOB = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
STEP = JOB | {"SLURM_STEP_NODELIST": "node[1-2]", "SLURM_STEP_NUM_TASKS": "4"}
SLURM = {"cluster_detection_method": "slurm"}
A_NODE = {"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_GPUS_ON_NODE": "2"}
GKE = {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "0"}
ONE_HOST = {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}
SLICES = {
    "tpu-env": "ACCELERATOR_TYPE: 'v5p-8'\nMEGASCALE_NUM_SLICES: '2'\n",
    "worker-network-endpoints": "x:0:10.0.0.1",
}

# what -> environment, attributes of the TPU VM, flags, (found by, arguments) or None
MACHINES = {
    "laptop": ({}, {}, [], None),
    "one TPU VM": ({}, {"worker-network-endpoints": "x:0:10.0.0.1", "tpu-env": "ZONE: 'z'"}, [], None),
    "TPU pod": ({}, {"worker-network-endpoints": "10.0.0.1,10.0.0.2"}, [], ("Cloud TPU", {})),
    "TPU pod, old format": ({}, {"worker-network-endpoints": "x:0:10.0.0.1,y:1:10.0.0.2"}, [], ("Cloud TPU", {})),
    "two slices of one VM": ({}, SLICES, [], ("Cloud TPU", {})),
    "TPU pod, run on its CPUs": ({"JAX_PLATFORMS": "cpu"}, {"worker-network-endpoints": "a,b"}, [], None),
    "metadata not wanted": ({"TPU_SKIP_MDS_QUERY": "1"}, {"worker-network-endpoints": "a,b"}, [], None),
    "GKE": (GKE, {}, [], ("GKE", {})),
    "GKE, platform named": (GKE | {"JAX_PLATFORMS": "tpu,cpu"}, {}, [], ("GKE", {})),
    "GKE, one host": (ONE_HOST, {"worker-network-endpoints": "a,b"}, [], None),
    "GKE, slices of one host": (ONE_HOST | {"MEGASCALE_NUM_SLICES": "2"}, {}, [], ("GKE", {})),
    "SLURM": (STEP, {}, [], ("SLURM", SLURM)),
    "SLURM, a task a node": (STEP | A_NODE, {}, [], ("SLURM", SLURM | {"local_device_ids": [0, 1]})),
    "SLURM, one task": (STEP | {"SLURM_NTASKS": "1", "SLURM_STEP_NUM_TASKS": "1"}, {}, [], None),
    "SLURM, old, one task": ({**JOB, "SLURM_STEP_NODELIST": "node1", "SLURM_NTASKS": "1"}, {}, [], None),
    "SLURM, batch script without srun": (JOB, {}, [], None),
    "SLURM, shell of salloc for four tasks": (STEP | {"SLURM_STEP_NUM_TASKS": "1"}, {}, [], None),
    "SLURM, login node": ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}, {}, [], None),
    "flags": ({}, {}, FLAGS, ("flags", BY_FLAGS)),
    "flags over SLURM": (STEP, {}, FLAGS, ("flags", BY_FLAGS)),
    "flags over variables": (MTP | {"MTP_PROCESS_ID": "1"}, {}, FLAGS, ("flags", BY_FLAGS)),
    "variables": (MTP, {}, [], ("MTP_COORDINATOR", BY_FLAGS)),
    "flags for one": ({}, {}, ["--coordinator=h:1", "--num_processes=1", "--process_id=0"], None),
}


def parsed(argv):
    flags = cli.parser("a command")
    distributed.add_flags(flags)
    return flags.parse_args(argv)


@pytest.mark.parametrize("name", MACHINES)
def test_peers_are_found_where_there_are_some(name):
    env, attributes, argv, expected = MACHINES[name]
    found = distributed.detect(parsed(argv), env, lambda key: attributes.get(key, ""))
    assert (found and (found.source, found.arguments)) == expected


def test_a_plain_machine_never_starts_jax_distributed():
    code = """
import sys, argparse
from mtp_jax import cli, distributed
flags = cli.parser("")
distributed.add_flags(flags)
distributed.initialize(flags.parse_args([]))
assert "jax" not in sys.modules
import jax
assert not jax.distributed.is_initialized() and jax.process_count() == 1
"""
    env = {**CPU, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


UNUSABLE = {
    "two of three": (FLAGS[:2], {}, ["--coordinator=10.0.0.1:8476:", "--process_id missing", "all three"]),
    "one of three": (FLAGS[2:], {}, ["--process_id=3:", "--coordinator and --num_processes missing"]),
    "no port": (["--coordinator=host", *FLAGS[1:]], {}, ["--coordinator=host:", "HOST:PORT"]),
    "no number": ([FLAGS[0], "--num_processes=two", FLAGS[2]], {}, ["--num_processes=two:", "whole number, 1 or more"]),
    "beyond the last": ([*FLAGS[:2], "--process_id=4"], {}, ["--process_id=4:", "from 0 to 3"]),
    "short heartbeat": (["--heartbeat_seconds=1"], {}, ["--heartbeat_seconds=1:", "from 5 to 600"]),
    "variables, two": ([], {"MTP_COORDINATOR": "h:1", "MTP_PROCESS_ID": "0"}, ["MTP_NUM_PROCESSES missing"]),
    "variable heartbeat": ([], {"MTP_HEARTBEAT_SECONDS": "x"}, ["MTP_HEARTBEAT_SECONDS=x:"]),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_flags_are_refused_in_one_line(name, monkeypatch, capfd, tmp_path):
    argv, env, says = UNUSABLE[name]
    for key, value in env.items():
        monkeypatch.setenv(key, value)
    command = ("--config=configs/tiny.py", f"--workdir={tmp_path / 'run'}", *argv)
    assert run_here(monkeypatch, train_script.main, *command) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert all(part in line for part in says), line


def test_every_flag_error_is_a_user_error():
    with pytest.raises(UserError):
        distributed.detect(parsed(FLAGS[:1]), {})


TRAIN = ["--config=configs/tiny.py", *DENSE, "--config.mesh.fsdp=4"]
TRAIN += ["--config.data.validation_fraction=0", "--config.checkpoint.every=10"]


def wait_for(condition, seconds=120):
    """The value of `condition()` once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s")


def saved_step(workdir):
    folder = workdir / "checkpoints"
    steps = [int(p.name) for p in folder.iterdir() if p.name.isdigit()] if folder.exists() else []
    return max(steps, default=0)


@pytest.mark.parametrize(("number", "index"), [(signal.SIGKILL, 1), (signal.SIGSTOP, 1)])
def test_a_lost_process_ends_the_other_within_a_minute(number, index, tmp_path):
    """The other one is the coordinator; a coordinator that is lost is in the next test."""
    workdir = tmp_path / "run"
    processes = start_two("train.py", *TRAIN, f"--workdir={workdir}", "--config.training.num_steps=100000")
    lost, other = processes[index], processes[1 - index]
    try:
        wait_for(lambda: saved_step(workdir))
        os.kill(lost.pid, number)
        begun = time.monotonic()
        printed = other.communicate(timeout=60)[0]
        assert time.monotonic() - begun < 60
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert other.returncode == 76, printed[-2000:]
    assert "most likely because another one of the run died or stopped" in printed


def test_killed_under_supervision_both_restart_and_resume(tmp_path):
    workdir = tmp_path / "run"
    processes = start_two(
        *("train.py", *TRAIN, f"--workdir={workdir}", "--config.training.num_steps=60"),
        **{"before": ["launch/supervise.sh"], "MTP_RESTART_SECONDS": "3", "MTP_MAX_RESTARTS": "8"},
    )
    try:
        wait_for(lambda: saved_step(workdir))
        (child,) = pathlib.Path(f"/proc/{processes[0].pid}/task/{processes[0].pid}/children").read_text().split()
        os.kill(int(child), signal.SIGKILL)  # the process that is the coordinator, too
    finally:
        results = finish(processes)
    assert [code for code, _ in results] == [0, 0], results
    assert all("supervise: exit code" in out for _, out in results), results  # both were started again
    assert "resumed  from step" in results[0][1]
    assert [row["step"] for row in read_metrics(workdir / "metrics.jsonl")] == list(range(1, 61))
