"""Causal attention within documents and windows, with grouped heads and different key and value dims.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

import jax

from mtp_jax.kernels.attention import cudnn, hopper, splash, xla
from mtp_jax.kernels.attention.mask import Mask
from mtp_jax.kernels.attention.xla import attend_cached
from mtp_jax.kernels.device import Device
from mtp_jax.kernels.selection import Backend, select

__all__ = ["BACKENDS", "Mask", "attend", "attend_cached"]

# Each backend has `attend`, as below without `kernel`, and `unsupported_reason` of the same arguments without `scale`.
BACKENDS = (
    Backend("pallas_hopper", hopper.attend, hopper.unsupported_reason, "gpu", Device.lacks_hopper),
    Backend("cudnn", cudnn.attend, cudnn.unsupported_reason, "gpu", Device.lacks_hopper),
    Backend("splash", splash.attend, splash.unsupported_reason, "tpu", Device.lacks_tpu),
    Backend("xla", xla.attend),
)


def attend(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    mask: Mask,
    scale: float,
    sinks_H: jax.Array | None = None,
    kernel: str = "auto",
) -> jax.Array:
    """Returns softmax(scale * q k^T + mask) v, with scores and softmax in float32.

    Args:
      sinks_H: float32, attention sinks: exp(sink) is added to the denominator of the softmax, as for a key without a
        value, so that a head can attend to nothing (gpt-oss, 2508.10925). None: no sinks.
      kernel: the name of one of `BACKENDS`, or "auto" for the first one that supports the operands.

    Returns:
      [B, T, H, V] in the dtype of v.

    Raises:
      UserError: the requested kernel does not support the operands.
    """
    operands = q_BTHQ, k_BSGQ, v_BSGV, mask, sinks_H
    return select("model.attention_kernel", kernel, BACKENDS, *operands).run(*operands, scale)
