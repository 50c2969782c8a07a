"""Attention within packed documents for Hopper GPUs in Pallas, which skips what lies in other documents.

The online softmax of FlashAttention (2205.14135) with two computing warpgroups that take turns on the tensor cores and
one that fetches (FlashAttention-3, 2407.08608). A document is a run of positions, so the keys that a block of queries
sees are a range: from where the document of its first query begins to its last query; and the queries that see a block
of keys are a range too. Only blocks that reach over a range's end are masked element by element. The backward pass is
two kernels, one for the queries and one for keys and values, which compute the probabilities anew.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.layers.attention_hopper.backward import gradient_of_keys, gradient_of_queries
from mtp_jax.layers.attention_hopper.blocks import Ranges, Tiles, ranges
from mtp_jax.layers.attention_hopper.forward import forward
from mtp_jax.layers.dispatch import KERNEL

__all__ = ["Ranges", "Tiles", "attend", "ranges"]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def attend(
    q_BTHQ: jax.Array, k_BSGQ: jax.Array, v_BSGV: jax.Array, seen: Ranges, scale: float, tiles: Tiles
) -> jax.Array:
    """softmax(scale * q k^T + mask) v in float32; [B, T, H, V] in the dtype of q.

    bfloat16 or float16; T and S are multiples of 128, Q and V of 64, V <= Q, Q + V <= 320 (registers).
    """
    return forward(q_BTHQ, k_BSGQ, v_BSGV, seen, scale, tiles)[0]


def _attend_forward(q_BTHQ, k_BSGQ, v_BSGV, seen, scale, tiles):
    out_BTHV, total_BHT = forward(q_BTHQ, k_BSGQ, v_BSGV, seen, scale, tiles)
    out_BTHV, total_BHT = checkpoint_name(out_BTHV, KERNEL), checkpoint_name(total_BHT, KERNEL)
    return out_BTHV, (q_BTHQ, k_BSGQ, v_BSGV, seen, out_BTHV, total_BHT)


def _attend_backward(scale, tiles, residuals, grad_BTHV):
    q_BTHQ, k_BSGQ, v_BSGV, seen, out_BTHV, total_BHT = residuals
    delta_BHT = jnp.einsum("bthv,bthv->bht", out_BTHV, grad_BTHV, preferred_element_type=jnp.float32)
    given = (seen, q_BTHQ, k_BSGQ, v_BSGV, grad_BTHV, total_BHT, delta_BHT)
    dq_BTHQ = gradient_of_queries(*given, scale, tiles.queries)
    return dq_BTHQ, *gradient_of_keys(*given, scale, tiles.keys), None


attend.defvjp(_attend_forward, _attend_backward)
