"""Microscaling fp4 against its definition and against transformers."""

import re

import ml_dtypes
import numpy as np
import pytest

from mtp_jax.interop import mxfp4
from tests.interop import hf_models
from tests.reference import mxfp4 as reference


def random(shape, seed=0, low=0, high=256):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(low, high, shape, np.uint8)


def test_the_definition_by_hand():
    codes = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert [reference.e2m1(code) for code in range(16)] == [*codes, *(-c for c in codes)]
    assert (reference.e8m0(127), reference.e8m0(130), reference.e8m0(0)) == (1.0, 8.0, 2.0**-127)


@pytest.mark.parametrize("shape", [(1,), (3, 2), (2, 3, 4), (0, 2), (2, 0)])
def test_random_blocks_equal_the_definition(shape):
    blocks, scales = random(shape, low=0, high=253)  # beyond 252, six times the scale is not finite in float32
    found = mxfp4.dequantize(blocks, scales)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, reference.dequantize(blocks, scales))


def test_every_byte_with_every_scale():
    """NaN and infinities too; the sign of zero is kept."""
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16).reshape(256, 16)
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (256, 16, 16))
    with np.errstate(over="ignore", invalid="ignore"):
        found = mxfp4.dequantize(np.ascontiguousarray(blocks), scales)
        np.testing.assert_array_equal(found, reference.dequantize(blocks, scales))
    assert np.signbit(found[127, 16]) == np.signbit(reference.e2m1(8))
    assert np.isnan(found[255]).all() and np.isinf(found[254]).any()


def test_transformers_agrees():
    hf_models.needs_torch()
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = random((3, 5, 4), low=100, high=150)
    for dtype, ours in ((torch.float32, np.float32), (torch.bfloat16, ml_dtypes.bfloat16)):
        theirs = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales), dtype=dtype)
        found = mxfp4.dequantize(blocks, scales).astype(ours)
        # theirs is [experts, in, out], for their experts multiply from the left
        np.testing.assert_array_equal(np.swapaxes(found, 1, 2).astype(np.float32), theirs.float().numpy())


@pytest.mark.parametrize(
    ("blocks", "scales"),
    [
        (np.zeros((2, 15), np.uint8), np.zeros(2, np.uint8)),
        (np.zeros((2, 16), np.int8), np.zeros(2, np.uint8)),
        (np.zeros((3, 16), np.uint8), np.zeros(2, np.uint8)),
        (np.zeros((2, 16), np.uint8), np.zeros(2, np.float32)),
    ],
)
def test_what_does_not_belong_together_is_refused_with_both_shapes(blocks, scales):
    message = f"blocks are {blocks.dtype}{list(blocks.shape)} and scales {scales.dtype}{list(scales.shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        mxfp4.dequantize(blocks, scales)
