"""The one attention operation: causal, within a document, grouped heads, unequal key and value sizes.

Shape letters: B rows, T queries, S keys, H query heads, G key heads (H = G * M), Q query/key dim, V value dim.
"""

import jax

from mtp_jax.kernels.attention import cudnn, hopper, splash, xla
from mtp_jax.kernels.attention.xla import attend_cached
from mtp_jax.kernels.device import Device
from mtp_jax.kernels.selection import Backend, select

# Of each backend: `attend`, as below but for the kernel, and `unsupported_reason` of the same arguments but the scale.
BACKENDS = (
    Backend("mosaic", hopper.attend, hopper.unsupported_reason, "gpu", Device.lacks_hopper),
    Backend("cudnn", cudnn.attend, cudnn.unsupported_reason, "gpu", Device.lacks_hopper),
    Backend("splash", splash.attend, splash.unsupported_reason, "tpu", Device.lacks_tpu),
    Backend("xla", xla.attend),
)


def attend(
    q_BTHQ: jax.Array,
    k_BSGQ: jax.Array,
    v_BSGV: jax.Array,
    segments_BS: jax.Array | None,
    scale: float,
    first: jax.Array | int = 0,
    kernel: str = "auto",
) -> jax.Array:
    """softmax(scale * q k^T + mask) v, where query i sees key j iff j <= i and both have the same segment id.

    A document is a run of equal ids, and so is padding (0): its positions see only padding, and every query sees
    itself, so no row of the softmax is empty. Scores and softmax are float32.

    Args:
      segments_BS: int; None: every row is one document.
      first: the queries are the positions first .. first + T - 1 of the S; 0 unless the row is sharded.
      kernel: the name of one of `BACKENDS`, or "auto": the first of them that can.

    Returns:
      [B, T, H, V] in the dtype of v.

    Raises:
      UserError: the kernel asked for cannot be.
    """
    inputs = q_BTHQ, k_BSGQ, v_BSGV, segments_BS, first
    return select("model.attention_kernel", kernel, BACKENDS, *inputs).run(*inputs, scale)
