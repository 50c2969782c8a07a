"""Checksums of the contents of arrays, and the list of leaves that is stored with a checkpoint.

The checksum of an array is a pair of sums over its elements, modulo 2^32:

    r_i, c_i = position of element i in row-major and in column-major order, modulo 2^32
    m_i      = mix(bits_i ^ (0x9E3779B1 * r_i))
    checksum = (sum_i m_i, sum_i m_i * (2 c_i + 1))

`mix` is the finalizer of MurmurHash3, a bijection of 32-bit numbers, so a change of one element always shows. The sums
do not depend on the sharding, the mesh or the number of processes, and those of an array's blocks add up to its own.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mtp_jax.sharding import MAX_PROGRAMS_AHEAD
from mtp_jax.typing import PyTree

Sums = tuple[int, int]
Path = tuple[str, ...]


class Leaf(NamedTuple):
    """One array of a checkpoint: its keys from the root, shape, name of its dtype, and checksum (None: not stored)."""

    path: Path
    shape: tuple[int, ...]
    dtype: str
    sums: Sums | None

    @property
    def name(self) -> str:
        return "/".join(self.path)


class NonFinite(ValueError):
    """An array has values that are not finite. The message is its name."""


def block_sums(
    block: Any, starts: Sequence[int] | None = None, shape: tuple[int, ...] | None = None
) -> Sequence[jax.Array]:
    """Returns the checksum of a block of an array as two uint32 scalars, and a bool: all of its values are finite.

    Args:
      block: a jax or numpy array of 1, 2 or 4 bytes per element.
      starts: the first index of the block in each dim; None: 0.
      shape: of the whole array; None: of the block.

    Raises:
      ValueError: an element has another size.
    """
    dtype = block.dtype
    if (
        jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
        or dtype.itemsize not in (1, 2, 4)
        or dtype.name.endswith("int4")
    ):
        raise ValueError(f"arrays of {dtype} have no checksum; use a dtype of 1, 2 or 4 bytes")
    sizes = tuple(block.shape if shape is None else shape)
    first = starts if starts is not None else [0] * block.ndim
    rows = [math.prod(sizes[dim + 1 :]) % 2**32 for dim in range(block.ndim)]
    columns = [math.prod(sizes[:dim]) % 2**32 for dim in range(block.ndim)]
    return _sums(block, *(np.asarray(numbers, np.uint64).astype(np.uint32) for numbers in (first, rows, columns)))


@jax.jit
def _sums(block: jax.Array, starts: jax.Array, rows: jax.Array, columns: jax.Array) -> Sequence[jax.Array]:
    row_major = column_major = jnp.uint32(0)
    for dim in range(block.ndim):
        at = lax.broadcasted_iota(jnp.uint32, block.shape, dim) + starts[dim]
        row_major, column_major = row_major + at * rows[dim], column_major + at * columns[dim]
    mixed = _mix(_bits(block) ^ (row_major * jnp.uint32(0x9E3779B1)))
    is_float = jnp.issubdtype(block.dtype, jnp.floating)
    is_finite = jnp.isfinite(block.astype(jnp.float32)) if is_float else jnp.ones(block.shape, jnp.bool_)
    # One reduction of three operands: XLA would compute three, and their operands three times.
    return lax.reduce(
        (mixed, mixed * (2 * column_major + 1), is_finite),
        (jnp.uint32(0), jnp.uint32(0), jnp.bool_(True)),
        lambda a, b: (a[0] + b[0], a[1] + b[1], a[2] & b[2]),
        tuple(range(block.ndim)),
    )


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bit patterns as uint32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * jnp.uint32(0x85EBCA6B)
    h = (h ^ (h >> 13)) * jnp.uint32(0xC2B2AE35)
    return h ^ (h >> 16)


def leaf_path(path: jax.tree_util.KeyPath) -> Path:
    """Returns the keys of a path as text; dict keys, fields and indices alike, since container types differ on disk."""
    return tuple(str(next(getattr(k, a) for a in ("key", "name", "idx") if hasattr(k, a))) for k in path)


def flatten(tree: PyTree) -> dict[Path, Any]:
    """Returns the leaves of a pytree by path."""
    return {leaf_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def list_leaves(tree: PyTree, check_finite: bool = True) -> list[Leaf]:
    """Returns every array of `tree` with its checksum; the devices compute several while the host waits.

    Raises:
      NonFinite: `check_finite` is true and an array has values that are not finite.
      ValueError: an array of an unsupported dtype.
    """
    leaves = flatten(tree)
    paths = list(leaves)
    found: dict[Path, tuple[Any, Any, Any]] = {}  # the two sums and whether all values are finite
    for at in range(0, len(paths), MAX_PROGRAMS_AHEAD):
        found |= jax.device_get({path: block_sums(leaves[path]) for path in paths[at : at + MAX_PROGRAMS_AHEAD]})
    for path, (_, _, is_finite) in found.items():
        if check_finite and not is_finite:
            raise NonFinite("/".join(path))
    return [
        Leaf(path, tuple(leaf.shape), leaf.dtype.name, (int(found[path][0]), int(found[path][1])))
        for path, leaf in leaves.items()
    ]


def to_json(leaves: Sequence[Leaf]) -> dict[str, Any]:
    """Returns the JSON object that is stored with a checkpoint."""
    values = [[list(leaf.path), list(leaf.shape), leaf.dtype, list(leaf.sums or ())] for leaf in leaves]
    return {"leaves": values, "sha256": _digest(values)}


def from_json(text: str) -> list[Leaf]:
    """Reads the text of `to_json`.

    Raises:
      ValueError: it is not what was written.
    """
    try:
        content = json.loads(text)
        values, digest = content["leaves"], content["sha256"]
        if digest != _digest(values) or not values:
            raise ValueError("its list of leaves is not what was written")
        return [Leaf(tuple(path), tuple(shape), dtype, tuple(sums)) for path, shape, dtype, sums in values]
    except (LookupError, TypeError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError("its list of leaves cannot be read") from error


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
