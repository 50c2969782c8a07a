"""metrics.jsonl stays valid and gapless over kills and resumes; the progress line."""

import json
import pathlib
import resource
import signal
import subprocess
import sys
import time
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import storage
from mtp_jax.errors import warn_once
from mtp_jax.lease import LEASE_FILE, Lease, LeaseLost
from mtp_jax.training import metrics as metrics_lib
from mtp_jax.training.metrics import MetricsWriter, Progress, peak_memory_gib, read_metrics


def write(workdir, steps, resume_step=None):
    writer = MetricsWriter(workdir, resume_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step, "tokens": 10 * step})
    writer.close()


def steps_of(workdir):
    return [row["step"] for row in read_metrics(storage.path(workdir) / "metrics.jsonl")]


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket").url + "/run"


def test_every_write_is_on_disk_at_once(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, {"loss": jnp.float32(0.5), "tokens": np.int64(2**40), "mfu": None})
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 1, "loss": 0.5, "tokens": 1099511627776, "mfu": null}\n'
    writer.close()


def test_what_is_not_finite_is_null_and_the_file_stays_json(tmp_path):
    writer = MetricsWriter(tmp_path, None)
    writer.write(1, {"loss": float("nan"), "grad_norm": jnp.float32(jnp.inf)})
    writer.close()
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "loss": None, "grad_norm": None}


def test_resume_continues_without_missing_or_repeated_steps(folder):
    write(folder, range(1, 9))
    write(folder, range(6, 11), resume_step=5)
    assert steps_of(folder) == list(range(1, 11))


def test_resume_drops_a_torn_last_line(folder, capsys):
    write(folder, range(1, 4))
    path = storage.path(folder) / "metrics.jsonl"
    storage.write_bytes(path, storage.read_bytes(path) + b'{"step": 4, "lo')
    assert steps_of(folder) == [1, 2, 3]
    write(folder, [4, 5], resume_step=3)
    assert steps_of(folder) == [1, 2, 3, 4, 5]
    assert not capsys.readouterr().err


def test_a_start_from_the_beginning_keeps_no_line(folder):
    write(folder, range(1, 4))
    write(folder, [1])
    assert steps_of(folder) == [1]


BAD_LINES = [b"garbage", b"\xff\xfe", b'{"step": 3, "lo', b"[1]", b'{"loss": 1}', b'{"step": "3"}', b"[" * 100_000]


@pytest.mark.parametrize("bad", BAD_LINES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_bad_line_is_reported_and_never_blocks_a_resume(folder, bad, place, capsys):
    write(folder, [1, 2])
    path = storage.path(folder) / "metrics.jsonl"
    lines = storage.read_bytes(path).splitlines(keepends=True)
    lines.insert(place, bad + b"\n")
    storage.write_bytes(path, b"".join(lines))
    warn_once.cache_clear()
    write(folder, [3, 4], resume_step=2)
    assert f"metrics.jsonl: line {place + 1} is not a JSON object with a step and is dropped" in capsys.readouterr().err
    assert steps_of(folder) == [1, 2, 3, 4]


def test_a_repeated_step_is_kept_once(folder):
    path = storage.path(folder) / "metrics.jsonl"
    storage.make_folder(folder)
    storage.write_text(path, "".join(f'{{"step": {step}}}\n' for step in (1, 2, 1, 2, 3)))
    write(folder, [4], resume_step=3)
    assert steps_of(folder) == [1, 2, 3, 4]


def test_a_resume_needs_no_space_on_a_full_disk(tmp_path, monkeypatch):
    write(tmp_path, range(1, 9))
    monkeypatch.setattr(storage, "write_bytes", lambda *_: pytest.fail("a copy is written"))
    MetricsWriter(tmp_path, 5).close()
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def limited(size):
    """In a child process: files may have `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)


def full_disk(workdir):
    """Writes lines while files may have 400 bytes, and goes on when there is space."""
    writer = MetricsWriter(workdir, None)
    limited(400)
    for step in range(1, 21):
        writer.write(step, {"loss": 1.0 / step})
    stored = writer.flush()
    assert not stored and steps_of(workdir) == list(range(1, len(steps_of(workdir)) + 1))
    limited(resource.RLIM_INFINITY)
    assert writer.flush()
    writer.close()


def test_a_full_disk_loses_no_line_and_is_reported_once(tmp_path, project_root):
    code = f"from tests.training.test_metrics import full_disk; full_disk({str(tmp_path)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert steps_of(tmp_path) == list(range(1, 21))
    reports = [line for line in done.stderr.splitlines() if "cannot be written" in line]
    assert len(reports) == 1 and "Traceback" not in done.stderr, done.stderr


def test_an_object_is_put_from_time_to_time_and_at_a_flush(bucket, monkeypatch):
    monkeypatch.setattr(metrics_lib, "_STORE_SECONDS", 0.2)
    writer = MetricsWriter(bucket.url + "/run", None)
    writer.write(1, {"loss": 1.0})
    deadline = time.monotonic() + 30
    while not bucket.objects():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    for step in range(2, 50):
        writer.write(step, {"loss": 1.0})
    puts = len([path for method, path, _ in bucket.requests() if method == "POST"])
    assert puts < 10
    assert writer.flush() and steps_of(bucket.url + "/run") == list(range(1, 50))
    writer.close()
    assert list(bucket.objects()) == ["run/metrics.jsonl"]


def test_a_failing_store_loses_no_line(bucket, capsys):
    workdir = bucket.url + "/run"
    writer = MetricsWriter(workdir, None)
    bucket.inject("400", times=None, match="POST")  # which is not retried by the client
    writer.write(1, {"loss": 1.0})
    warn_once.cache_clear()
    assert not writer.flush() and not writer.flush()
    assert capsys.readouterr().err.count("metrics.jsonl: cannot be written now (") == 1
    bucket.clear()
    writer.write(2, {"loss": 1.0})
    assert writer.flush(is_last=True) and steps_of(workdir) == [1, 2]
    writer.close()


def test_the_last_lines_that_cannot_be_stored_are_an_error(bucket, monkeypatch):
    monkeypatch.setattr(metrics_lib, "_LAST_SECONDS", 2.0)
    writer = MetricsWriter(bucket.url + "/run", None)
    bucket.inject("400", times=None, match="POST")
    writer.write(1, {"loss": 1.0})
    with pytest.raises(storage.StorageError, match="metrics.jsonl cannot be written") as error:
        writer.flush(is_last=True)
    assert "\n" not in str(error.value)
    writer.close()


def test_a_run_that_lost_its_lease_writes_no_line(bucket):
    workdir = bucket.url + "/run"
    with Lease(workdir, seconds=1) as lease:
        writer = MetricsWriter(workdir, None, lease=lease)
        writer.write(1, {"loss": 1.0})
        assert writer.flush()
        path = storage.path(workdir) / LEASE_FILE
        storage.write_text(path, json.dumps(storage.read_json(path, "") | {"id": "other", "processes": "other"}))
        time.sleep(1.5)
        writer.write(2, {"loss": 1.0})
        with pytest.raises(LeaseLost, match="taken over by a run on host"):
            writer.flush()
        writer.close()
    assert steps_of(workdir) == [1]


def test_only_the_main_process_writes(tmp_path):
    writer = MetricsWriter(tmp_path / "run", None, is_main=False)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert not (tmp_path / "run").exists()


def test_progress_line(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_lib.time, "monotonic", lambda: now[0])
    progress = Progress(600)
    values = {
        "loss": jnp.float32(1.834),
        "loss_main": 1.52,
        "loss_mtp_1": 1.71,
        "loss_mtp_2": 1.95,
        "accuracy_mtp_1": 0.5,
        "tokens_per_second": 4100.0,
        "mfu": 0.312,
    }
    expected = "step 60/600  loss 1.834 (main 1.520, mtp 1.710 1.950)  4.1k tok/s  MFU 31.2%"
    assert progress.line(60, values) == expected
    now[0] = 20.0
    assert progress.line(120, values).endswith("MFU 31.2%  ETA 2:40")
    assert progress.line(600, values).endswith("ETA 0:00")
    assert "1.950)  validation 1.613  4.1k" in progress.line(600, values | {"validation_loss_main": 1.6125})
    named = {"validation_chats_loss_main": 1.5, "validation_b_loss_main": None, "validation_code_loss_main": 0.25}
    assert "1.950)  validation chats 1.500, code 0.250  4.1k" in progress.line(600, values | named)


def test_progress_line_leaves_out_what_is_not_there():
    line = Progress(10).line(1, {"loss": 2.0, "loss_main": 2.0, "mfu": None, "tokens_per_second": 12})
    assert line == "step 1/10  loss 2.000  12 tok/s"
    assert Progress(10).line(1, {}) == "step 1/10"
    assert metrics_lib.clock(3723.4) == "1:02:03" and metrics_lib._short(2.5e6) == "2.5M"


def devices(*stats):
    return [types.SimpleNamespace(memory_stats=lambda s=s: s) for s in stats]


def test_peak_memory_is_the_fullest_devices():
    found = peak_memory_gib(
        devices({"peak_bytes_in_use": 2**30, "bytes_in_use": 2**40}, {"peak_bytes_in_use": 3 * 2**30})
    )
    assert found == 3.0


@pytest.mark.parametrize("stats", [None, {}, {"bytes_in_use": 2**40}])
def test_peak_memory_is_the_processs_where_no_device_counts_it(stats):
    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc to compare with")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmRSS"))
    now = int(line.split()[1]) / 2**20
    assert 0.9 * now < peak_memory_gib(devices(stats)) < now + 64  # in GiB, and at least what is in use now
