"""Argmax and log-sum-exp by the kernel, interpreted on CPUs, and by a reduction, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.kernels import log_z
from mtp_jax.kernels.device import pretend

either = pytest.mark.parametrize("run", [log_z.by_kernel, log_z.by_reduction])


@either
@pytest.mark.parametrize("vocab", [7, 1024, 10_000])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_vocabulary(run, vocab, dtype):
    rows = jax.random.normal(jax.random.key(vocab), (5, vocab)) * jnp.array([[0.0], [1.0], [10.0], [1e4], [1e-4]])
    logits_NV = (rows + jnp.array([[0.0], [-1e5], [0.0], [0.0], [300.0]])).astype(dtype)
    picks_N, log_z_N = jax.jit(run)(logits_NV if run is log_z.by_kernel else logits_NV.astype(jnp.float32))
    exact_NV = np.asarray(logits_NV.astype(jnp.float32), np.float64)
    np.testing.assert_array_equal(picks_N, exact_NV.argmax(1))  # the first of equal ones: row 0 is constant
    peak_N = exact_NV.max(1)
    expected_N = peak_N + np.log(np.exp(exact_NV - peak_N[:, None]).sum(1))
    np.testing.assert_allclose(log_z_N, expected_N, rtol=2e-6, atol=2e-6)


@either
def test_special_values(run):
    logits_NV = jnp.array([[0.0, -jnp.inf, 0.0], [0.0, jnp.nan, 1.0], [-jnp.inf, -jnp.inf, 2.0]])
    picks_N, log_z_N = jax.jit(run)(logits_NV)
    assert np.asarray(picks_N)[[0, 2]].tolist() == [0, 2]
    np.testing.assert_allclose(log_z_N, [np.log(2.0), np.nan, 2.0], rtol=1e-6)


@pytest.mark.parametrize(("capability", "is_kernel"), [("9.0", True), ("8.0", False)])
def test_the_kernel_is_for_hopper_gpus(capability, is_kernel):
    logits = jax.random.normal(jax.random.key(0), (2, 3, 50), jnp.bfloat16)
    jax.clear_caches()
    with pretend("gpu", capability):
        traced = jax.jit(log_z.argmax_and_log_z).trace(logits)
        assert ("pallas_call" in str(traced.jaxpr)) == is_kernel
        picks, z = traced.lower().compile()(logits)
    np.testing.assert_array_equal(picks, jnp.argmax(logits, -1))
    np.testing.assert_allclose(z, jax.nn.logsumexp(logits.astype(jnp.float32), -1), rtol=1e-6)


def expected_gradient(logits_NV, targets_N, cotangent_N, factor):
    exact_NV = np.asarray(logits_NV.astype(jnp.float32), np.float64)
    z_N = np.log(np.exp(exact_NV - exact_NV.max(1, keepdims=True)).sum(1)) + exact_NV.max(1)
    softmax_NV = np.exp(exact_NV - z_N[:, None]) * np.broadcast_to(factor(z_N), z_N.shape)[:, None]
    return z_N, (softmax_NV - np.eye(exact_NV.shape[1])[targets_N]) * cotangent_N[:, None]


@pytest.mark.parametrize("vocab", [7, 4096, 20_000])
@pytest.mark.parametrize("factor", [lambda z: 1.0 + 0.02 * z, lambda z: 1.0])
def test_the_gradient_is_that_of_the_cross_entropy(vocab, factor):
    logits_NV = 4 * jax.random.normal(jax.random.key(vocab), (6, vocab), jnp.bfloat16)
    targets_N = np.array([0, vocab - 1, 3, 5, 6, 1])
    cotangent_N = np.array([1.0, 0.25, 0.0, -2.0, 1e-6, 1.0], np.float32)
    given = np.asarray(logits_NV.astype(jnp.float32))
    found = jax.jit(lambda *args: log_z.softmax_gradient(*args, factor))(logits_NV, targets_N, cotangent_N)
    z_N, gradient_NV = expected_gradient(logits_NV, targets_N, cotangent_N, factor)
    np.testing.assert_array_equal(found.picks, given.argmax(1))
    np.testing.assert_allclose(found.log_z, z_N, rtol=2e-6)
    np.testing.assert_array_equal(found.target_logit, given[np.arange(6), targets_N])
    written_NV = np.asarray(found.gradient.astype(jnp.float32))
    np.testing.assert_allclose(written_NV, gradient_NV, rtol=2**-8, atol=1e-12)
    np.testing.assert_array_equal(found.largest, np.abs(written_NV).max(1))
