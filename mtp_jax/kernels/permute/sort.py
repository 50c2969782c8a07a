"""Dispatch and combine by plain indexing, differentiated by jax: the backend that runs on all devices.

Shape letters: as in `kernels.permute`.
"""

import jax
import jax.numpy as jnp


def dispatch(
    x_MD: jax.Array, expert_N: jax.Array, num_experts: int, num_chosen: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Sorts the copies of all tokens by expert.

    Args:
      x_MD: the tokens.
      expert_N: int, the expert of each copy; the K copies of a token are adjacent.
      num_chosen: K.

    Returns:
      the rows [N, D], the number of rows per expert int32[E], and the order to pass to `combine`.
    """
    order_N = jnp.argsort(expert_N, stable=True)
    sizes_E = jnp.bincount(expert_N, length=num_experts).astype(jnp.int32)
    return x_MD[order_N // num_chosen], sizes_E, order_N


def combine(y_ND: jax.Array, gates: jax.Array, order_N: jax.Array) -> jax.Array:
    """Returns sum_k gates[..., k] * y[row of copy k]: [N, D] and gates [..., K] -> [..., D]."""
    y = y_ND[jnp.argsort(order_N)].reshape(*gates.shape, y_ND.shape[-1])
    return (y * gates[..., None]).sum(axis=-2)
