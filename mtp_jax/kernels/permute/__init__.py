"""Dispatch of tokens to rows sorted by expert, and combination of the experts' outputs per token.

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
    """Returns sum_k gates[k] * expert_{chosen[k]}(x) for tokens on one device; [B, T, D] in the dtype of x.

    Args:
      gates_BTK: in the dtype of x. chosen_BTK: int32, below num_experts.
      experts: (rows [N, D] sorted by expert, int32[E] number of rows per expert) -> outputs [N, D].
    """
    backend = select("permute", "auto", BACKENDS).run
    expert_N, x_MD = chosen_BTK.reshape(-1), x_BTD.reshape(-1, x_BTD.shape[-1])
    rows_ND, sizes_E, order = backend.dispatch(x_MD, expert_N, num_experts, chosen_BTK.shape[-1])
    return backend.combine(experts(rows_ND, sizes_E), gates_BTK, order)
