"""Checksums of arrays against a loop over their elements, and the list of leaves that holds them."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mtp_jax.training import checksums
from tests.reference.checksums import checksum

DTYPES = ["float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int32", "uint16", "int8", "bool"]


def sums(array, *args):
    first, second, _ = checksums.block_sums(array, *args)
    return int(first), int(second)


def random_array(shape, dtype, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape) * 10
    return (values > 0) if dtype == "bool" else np.asarray(values).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (7,), (3, 4, 5), (0, 3)])
def test_checksums_are_those_of_the_reference(shape, dtype):
    array = random_array(shape, dtype)
    assert sums(array) == sums(jnp.asarray(array)) == checksum(array)


def test_blocks_add_up_also_where_positions_exceed_32_bits():
    array = random_array((4, 6), "bfloat16")
    parts = [((0, 0), array[:3, :2]), ((0, 2), array[:3, 2:]), ((3, 0), array[3:])]
    total = np.sum([sums(part, starts, array.shape) for starts, part in parts], 0) % 2**32
    assert tuple(total) == sums(array)
    shape, starts = (2**20, 3 * 2**20), (2**20 - 9, 2**21 + 5)
    assert sums(array, starts, shape) == checksum(array, starts, shape) != sums(array)


@pytest.mark.parametrize(
    "shape, spec", [((2, 4), P("a", "b")), ((8, 1), P("a")), ((1, 8), P(None, "b")), ((4, 2), P())]
)
def test_checksums_do_not_depend_on_the_sharding(shape, spec):
    array = random_array((16, 24), "float32")
    mesh = Mesh(np.array(jax.devices()).reshape(shape), ("a", "b"))
    assert sums(jax.device_put(array, NamedSharding(mesh, spec))) == sums(array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_flipped_bit_and_every_exchange_of_elements_shows(dtype):
    array = (np.arange(5) * 7 - 11).astype(dtype)
    found = {sums(array)}
    changed = 0
    for i in range(array.size):
        for bit in range(8 * array.dtype.itemsize):
            other = array.copy()
            bits = other.view(f"uint{8 * array.dtype.itemsize}")
            bits[i] ^= bits.dtype.type(1 << bit)
            found.add(sums(other))
            changed += 1
        for j in range(i):
            other = array.copy()
            other[[i, j]] = other[[j, i]]
            found.add(sums(other))
            changed += 1
    assert len(found) == 1 + changed
    assert sums(np.zeros(3, dtype)) != sums(np.zeros(4, dtype))


def test_unsupported_dtypes_are_refused():
    for array in (np.zeros(2), np.zeros(2, "int64"), np.zeros(2, "complex64"), np.zeros(2, ml_dtypes.int4)):
        with pytest.raises(ValueError, match="have no checksum"):
            checksums.block_sums(array)
    with pytest.raises(ValueError, match="have no checksum"):
        checksums.block_sums(jax.random.key(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_an_array_that_is_not_finite_is_named(dtype, value):
    tree = {"a": jnp.ones(3), "b": {"c": jnp.ones(4, dtype).at[2].set(value), "d": jnp.int32(1)}}
    with pytest.raises(checksums.NonFinite, match="^b/c$"):
        checksums.list_leaves(tree)
    assert len(checksums.list_leaves(tree, check_finite=False)) == 3


def test_a_list_of_leaves_comes_back_and_every_change_of_it_is_an_error():
    leaves = checksums.list_leaves({"a": [jnp.ones(3), jnp.zeros((2, 2), jnp.bfloat16)], "b": {"c": jnp.int32(1)}})
    text = json.dumps(checksums.to_json(leaves))
    assert checksums.from_json(text) == leaves
    bad = ["", "{}", "[]", "null", "7", "[" * 100_000, '{"leaves": {}, "sha256": ""}', text[:-1], "\ud800"]
    bad += [text[:i] + chr(ord(text[i]) ^ 1) + text[i + 1 :] for i in range(0, len(text), 3)]
    bad += [json.dumps(checksums.to_json([])), json.dumps(json.loads(text) | {"leaves": []})]
    for other in bad:
        try:
            assert checksums.from_json(other) == leaves  # with other white space
        except ValueError as error:
            assert "list of leaves" in str(error)
