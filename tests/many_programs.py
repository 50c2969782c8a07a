"""Enqueues hundreds of programs with collectives on two CPU devices, through the checksums and the training loop.

Run by test_processes.py as a process of its own: XLA ends the process that waits in a collective for too long.
"""

import os

os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=2 --xla_cpu_collective_call_terminate_timeout_seconds=60"
)

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.training import checksums
from mtp_jax.training.clock import Clock
from mtp_jax.training.stages.stage import Session


def main() -> None:
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("a",))
    rows, everywhere = NamedSharding(mesh, P("a")), NamedSharding(mesh, P())
    large = jax.device_put(np.ones((2, 1 << 22), np.float32), rows)
    first, *others = checksums.list_leaves([large] * 150)
    assert all(leaf.sums == first.sums for leaf in others)

    def step(x):
        return jnp.tanh(x @ x.T), {"loss": x.sum()}

    step = jax.jit(step, donate_argnums=0, out_shardings=(rows, everywhere))
    state = jax.device_put(np.ones((512, 512), np.float32), rows)
    session = Session(None, None, None, Clock(), 0, state)
    for _ in range(250):
        session.advance(*step(session.state))
    assert float(session.metrics["loss"]) > 0


if __name__ == "__main__":
    main()
