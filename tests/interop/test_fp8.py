"""Block-wise fp8 against the formula, one number at a time."""

import itertools
import os
import re
import tracemalloc

import ml_dtypes
import numpy as np
import pytest

from mtp_jax.interop import fp8

E4M3, E5M2 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2


def codes(shape, dtype=E4M3, seed=0):
    """Any codes of the dtype that are finite."""
    every = np.arange(256, dtype=np.uint8).view(dtype)
    finite = every[np.isfinite(every.astype(np.float32))]
    return np.random.default_rng(seed).choice(finite, shape)


def scales(shape, block=fp8.BLOCK):
    return np.random.default_rng(1).uniform(1e-4, 3, fp8.scale_shape(shape, block)).astype(np.float32)


def one_by_one(weight, scale_inv, first_row=0, block=fp8.BLOCK):
    out = np.empty(weight.shape, np.float32)
    for o, i in itertools.product(*map(range, weight.shape)):
        out[o, i] = np.float32(weight[o, i]) * scale_inv[(first_row + o) // block, i // block]
    return out


def same_bits(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


@pytest.mark.parametrize("shape", [(128, 128), (130, 129), (127, 257), (1, 1), (256, 5), (3, 0), (0, 3)])
@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_a_tensor_is_each_code_times_its_blocks_scale(shape, dtype):
    weight, scale_inv = codes(shape, dtype), scales(shape)
    assert same_bits(fp8.dequantize(weight, scale_inv), one_by_one(weight, scale_inv))


@pytest.mark.parametrize(
    "rows", [(0, 128), (128, 256), (1, 2), (127, 129), (100, 300), (129, 130), (256, 300), (5, 5), (300, 300)]
)
def test_rows_of_a_tensor_have_the_scales_of_their_places(rows):
    whole, scale_inv = codes((300, 130)), scales((300, 130))
    part = fp8.dequantize(whole[slice(*rows)], scale_inv, first_row=rows[0])
    assert same_bits(part, fp8.dequantize(whole, scale_inv)[slice(*rows)])
    assert same_bits(part, one_by_one(whole[slice(*rows)], scale_inv, rows[0]))


def test_small_blocks_and_strided_weights():
    weight, scale_inv = codes((7, 9)), scales((9, 7), block=4)
    assert same_bits(fp8.dequantize(weight.T, scale_inv, block=4), one_by_one(weight.T, scale_inv, block=4))
    scale_inv = scales((10, 9), block=4)
    assert same_bits(fp8.dequantize(weight, scale_inv, 3, 4), one_by_one(weight, scale_inv, 3, 4))


def test_scales_of_lower_precision_are_widened_before_they_multiply():
    weight, narrow = codes((5, 200)), scales((5, 200)).astype(ml_dtypes.bfloat16)
    assert same_bits(fp8.dequantize(weight, narrow), one_by_one(weight, narrow.astype(np.float32)))


@pytest.mark.parametrize(("dtype", "num_nans"), [(E4M3, 2), (E5M2, 6)])
def test_every_code(dtype, num_nans):
    weight = np.arange(256, dtype=np.uint8).view(dtype).reshape(2, 128)
    values = fp8.dequantize(weight, np.full((1, 1), 0.5, np.float32))
    expected = weight.astype(np.float32) * np.float32(0.5)
    nan = np.isnan(expected)
    assert nan.sum() == np.isnan(values).sum() == num_nans
    assert same_bits(values[~nan], expected[~nan]) and np.isnan(values[nan]).all()


def test_memory_is_what_is_returned():
    weight, scale_inv = codes((512, 2048)), scales((512, 2048))
    tracemalloc.start()
    try:
        out = fp8.dequantize(weight, scale_inv)
        assert tracemalloc.get_traced_memory()[1] < 1.1 * out.nbytes
    finally:
        tracemalloc.stop()


def test_torch_agrees_on_every_code():
    torch = needed("torch")
    weight = np.arange(256, dtype=np.uint8).reshape(2, 128)
    theirs = torch.from_numpy(weight).view(torch.float8_e4m3fn).to(torch.float32).numpy() * np.float32(0.3)
    ours = fp8.dequantize(weight.view(E4M3), np.full((1, 1), 0.3, np.float32))
    np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("scale_shape", "first_row"), [((2, 2), 0), ((3, 1), 0), ((3, 3), 0), ((2, 3), 0), ((3, 2), 128), ((3,), 0)]
)
def test_a_scale_that_does_not_cover_the_weight_is_refused_with_both_shapes(scale_shape, first_row):
    weight = codes((300, 200))
    with pytest.raises(ValueError, match=re.escape(f"{list(scale_shape)}, but weight [300, 200] from row {first_row}")):
        fp8.dequantize(weight, np.ones(scale_shape, np.float32), first_row)


def test_what_is_no_fp8_matrix_is_refused():
    scale = np.ones((1, 1), np.float32)
    with pytest.raises(ValueError, match=r"bfloat16\[2, 2\]"):
        fp8.dequantize(np.ones((2, 2), ml_dtypes.bfloat16), scale)
    with pytest.raises(ValueError, match=r"float8_e4m3fn\[2\]"):
        fp8.dequantize(np.ones(2, E4M3), scale)
    with pytest.raises(ValueError, match="first_row is -1"):
        fp8.dequantize(np.ones((2, 2), E4M3), scale, first_row=-1)


def needed(module):
    """A package that may be missing on a machine, but not where all tests must run."""
    if os.environ.get("CI") == "true":
        __import__(module)
    return pytest.importorskip(module)
