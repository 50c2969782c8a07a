"""Dispatch and combine whose gradients are gathers too.

Automatic differentiation turns a gather into a scatter-add, row by row. Here the permutation and its inverse are both
known, so the gradient is a gather and a sum over the K rows of a token.

Shape letters: as in `kernels.permute`.
"""

import functools

import jax
import jax.numpy as jnp

Order = tuple[jax.Array, jax.Array]  # int32[N] each: the permutation (sorted row n is copy order[n]) and its inverse


def dispatch(x_MD, expert_N, num_experts, num_chosen) -> tuple[jax.Array, jax.Array, Order]:
    """See `sort.dispatch`."""
    order_N, place_N, sizes_E = sort_by_expert(expert_N, num_experts)
    return _dispatch(x_MD, order_N, place_N, num_chosen), sizes_E, (order_N, place_N)


def combine(y_ND, gates, order) -> jax.Array:
    """See `sort.combine`."""
    out_MD = _combine(y_ND, gates.reshape(-1, gates.shape[-1]), *order)
    return out_MD.reshape(*gates.shape[:-1], y_ND.shape[-1])


def sort_by_expert(expert_N: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the order of copies sorted by expert, its inverse, and the number of copies per expert; all int32.

    Needs a single sort: the inverse is a scatter, and counts are sums of comparisons instead of scatter-adds.
    """
    order_N = jnp.argsort(expert_N.astype(jnp.uint32), stable=True).astype(jnp.int32)
    index_N = jnp.arange(len(order_N), dtype=jnp.int32)
    place_N = jnp.zeros_like(order_N).at[order_N].set(index_N, mode="promise_in_bounds", unique_indices=True)
    sizes_E = (expert_N[:, None] == jnp.arange(num_experts)).sum(axis=0, dtype=jnp.int32)
    return order_N, place_N, sizes_E


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _dispatch(x_MD: jax.Array, order_N: jax.Array, place_N: jax.Array, num_chosen: int) -> jax.Array:
    """Returns the K copies of each token sorted by expert: [M, D] -> [N, D].

    Args:
      order_N: int32; sorted row n is copy order[n] % K of token order[n] // K.
      place_N: int32, the inverse of order_N.
      num_chosen: K.
    """
    return _rows(x_MD, order_N // num_chosen)


def _rows(x_ND, index):
    return x_ND.at[index].get(mode="promise_in_bounds")


def _dispatch_forward(x_MD, order_N, place_N, num_chosen):
    return _dispatch(x_MD, order_N, place_N, num_chosen), place_N


def _dispatch_backward(num_chosen, place_N, grad_ND):
    return _rows(grad_ND, place_N).reshape(-1, num_chosen, grad_ND.shape[-1]).sum(axis=1), None, None


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _combine(y_ND: jax.Array, gates_MK: jax.Array, order_N: jax.Array, place_N: jax.Array) -> jax.Array:
    """Returns sum_k gates[m, k] * y[row of copy k of token m]: [N, D] -> [M, D]."""
    return (_unsorted(y_ND, gates_MK, place_N) * gates_MK[..., None]).sum(axis=1)


def _unsorted(y_ND, gates_MK, place_N):
    return _rows(y_ND, place_N).reshape(*gates_MK.shape, y_ND.shape[-1])


def _combine_forward(y_ND, gates_MK, order_N, place_N):
    return _combine(y_ND, gates_MK, order_N, place_N), (y_ND, gates_MK, order_N, place_N)


def _combine_backward(residuals, grad_MD):
    y_ND, gates_MK, order_N, place_N = residuals
    grad_ND = _rows(grad_MD, order_N // gates_MK.shape[1]) * gates_MK.reshape(-1)[order_N][:, None]
    grad_MK = (_unsorted(y_ND, gates_MK, place_N) * grad_MD[:, None]).sum(axis=-1, dtype=jnp.float32)
    return grad_ND, grad_MK.astype(gates_MK.dtype), None, None


_combine.defvjp(_combine_forward, _combine_backward)
