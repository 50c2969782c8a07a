"""The operation with its gradient, made of the three kernels.

Shape letters: as in `kernels.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.attention.hopper.backward import gradient_of_keys, gradient_of_queries
from mtp_jax.kernels.attention.hopper.blocks import Ranges, Tiles
from mtp_jax.kernels.attention.hopper.forward import forward


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
