"""Stochastic rounding of optimizer state: unbiased, to neighbours only, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mtp_jax.training import stochastic_rounding
from mtp_jax.training.stochastic_rounding import rounded

BETA2 = 0.999


def test_values_are_rounded_to_a_neighbour_and_in_the_mean_not_at_all():
    x = np.concatenate([np.geomspace(1e-30, 1e30, 50), -np.geomspace(1e-3, 1e3, 50), [0.0, 1.0, 3.0]]).astype(
        np.float32
    )
    found = np.asarray(rounded(jnp.broadcast_to(x, (40_000, len(x))), jnp.uint32(7)), np.float64)
    towards_zero = (x.view(np.uint32) & 0xFFFF0000).view(np.float32).astype(np.float64)
    step = np.abs(((x.view(np.uint32) & 0xFFFF0000) + 0x10000).view(np.float32).astype(np.float64)) - np.abs(
        towards_zero
    )
    is_up = (np.abs(found) - np.abs(towards_zero)) / step
    assert set(np.unique(is_up)) <= {0.0, 1.0}
    share = (np.abs(x.astype(np.float64)) - np.abs(towards_zero)) / step
    deviation = np.sqrt(share * (1 - share) / len(found))
    assert (np.abs(is_up.mean(axis=0) - share) <= 5 * deviation).all()
    exact = share == 0
    assert exact.any() and (found[:, exact] == x[exact]).all()


def test_seeds_and_neighbouring_elements_are_independent():
    x = jnp.full((2, 50_000), 1 + 2.0**-8)  # in the middle of two numbers
    up = [np.asarray(rounded(x, jnp.uint32(seed)), np.float64) > 1.001 for seed in (1, 2)]
    pairs = [(up[0], up[1]), (up[0][0], up[0][1]), (up[0][:, 1:], up[0][:, :-1])]
    for a, b in pairs:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
def test_other_values_stay(value):
    np.testing.assert_array_equal(np.float32(rounded(jnp.full(9, value), jnp.uint32(3))), np.full(9, value, np.float32))


@pytest.mark.parametrize("is_stochastic", [True, False])
def test_the_second_moment_does_not_stop(is_stochastic):
    """Of a constant gradient it goes to the square; rounded to the nearest number it stops at a fraction of it."""
    adam = optax.scale_by_adam(0.9, BETA2)
    grads = {"w": jnp.full((64, 64), 0.5)}
    tx = stochastic_rounding.of_state(adam) if is_stochastic else adam

    def stored(state):
        return state._replace(mu=optax.tree.cast(state.mu, jnp.bfloat16), nu=optax.tree.cast(state.nu, jnp.bfloat16))

    def step(state, _):
        return stored(tx.update(grads, state)[1]), None

    state = jax.lax.scan(step, stored(tx.init(grads)), length=3000)[0]
    mean = float(np.asarray(state.nu["w"], np.float64).mean())
    expected = 0.25 * (1 - BETA2**3000)
    if is_stochastic:
        assert abs(mean - expected) < 0.01 * expected
    else:
        assert mean < 0.7 * expected


def test_a_mesh_rounds_as_one_device():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("a", "b"))
    x = jax.random.normal(jax.random.key(0), (16, 8, 12))
    sharded = jax.device_put(x, NamedSharding(mesh, PartitionSpec("b", "a")))
    np.testing.assert_array_equal(jax.jit(rounded)(sharded, jnp.uint32(5)), rounded(x, jnp.uint32(5)))
