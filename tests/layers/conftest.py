"""The stand-ins for devices and their kernels, of the tests of kernels."""

from tests.kernels.conftest import as_on_hopper, stand_ins  # noqa: F401
