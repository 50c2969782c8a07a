"""The schedule of saves, with and without failures."""

import socket

import pytest

from mtp_jax.training.saving import SaveSchedule
from tests.training.test_checkpoint import finish, python


def attempts(every, num_steps, fails):
    """Steps at which a run saves; `fails(step)` decides whether a save does."""
    schedule, out = SaveSchedule(every), []
    for step in range(1, num_steps + 1):
        if schedule.is_due(step):
            out.append(step)
            schedule.started()
            if fails(step):
                schedule.failed(step)
            else:
                schedule.succeeded()
    return out


def test_saves_are_regular_while_they_succeed():
    assert attempts(5, 21, lambda step: False) == [5, 10, 15, 20]


def test_attempts_after_failures_come_sooner_and_then_less_often():
    assert attempts(32, 130, lambda step: step >= 64) == [32, 64, 66, 70, 78, 94, 96, 128]
    assert attempts(32, 130, lambda step: 64 <= step < 70) == [32, 64, 66, 70, 96, 128]


@pytest.mark.parametrize("every", [1, 2, 3, 16, 17, 500])
def test_no_regular_attempt_is_left_out(every):
    assert set(attempts(every, 40 * every, lambda step: True)) >= set(range(every, 40 * every, every))


ONE_FAILS = """
    import resource, signal, sys
    import jax, numpy as np
    from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
    folder, port, index = sys.argv[1], sys.argv[2], int(sys.argv[3])
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{port}", 2, index, heartbeat_timeout_seconds=30)
    from mtp_jax.config import CheckpointConfig
    from mtp_jax.training.checkpoint import CheckpointError, Checkpoints

    where = NamedSharding(Mesh(np.array(jax.devices()), ("a",)), P("a"))
    values = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32)
    state = {"params": {"a": jax.make_array_from_callback(values.shape, where, lambda i: values[i])}}
    with Checkpoints(folder, CheckpointConfig(every=4), (0.0,), barrier_seconds=2.0) as checkpoints:
        checkpoints.save(1, state)
        checkpoints.wait()
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        if index == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        checkpoints.save(2, state)
        try:
            checkpoints.wait()
        except CheckpointError:
            pass
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        checkpoints.save(2, state, must_succeed=True)
        print(checkpoints.steps())
"""


def test_a_save_that_fails_on_one_process_soon_fails_on_all_and_is_repeated(tmp_path):
    with socket.socket() as sock:
        sock.bind(("localhost", 0))
        port = sock.getsockname()[1]
    processes = [python(ONE_FAILS, tmp_path, port, index) for index in range(2)]
    try:
        (out, errors), (other, _) = [finish(process) for process in processes]  # orbax would wait for twenty minutes
    finally:
        for process in processes:
            process.kill()
    assert out.endswith("\n[1, 2]\n") and other.endswith("\n[1, 2]\n")
    assert f"{tmp_path}: cannot save step 2: File too large; it will be tried again" in errors.splitlines()
