"""Tokens dispatched to rows sorted by expert, and the experts' outputs combined per token.

Shape letters: B rows, T positions, D model, K experts per token, M = B * T tokens, N = M * K copies, E experts.
"""

from collections.abc import Callable

import jax

from mtp_jax.kernels.device import device
from mtp_jax.kernels.permute import gather, sort
from mtp_jax.kernels.selection import Backend, select

BACKENDS = (
    Backend("gather", gather, lambda: "" if device().gathers_are_fast else "gathers are slow here"),
    Backend("sort", sort),
)


def through_experts(
    x_BTD: jax.Array,
    gates_BTK: jax.Array,
    chosen_BTK: jax.Array,
    num_experts: int,
    experts: Callable[[jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """sum_k gates[k] * expert_{chosen[k]}(x), [B, T, D] in the dtype of x, of tokens that are all on one device.

    Args:
      gates_BTK: in the dtype of x. chosen_BTK: int32, below num_experts.
      experts: (rows [N, D] sorted by expert, int32[E] rows of each expert) -> outputs [N, D] of the rows.
    """
    backend = select("permute", "auto", BACKENDS).run
    expert_N, x_MD = chosen_BTK.reshape(-1), x_BTD.reshape(-1, x_BTD.shape[-1])
    rows_ND, sizes_E, order = backend.dispatch(x_MD, expert_N, num_experts, chosen_BTK.shape[-1])
    return backend.combine(experts(rows_ND, sizes_E), gates_BTK, order)
