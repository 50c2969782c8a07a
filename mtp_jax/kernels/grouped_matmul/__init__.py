"""Grouped matmul: rows sorted by group times one matrix per group.

Shape letters: N rows, D columns in, F columns out, E groups.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from mtp_jax.errors import warn_once
from mtp_jax.kernels.device import Device, device
from mtp_jax.kernels.grouped_matmul import hopper, megablox, xla
from mtp_jax.kernels.selection import Backend, select

# First jax whose ragged_dot multiplies each row once on TPUs in all three products (libtpu 0.0.48; 0.0.42: in two).
NATIVE_SINCE = (0, 11)
HOPPER = Backend("pallas_hopper", hopper.run, hopper.unsupported_reason, "gpu", Device.lacks_hopper)
MEGABLOX = Backend("megablox", megablox.run, megablox.unsupported_reason, "tpu", Device.lacks_tpu)
XLA = Backend("xla", xla.run)
FEW_ROWS = 128  # fewer rows occur in decoding, where no kernel is faster


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, kernel: str = "auto") -> jax.Array:
    """Returns y[n] = x[n] @ w[e] for each row n of group e; [N, F] in the dtype of x.

    Args:
      sizes_E: int32, number of consecutive rows of each group, in total at most N; rows after the last group must be
        zero and are zero in the result.
      kernel: "xla", "pallas_hopper", "megablox" (Pallas on TPUs), or "auto": the fastest one on the device that
        supports the operands.

    Raises:
      UserError: kernel is "pallas_hopper" or "megablox" and does not support the operands or the device.
    """
    return _selected(x_ND, w_EDF, kernel).run(x_ND, w_EDF, sizes_E)


def grouped_matmuls(
    x_ND: jax.Array, weights: Sequence[jax.Array], sizes_E: jax.Array, kernel: str = "auto", is_fp8: bool = False
) -> list[jax.Array]:
    """Returns the `grouped_matmul` of the same rows with each of several weights [E, D, F] of one shape.

    Args:
      is_fp8: round the operands of the products and of their gradients to 8 bits; see `gradient.differentiable_fp8`.
    """
    backend = _selected(x_ND, weights[0], kernel)
    if is_fp8 and device().multiplies_fp8 and backend is not HOPPER:
        warn_once(
            f"model.matmul_precision=fp8: model.expert_kernel={backend.name} has no fp8 kernel; operands of experts "
            f"are rounded to 8 bits, but multiplied in {x_ND.dtype}, no faster"
        )
    # One wide matmul, whose gradient of the rows sums over all weights at once.
    if backend is HOPPER and len(weights) > 1:
        wide_NF = backend.run(x_ND, jnp.concatenate(weights, axis=-1), sizes_E, is_fp8)
        return jnp.split(wide_NF, len(weights), axis=-1)
    return [backend.run(x_ND, w_EDF, sizes_E, is_fp8) for w_EDF in weights]


def _selected(x_ND: jax.Array, w_EDF: jax.Array, kernel: str) -> Backend:
    rest = (XLA, MEGABLOX) if jax.__version_info__ >= NATIVE_SINCE else (MEGABLOX, XLA)
    warns = x_ND.shape[0] >= FEW_ROWS
    return select("model.expert_kernel", kernel, (HOPPER, *rest), x_ND, w_EDF, warns=warns)
