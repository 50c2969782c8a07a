"""Optimizer state in bfloat16, rounded to one of the two nearest numbers at random; the expectation is exact.

Rounding to the nearest number loses every update smaller than half the distance to the next one: a second moment in
bfloat16 stops at beta2 = 0.999, since 0.001 g^2 is less than 2^-9 of it (Gupta et al., 1502.02551, section 3).
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

GOLDEN = 0x9E3779B9  # 2^32 over the golden ratio: steps of it visit all numbers evenly


def of_state(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns the transformation with the float32 arrays of its state stored in bfloat16.

    The rounding is a function of the number of updates, the array's place in the state and the element's index, so a
    resumed run and any mesh round alike.

    Args:
      tx: its state counts updates in a field `count`.
    """

    def init(params: Any) -> Any:
        state = tx.init(optax.tree.cast(params, jnp.float32))
        return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, state)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, state)
        updates, wide = tx.update(grads, wide, params)
        count = optax.tree.get_all_with_path(wide, "count")[0][1].astype(jnp.uint32)
        leaves, tree = jax.tree.flatten(wide)
        seeds = [_mixed(count * jnp.uint32(GOLDEN) + jnp.uint32(n)) for n in range(len(leaves))]
        stored = [rounded(x, seed) if x.dtype == jnp.float32 else x for x, seed in zip(leaves, seeds, strict=True)]
        return updates, jax.tree.unflatten(tree, stored)

    return optax.GradientTransformation(init, update)


def rounded(x: jax.Array, seed: jax.Array) -> jax.Array:
    """Returns float32 x as bfloat16: each element is one of its two neighbours, in expectation x.

    Args:
      seed: uint32; other seeds give independent roundings.
    """
    index = jnp.zeros(x.shape, jnp.uint32)
    for dim in range(x.ndim):
        stride = math.prod(x.shape[dim + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, x.shape, dim) * jnp.uint32(stride)
    noise = _mixed(index * jnp.uint32(GOLDEN) ^ seed) >> 16  # as many bits as bfloat16 drops
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    truncated = (bits + noise) & jnp.uint32(0xFFFF0000)
    return jnp.where(jnp.isfinite(x), jax.lax.bitcast_convert_type(truncated, jnp.float32), x).astype(jnp.bfloat16)


def _mixed(x: jax.Array) -> jax.Array:
    """Returns uint32 hashes whose bits all depend on all bits of x (lowbias32 of github.com/skeeto/hash-prospector)."""
    x ^= x >> 16
    x *= jnp.uint32(0x7FEB352D)
    x ^= x >> 15
    x *= jnp.uint32(0x846CA68B)
    return x ^ x >> 16
