"""train.py and eval.py as a test runs them: in this process, or as processes of their own."""

import os
import subprocess
import sys

from mtp_jax import cli
from tests.conftest import ROOT

# Small enough to compile in seconds; the sample would be one more program.
SMALL = [
    *("--config.model.num_layers=3", "--config.model.embed_dim=32", "--config.model.num_experts=4"),
    *("--config.data.sequence_length=16", "--config.training.sample_tokens=0", "--config.training.eval_batches=1"),
]
# What a newcomer's shell has, and the caches of this test run.
CACHES = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "MTP_JAX_CACHE")
PLAIN = {name: os.environ[name] for name in ("PATH", "HOME", *CACHES) if name in os.environ}
CPU = {**PLAIN, "JAX_PLATFORMS": "cpu"}


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
