"""Dispatch and combine by plain indexing, with the gradients that jax derives: the backend of all devices.

Shape letters: as in the package.
"""

import jax
import jax.numpy as jnp


def dispatch(
    x_MD: jax.Array, expert_N: jax.Array, num_experts: int, num_chosen: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Every token's copies sorted by expert, [N, D].

    Args:
      expert_N: int, the expert of each copy, a token's K copies in a run.
      num_chosen: K.

    Returns:
      the rows, int32[E] rows of each expert, and the order for `combine`.
    """
    order_N = jnp.argsort(expert_N, stable=True)
    sizes_E = jnp.bincount(expert_N, length=num_experts).astype(jnp.int32)
    return x_MD[order_N // num_chosen], sizes_E, order_N


def combine(y_ND: jax.Array, gates: jax.Array, order_N: jax.Array) -> jax.Array:
    """sum_k gates[..., k] * y[the row of copy k]: [N, D] and gates [..., K] -> [..., D]."""
    y = y_ND[jnp.argsort(order_N)].reshape(*gates.shape, y_ND.shape[-1])
    return (y * gates[..., None]).sum(axis=-2)
