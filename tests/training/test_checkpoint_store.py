"""Checkpoints in an object store, whole and under failing requests and kills."""

import signal
import time

import jax
import numpy as np
import pytest

from mtp_jax.config import CheckpointConfig
from mtp_jax.training.checkpoint import CheckpointError, Checkpoints, write_streamed
from tests.training.test_checkpoint import SYNC, abstract, assert_state, make_state, python, restore, save_steps


def folders(bucket):
    """Names in the folder of the checkpoints."""
    return {name.split("/")[1] for name in bucket.objects()}


def folder(bucket):
    return f"{bucket.url}/checkpoints"


def refuse(bucket, match):
    """Answers requests with 403 until `bucket.clear()`; clients repeat other failures for minutes."""
    bucket.store.call(
        "POST",
        "/faults",
        {"kind": "403", "times": None, "match": match, "skip": 0, "seconds": 0, "bucket": bucket.name},
    )


@pytest.mark.parametrize("async_save", [True, False])
def test_steps_are_saved_kept_and_restored(bucket, async_save):
    assert Checkpoints(folder(bucket)).steps() == [] and restore(folder(bucket)) is None
    save_steps(folder(bucket), 1, 2, 3, config=CheckpointConfig(keep=2, async_save=async_save))
    assert folders(bucket) == {"2", "3"}
    step, state = restore(folder(bucket))
    assert step == 3
    assert_state(state, 3)
    with Checkpoints(folder(bucket)) as checkpoints:
        part = checkpoints.saved_part(("params",))
        assert part == {"params": abstract(make_state(0)["params"])}
        step, got = checkpoints.restore_part(2, part)
        jax.tree.map(np.testing.assert_array_equal, got["params"], make_state(2)["params"])


def test_a_corrupt_step_is_renamed_and_newer_steps_make_room(bucket, capfd):
    save_steps(folder(bucket), 1, 2, 3)
    with Checkpoints(folder(bucket), SYNC) as checkpoints:
        (checkpoints.directory / "3" / "integrity" / "metadata").write_text("{}")
        assert checkpoints.restore_latest(abstract(make_state(0)))[0] == 2
        assert folders(bucket) == {"1", "2", "3.corrupt"}
        assert checkpoints.restore_latest(abstract(make_state(0)), step=1)[0] == 1
        checkpoints.save(2, make_state(2))
    assert folders(bucket) == {"1", "2", "2.superseded", "3.corrupt"}
    assert restore(folder(bucket))[0] == 2


def test_leaves_are_written_and_read_in_parts(bucket):
    state = {"params": {"a": np.arange(60, dtype=np.float32).reshape(3, 4, 5)}, "biases": {}}
    write_streamed(folder(bucket), 0, state)
    with Checkpoints(folder(bucket)) as checkpoints:
        step, opened = checkpoints.open_part(("params",))
        assert step == 0
        np.testing.assert_array_equal(opened["params"]["a"][1, 2:], state["params"]["a"][1, 2:])
        _, restored = checkpoints.restore_part(None, checkpoints.saved_part(("params",)))
        np.testing.assert_array_equal(restored["params"]["a"], state["params"]["a"])


def test_a_few_failing_requests_are_repeated(bucket, capfd):
    save_steps(folder(bucket), 1)
    for kind in ("503", "closed_before"):
        bucket.inject(kind, times=2, match="POST .*upload")
    save_steps(folder(bucket), 2)
    assert restore(folder(bucket))[0] == 2
    assert not capfd.readouterr().err


def test_a_store_that_refuses_to_write_leaves_the_last_step_and_the_next_save_succeeds(bucket, capfd):
    with Checkpoints(folder(bucket), CheckpointConfig(every=1, keep=1, async_save=False)) as checkpoints:
        checkpoints.save(1, make_state(1))
        refuse(bucket, "POST .*upload")
        checkpoints.save(2, make_state(2))
        bucket.clear()
        lines = capfd.readouterr().err.splitlines()
        assert len(lines) == 1 and "cannot save step 2: " in lines[0]
        assert checkpoints.steps() == [1]
        checkpoints.save(3, make_state(3))
    assert folders(bucket) == {"3"}


def test_a_store_that_cannot_be_read_is_not_taken_for_a_corrupt_step(bucket):
    save_steps(folder(bucket), 1, 2)
    refuse(bucket, "GET .*2/state")
    with pytest.raises(CheckpointError, match="try again"):
        restore(folder(bucket))
    bucket.clear()
    assert folders(bucket) == {"1", "2"}
    assert restore(folder(bucket))[0] == 2


ENDLESS = """
    import sys
    from mtp_jax.config import CheckpointConfig
    from mtp_jax.training.checkpoint import Checkpoints
    from tests.training.test_checkpoint import make_state
    with Checkpoints(sys.argv[1], CheckpointConfig(keep=2)) as checkpoints:
        for step in range(1, 1000):
            checkpoints.save(step, make_state(step))
            print(step, flush=True)
"""


@pytest.mark.parametrize("delay", [0.05, 0.2])
def test_a_kill_between_two_writes_loses_no_committed_step(bucket, delay, monkeypatch):
    process = python(ENDLESS, folder(bucket))
    while int(process.stdout.readline()) < 3:
        pass
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    step, state = restore(folder(bucket))
    assert step >= 2
    assert_state(state, step)
    save_steps(folder(bucket), step + 1)
    assert restore(folder(bucket))[0] == step + 1
    assert all(f"checkpoints/{name}/commit_success.txt" in bucket.objects() for name in folders(bucket))
