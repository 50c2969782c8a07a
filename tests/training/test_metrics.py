"""metrics.jsonl stays valid and gapless over kills and resumes; the progress line."""

import json
import pathlib
import types

import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.training import metrics as metrics_lib
from mtp_jax.training.metrics import MetricsWriter, Progress, peak_memory_gib, read_metrics


def write(workdir, steps, resume_step=None):
    writer = MetricsWriter(workdir, resume_step)
    for step in steps:
        writer.write(step, {"loss": 1.0 / step, "tokens": 10 * step})
    writer.close()


def steps_of(workdir):
    return [row["step"] for row in read_metrics(workdir / "metrics.jsonl")]


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


def test_resume_continues_without_missing_or_repeated_steps(tmp_path):
    write(tmp_path, range(1, 9))
    write(tmp_path, range(6, 11), resume_step=5)
    assert steps_of(tmp_path) == list(range(1, 11))


def test_resume_drops_a_torn_last_line(tmp_path):
    write(tmp_path, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    assert steps_of(tmp_path) == [1, 2, 3]
    write(tmp_path, [4, 5], resume_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5]


def test_a_start_from_the_beginning_keeps_no_line(tmp_path):
    write(tmp_path, range(1, 4))
    write(tmp_path, [1])
    assert steps_of(tmp_path) == [1]


def test_a_bad_line_in_the_middle_is_not_passed_over(tmp_path):
    write(tmp_path, [1, 2])
    path = tmp_path / "metrics.jsonl"
    path.write_text("garbage\n" + path.read_text())
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        write(tmp_path, [3], resume_step=2)


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
