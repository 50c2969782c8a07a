"""Two processes never hold one folder, and a folder whose holder has ended is taken over."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from mtp_jax import storage
from mtp_jax.errors import UserError
from mtp_jax.lease import LEASE_FILE, InUse, Lease, LeaseLost
from tests.conftest import ROOT

HOLD = """
import sys, time
from mtp_jax.lease import Lease
with Lease(sys.argv[1], seconds=float(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    return str(tmp_path / "run") if request.param == "local" else request.getfixturevalue("bucket").url + "/run"


def holder(folder, seconds=60):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, folder, str(seconds)], cwd=ROOT, text=True, stdin=-1, stdout=-1, stderr=-1
    )
    assert process.stdout.readline() == "held\n", process.stderr.read()
    return process


def end(process):
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors


def kill(process):
    process.send_signal(signal.SIGKILL)
    process.communicate()


def on_another_host(folder):
    """Makes a lease look like one of another host."""
    path = storage.path(folder) / LEASE_FILE
    values = storage.read_json(path, "")
    storage.write_text(path, json.dumps(values | {"host": "elsewhere", "processes": "other"}))


def test_the_second_is_refused_and_told_of_the_first(folder):
    first = holder(folder)
    with pytest.raises(UserError) as error, Lease(folder):
        pass
    host, pid = os.uname().nodename, first.pid
    expected = f"--workdir={folder}: is in use by a run on host {host}, pid {pid}, since 20"
    assert str(error.value).startswith(expected) and "\n" not in str(error.value)
    assert str(error.value).endswith("; wait for its end, or use another folder")
    end(first)
    with Lease(folder) as lease:
        assert lease.check()
    assert storage.names(folder) == []  # nothing is left


def test_after_a_kill_it_is_taken_over_at_once(folder):
    first = holder(folder)
    kill(first)
    started = time.monotonic()
    with Lease(folder) as lease:
        assert lease.check()
    assert time.monotonic() - started < 20  # a lease lasts 60


def test_a_live_lease_of_another_host_is_refused_once_it_is_renewed(bucket, capfd):
    folder = bucket.url + "/run"
    with Lease(folder, seconds=4) as lease:
        # The copy on the store is that of another host for any reader, until it is renewed
        lease._holder._owner |= {"host": "elsewhere", "processes": "other"}
        on_another_host(folder)
        with pytest.raises(UserError, match="in use by a run on host elsewhere, pid"), Lease(folder):
            pass
        assert lease.check()
    assert "waiting  up to 4 s for a run on host elsewhere" in capfd.readouterr().err


def test_a_lease_of_another_host_that_ended_is_taken_over_when_it_expires(bucket):
    folder = bucket.url + "/run"
    first = holder(folder, seconds=3)
    kill(first)
    on_another_host(folder)
    with Lease(folder, seconds=3) as lease:
        assert lease.check()


def test_a_stopped_process_that_was_replaced_is_told(bucket):
    folder = bucket.url + "/run"
    with Lease(folder, seconds=1) as lease:
        values = storage.read_json(storage.path(folder) / LEASE_FILE, "")
        other = values | {"id": "other", "host": "elsewhere", "pid": 7}
        storage.write_text(storage.path(folder) / LEASE_FILE, json.dumps(other))
        deadline = time.monotonic() + 30
        with pytest.raises(LeaseLost, match="taken over by a run on host elsewhere, pid 7") as error:
            while time.monotonic() < deadline:
                lease.check()
                time.sleep(0.05)
        assert "\n" not in str(error.value)
    assert storage.read_json(storage.path(folder) / LEASE_FILE, "")["id"] == "other"  # it is not removed


def test_an_unreachable_store_ends_no_run(bucket):
    with Lease(bucket.url + "/run", seconds=1) as lease:
        bucket.inject("503", times=None)
        deadline = time.monotonic() + 60
        while lease.check():  # False: it is not known
            assert time.monotonic() < deadline
            time.sleep(0.05)
        bucket.clear()
        while not lease.check():
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize("kind", ["429", "500", "503", "closed_before", "closed_after"])
def test_faults_while_it_is_taken_and_renewed(bucket, kind):
    bucket.inject(kind, match="lease")
    bucket.inject(kind, match="POST.*lease")
    with Lease(bucket.url + "/run", seconds=5) as lease:
        bucket.inject(kind, match="POST.*lease")
        time.sleep(1.5)
        assert lease.check()


def test_two_that_start_together(folder):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", HOLD, folder, "60"], cwd=ROOT, text=True, stdin=-1, stdout=-1, stderr=-1
        )
        for _ in range(3)
    ]
    lines = [process.stdout.readline() for process in processes]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert lines.count("held\n") == 1 and codes.count(0) == 1, errors
    assert all("is in use by" in text for text, code in zip(errors, codes, strict=True) if code)


def test_what_is_no_folder_or_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for text, message in (
        (tmp_path / "file", "is a file; give a folder"),
        (tmp_path / "file" / "below", "cannot be written (Not a directory); use another folder"),
        (tmp_path / ("x" * 300), "cannot be written (File name too long); use another folder"),
        ("/proc/mtp_jax", "cannot be written (No such file or directory); use another folder"),
    ):
        with pytest.raises(UserError) as error, Lease(text):
            pass
        assert str(error.value) == f"--workdir={text}: {message}"


def test_a_bucket_that_does_not_exist(object_store, bucket):
    with pytest.raises((UserError, storage.StorageError)) as error, Lease("gs://no-such-bucket/run"):
        pass
    assert "\n" not in str(error.value) and "gs://no-such-bucket/run" in str(error.value)


def test_leases_of_different_files_do_not_exclude_each_other(folder):
    with Lease(folder), Lease(folder, file="other.json"):
        with pytest.raises(InUse), Lease(folder, file="other.json"):
            pass
    assert storage.names(folder) == []
