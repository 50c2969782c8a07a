"""Differentiable attention composed of the three kernels.

Shape letters: as in `kernels.attention`.
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.attention.hopper.backward import gradient_of_keys, gradient_of_queries
from mtp_jax.kernels.attention.hopper.blocks import LOG2E, Ranges, Tiles
from mtp_jax.kernels.attention.hopper.forward import forward


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attend(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    seen: Ranges,
    sinks_H: jax.Array | None,
    scale: float,
    tiles: Tiles,
) -> jax.Array:
    """Returns softmax(scale * q k^T + mask) v, computed in float32; [B, T, H, V] in the dtype of q.

    Operands are bfloat16 or float16. T and S are multiples of 128, Q and V of 64; V <= Q and Q + V <= 320 (registers).
    """
    return _with_sinks(*forward(q_BTHQ, k_BSGQ, v_BSGV, seen, scale, tiles), sinks_H)[0]


def _with_sinks(out_BTHV, total_BHT, sinks_H):
    """Adds exp(sink) to the denominator of the softmax; returns the output and log2 of the denominator."""
    if sinks_H is None:
        return out_BTHV, total_BHT
    with_sink_BHT = jnp.logaddexp2(total_BHT, sinks_H.astype(jnp.float32)[:, None] * LOG2E)
    share_BTH1 = jnp.swapaxes(jnp.exp2(total_BHT - with_sink_BHT), 1, 2)[..., None]
    return (out_BTHV * share_BTH1).astype(out_BTHV.dtype), with_sink_BHT


def _attend_forward(q_BTHQ, k_BSGQ, v_BSGV, seen, sinks_H, scale, tiles):
    out_BTHV, total_BHT = _with_sinks(*forward(q_BTHQ, k_BSGQ, v_BSGV, seen, scale, tiles), sinks_H)
    out_BTHV, total_BHT = checkpoint_name(out_BTHV, KERNEL), checkpoint_name(total_BHT, KERNEL)
    return out_BTHV, (q_BTHQ, k_BSGQ, v_BSGV, seen, sinks_H, out_BTHV, total_BHT)


def _attend_backward(scale, tiles, residuals, grad_BTHV):
    """Computes the gradients from the output and log2 of the denominator, sinks included.

    A sink is an additional key with value 0, so it affects the gradients of queries, keys and values only through the
    denominator.
    """
    q_BTHQ, k_BSGQ, v_BSGV, seen, sinks_H, out_BTHV, total_BHT = residuals
    delta_BHT = jnp.einsum("bthv,bthv->bht", out_BTHV, grad_BTHV, preferred_element_type=jnp.float32)
    given = (seen, q_BTHQ, k_BSGQ, v_BSGV, grad_BTHV, total_BHT, delta_BHT)
    dq_BTHQ = gradient_of_queries(*given, scale, tiles.queries)
    dsinks_H = None
    if sinks_H is not None:
        probs_BHT = jnp.exp2(sinks_H.astype(jnp.float32)[:, None] * LOG2E - total_BHT)
        dsinks_H = -(probs_BHT * delta_BHT).sum((0, 2)).astype(sinks_H.dtype)
    return dq_BTHQ, *gradient_of_keys(*given, scale, tiles.keys), None, dsinks_H


attend.defvjp(_attend_forward, _attend_backward)
