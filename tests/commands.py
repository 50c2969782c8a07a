"""train.py and eval.py as a test runs them: in this process, or as processes of their own."""

import os
import socket
import subprocess
import sys

from mtp_jax import cli
from tests.conftest import PATIENT_FLAGS, QUICK_FLAGS, ROOT

# Small enough to compile in seconds; the sample would be one more program.
SMALL = [
    *("--config.model.num_layers=3", "--config.model.embed_dim=32", "--config.model.num_experts=4"),
    *("--config.data.sequence_length=16", "--config.training.sample_tokens=0", "--config.training.eval_batches=1"),
]
# The smallest run: one dense layer, next tokens alone, nothing to tokenize.
DENSE = [
    *("--config.data.source=synthetic", "--config.data.sequence_length=16", "--config.training.sample_tokens=0"),
    *("--config.model.num_layers=1", "--config.model.num_dense_layers=1", "--config.model.num_experts=0"),
    *("--config.model.embed_dim=32", "--config.model.attention=gqa", "--config.mtp.kind=none"),
]
# What a newcomer's shell has, and the caches of this test run.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "MTP_JAX_CACHE")
PLAIN = {name: os.environ[name] for name in ("PATH", "HOME", *CACHES) if name in os.environ}
CPU = {**PLAIN, "JAX_PLATFORMS": "cpu"}
# Little is run and much compiled.
QUICK = {**CPU, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XLA_FLAGS": f"{QUICK_FLAGS} {PATIENT_FLAGS}"}


def command(script, *argv):
    return [sys.executable, script, *map(str, argv)]


def run_process(script, *argv, env=CPU):
    """The finished process of `python script argv...`, from the project's folder, on one device."""
    return subprocess.run(
        command(script, *argv), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False
    )


def run_here(monkeypatch, main, *argv):
    """The exit code of a command line run in this process."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, argv)])
    monkeypatch.chdir(ROOT)
    try:
        cli.run(main)
    except SystemExit as stop:
        return stop.code
    return 0


def start_two(script, *argv, before=(), heartbeat=10, **env):
    """Two processes of two devices each that are connected by flags, as a list of Popen; stdout and stderr together.

    before: what each command line starts with, such as a supervisor.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    # gloo waits 30 s for the other process at the first collective: the two must not compile for long.
    env = {**QUICK, "TF_CPP_MIN_LOG_LEVEL": "3", "PYTHONUNBUFFERED": "1", **env}
    env["XLA_FLAGS"] += " --xla_force_host_platform_device_count=2"
    flags = [f"--coordinator=localhost:{port}", "--num_processes=2", f"--heartbeat_seconds={heartbeat}"]
    return [
        subprocess.Popen(
            [*before, *command(script, *argv, *flags, f"--process_id={index}")],
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
