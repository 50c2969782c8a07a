"""The one attention operation: causal, within a document and a window, grouped heads, unequal key and value sizes.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

import jax

from mtp_jax.kernels.attention import cudnn, hopper, splash, xla
from mtp_jax.kernels.attention.mask import Mask
from mtp_jax.kernels.attention.xla import attend_cached
from mtp_jax.kernels.device import Device
from mtp_jax.kernels.selection import Backend, select

__all__ = ["BACKENDS", "Mask", "attend", "attend_cached"]

# Of each backend: `attend`, as below but for the kernel, and `unsupported_reason` of the same arguments but the scale.
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
    """softmax(scale * q k^T + mask) v, with scores and softmax in float32.

    Args:
      sinks_H: float32, one more score per head, of a key without a value: exp(sink) joins the denominator of the
        softmax, so that a head can attend to nothing (gpt-oss, 2508.10925). None: no sinks.
      kernel: the name of one of `BACKENDS`, or "auto": the first of them that supports the operands.

    Returns:
      [B, T, H, V] in the dtype of v.

    Raises:
      UserError: the kernel asked for does not support the operands.
    """
    operands = q_BTHQ, k_BSGQ, v_BSGV, mask, sinks_H
    return select("model.attention_kernel", kernel, BACKENDS, *operands).run(*operands, scale)
