"""Trackers beside metrics.jsonl: what they receive, and that one that fails never ends a run."""

import logging
import subprocess
import sys
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import Config, UserError, with_values
from mtp_jax.errors import warn_once
from mtp_jax.training import trackers
from mtp_jax.training.metrics import MetricsWriter, read_metrics
from mtp_jax.training.trackers import Opening, Tracker, Trackers, open_trackers
from tests.commands import CPU
from tests.conftest import ROOT

CONFIG = Config()


def logged(workdir, steps, resume_step=None, config=CONFIG):
    opened = open_trackers(workdir, config, resume_step)
    for step in steps:
        opened.write(step, {"loss": jnp.float32(1.0 / step), "tokens": 10 * step, "mfu": None})
    opened.close()


def events_of(workdir):
    from tensorboardX.proto.event_pb2 import Event

    events = []
    for path in sorted(workdir.glob("events.out.tfevents.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):  # the format: length, crc, data, crc
            size = int.from_bytes(data[at : at + 8], "little")
            events.append(Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return {(e.step, v.tag): v.simple_value for e in events for v in e.summary.value}


def test_tensorboard_has_the_scalars_and_metrics_jsonl_the_lines(tmp_path):
    logged(tmp_path, [1, 2])
    assert events_of(tmp_path) == {(1, "loss"): 1.0, (1, "tokens"): 10.0, (2, "loss"): 0.5, (2, "tokens"): 20.0}
    assert [row["tokens"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [10, 20]


def test_events_are_written_without_torch_and_clients_of_object_stores(tmp_path):
    """tensorboardX imports them by default. None is left in sys.modules, so a later import of the program works."""
    code = """
import sys
from mtp_jax.config import Config
from mtp_jax.training.trackers import open_trackers
open_trackers(sys.argv[1], Config(), None).close()
assert "tensorboardX" in sys.modules
assert not {"torch", "boto3", "google.cloud.storage"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], env={**CPU, "PYTHONPATH": str(ROOT)}, check=False)
    assert done.returncode == 0


def test_without_trackers_there_is_metrics_jsonl_alone(tmp_path):
    logged(tmp_path, [1], config=with_values(CONFIG, {"training.trackers": ()}))
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_events_of_an_object_store_are_put_at_a_flush_and_again_after_a_failure(bucket, capsys):
    opened = open_trackers(bucket.url + "/run", CONFIG, None)
    opened.write(1, {"loss": 1.0})
    warn_once.cache_clear()
    bucket.inject("400", times=1, match="POST", skip=1)  # the lines are put first
    assert opened.flush()
    assert "TensorBoard's events cannot be written (injected, 400)\n" in capsys.readouterr().err
    assert opened.flush()
    names = sorted(bucket.objects())
    assert len(names) == 2 and names[0].startswith("run/events.out.tfevents.") and names[1] == "run/metrics.jsonl"
    opened.close()


class Breaks(Tracker):
    """Fails at the second step, and when it is closed."""

    def __init__(self, opening=None):
        self.steps = []

    def write(self, step, metrics):
        if step == 2:
            raise OSError("the service is down\nand more")
        self.steps.append(step)

    def close(self):
        raise OSError("still down")


class Keeps(Tracker):
    def __init__(self, opening=None):
        self.rows = {}

    def write(self, step, metrics):
        self.rows[step] = dict(metrics)


def test_a_tracker_that_fails_is_reported_once_and_the_others_go_on(tmp_path, caplog):
    breaks, keeps = Breaks(), Keeps()
    both = Trackers([("breaks", breaks), ("keeps", keeps)], MetricsWriter(tmp_path, None))
    for step in (1, 2, 3):
        both.write(step, {"loss": np.float32(step), "mfu": None})
    both.close()
    assert breaks.steps == [1] and keeps.rows == {step: {"loss": float(step), "mfu": None} for step in (1, 2, 3)}
    assert [row["step"] for row in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    (record,) = caplog.records
    assert (record.name, record.levelno, record.step, record.process_index) == ("mtp_jax", logging.WARNING, 2, 0)
    said = "training.trackers: breaks has failed and is no longer written (the service is down)"
    assert record.getMessage() == f"step 2: {said}"


def test_a_tracker_that_cannot_be_opened_is_reported_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    class NoNetwork(Tracker):
        def __init__(self, opening):
            raise ConnectionError(f"no network for {opening.config.seed}")

    monkeypatch.setitem(trackers.TRACKERS, "new", (NoNetwork, "json"))
    trackers.check(["new", "tensorboard"])
    logged(tmp_path, [1], config=with_values(replace(CONFIG, seed=7), {"training.trackers": ("new", "tensorboard")}))
    assert events_of(tmp_path) and len(caplog.records) == 1
    assert "new cannot be opened (no network for 7); the run goes on without it" in caplog.text


def test_trackers_that_do_not_exist_or_are_not_installed_are_refused(monkeypatch):
    with pytest.raises(UserError, match="training.trackers='csv': no such tracker; use some of tensorboard, wandb"):
        trackers.check(["csv"])
    monkeypatch.setitem(trackers.TRACKERS, "absent", (Keeps, "a_package_that_is_not_there"))
    with pytest.raises(UserError, match="'absent': a_package_that_is_not_there is not installed; pip install"):
        trackers.check(["absent"])


def test_weights_and_biases_continues_one_run_per_workdir(tmp_path, monkeypatch):
    """Against a module of the same interface: the calls of wandb that the tracker makes."""
    import sys
    import types

    calls = []

    class Run:
        def log(self, values, step):
            calls.append((step, values))

        def finish(self):
            calls.append("finished")

    def init(**arguments):
        calls.append(arguments)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for _ in range(2):
        tracker = trackers.WeightsAndBiases(Opening(tmp_path, CONFIG, None))
        tracker.write(3, {"loss": 0.5, "mfu": None})
        tracker.close()
    first, second = calls[0], calls[3]
    assert first == second and first["resume"] == "allow" and first["config"]["seed"] == 0
    assert first["dir"] == str(tmp_path) and calls[1:3] == [(3, {"loss": 0.5}), "finished"]
