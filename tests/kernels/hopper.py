"""Parts shared by the tests of GPU kernels: the devices they run on, and tolerances."""

import jax
import numpy as np
import pytest


def is_hopper():
    """Returns whether this process computes on Hopper GPUs."""
    device = jax.devices()[0]
    return device.platform == "gpu" and str(device.compute_capability) == "9.0"


hopper_only = pytest.mark.skipif(not is_hopper(), reason="needs a GPU of compute capability 9.0")


def assert_close(found, expected, tolerance):
    """Relative error of the whole array, in float64; NaN is never close."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    error = np.linalg.norm(found - expected)
    assert error <= tolerance * np.linalg.norm(expected), error / np.linalg.norm(expected)
