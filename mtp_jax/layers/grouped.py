"""The one grouped matmul: rows sorted by group, and every group has a matrix of its own.

On TPUs `jax.lax.ragged_dot` is native from jax 0.11 on. Before, the gradient of the matrices multiplies every row for
every group, so jax's megablox kernels are taken instead (layers/grouped_megablox.py). On GPUs it is compiled to a
matmul of every row with every matrix, and its gradient to as much again (98,304 x 2048 x 2816 in 64 groups on an H200:
99.6 ms where 1.5 ms is the floor, and no memory for the gradient), so Hopper GPUs take kernels of our own
(layers/grouped_hopper.py).

Shape letters: N rows, D columns in, F columns out, E groups.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from mtp_jax.config import UserError
from mtp_jax.kernels.device import device
from mtp_jax.layers import grouped_megablox
from mtp_jax.layers.dispatch import KERNEL, note

RAGGED_DOT = "grouped_matmul_ragged_dot"  # its output, to policies of recomputation
BLOCK = 128  # what the kernels cut columns into
NATIVE_SINCE = (0, 11)  # jax, on TPUs: libtpu 0.0.48 multiplies each row once in all three products, 0.0.42 in two


class Kernels(NamedTuple):
    """The three products of a grouped matmul.

    forward: (x [N, D], w [E, D, F], sizes [E]) -> [N, F]. rows: (y [N, F], w, sizes) -> [N, D], by each transposed
    matrix. matrices: (x, y, sizes) -> [E, D, F], x^T y of each group.
    """

    forward: Callable[..., jax.Array]
    rows: Callable[..., jax.Array]
    matrices: Callable[..., jax.Array]


def grouped_matmul(x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array, kernel: str = "auto") -> jax.Array:
    """y[n] = x[n] @ w[e] for the sizes[e] rows of each group e in turn. [N, F] in the dtype of x.

    Args:
      sizes_E: int32, together at most N; rows after the last group are zero, here and in the result.
      kernel: "xla", "mosaic" (Pallas on Hopper), "megablox" (Pallas on TPUs), or "auto": what is fast on the device,
        wherever it can.

    Raises:
      UserError: kernel is "mosaic" or "megablox" where it cannot be.
    """
    chosen, num_rows = choose(x_ND, w_EDF, kernel), x_ND.shape[0]
    if chosen == "xla":
        return checkpoint_name(jax.lax.ragged_dot(x_ND, w_EDF, sizes_E), RAGGED_DOT)
    if chosen == "megablox" and num_rows % BLOCK:
        x_ND = jnp.pad(x_ND, ((0, -num_rows % BLOCK), (0, 0)))
    # The kernels write no row outside the groups. Zero rows come out as zeros in any group: the last one takes them.
    is_last_E = jnp.arange(len(sizes_E)) == len(sizes_E) - 1
    sizes_E = jnp.where(is_last_E, sizes_E + x_ND.shape[0] - sizes_E.sum(), sizes_E)
    kernels = mosaic_kernels() if chosen == "mosaic" else megablox_kernels()
    return checkpoint_name(differentiable(kernels, x_ND, w_EDF, sizes_E)[:num_rows], KERNEL)


def choose(x_ND: jax.Array, w_EDF: jax.Array, kernel: str) -> str:
    """ "xla" or the kernels that `grouped_matmul` takes. What keeps "auto" from the device's kernels is said, once."""
    reasons = {"mosaic": why_not_mosaic(x_ND, w_EDF), "megablox": grouped_megablox.why_not(x_ND, w_EDF), "xla": ""}
    if kernel != "auto" and reasons[kernel]:
        raise UserError(f"model.expert_kernel={kernel}: {reasons[kernel]}; use model.expert_kernel=auto")
    if kernel != "auto":
        return kernel
    if device().family == "tpu":
        own = "megablox" if jax.__version_info__ < NATIVE_SINCE else "xla"
    else:
        own = "mosaic" if device().family == "gpu" else "xla"
    if not reasons[own]:
        return own
    if x_ND.shape[0] >= BLOCK:  # fewer are those of decoding, where nothing is lost
        note(f"experts by jax.lax.ragged_dot, slow on {'TPUs' if own == 'megablox' else 'GPUs'}: {reasons[own]}")
    return "xla"


def why_not_mosaic(x_ND: jax.Array, w_EDF: jax.Array) -> str:
    """Why the Hopper kernels cannot take this product; empty where they can."""
    dims = (*x_ND.shape[1:], w_EDF.shape[2])
    if reason := device().lacks_hopper():
        return reason
    if x_ND.dtype != jnp.bfloat16 or w_EDF.dtype != jnp.bfloat16:
        return f"the kernels compute in bfloat16, and this is {x_ND.dtype} by {w_EDF.dtype}"
    if any(dim % BLOCK for dim in dims) or x_ND.shape[0] < BLOCK:
        return f"the kernels take at least {BLOCK} rows of multiples of {BLOCK} columns, and these are {dims} columns"
    return ""


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def differentiable(kernels: Kernels, x_ND: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """The grouped matmul by `kernels`, and both gradients by them; every row is in a group."""
    return kernels.forward(x_ND, w_EDF, sizes_E)


def _forward(kernels, x_ND, w_EDF, sizes_E):
    return kernels.forward(x_ND, w_EDF, sizes_E), (x_ND, w_EDF, sizes_E)


def _backward(kernels, residuals, grad_NF):
    x_ND, w_EDF, sizes_E = residuals
    return kernels.rows(grad_NF, w_EDF, sizes_E), kernels.matrices(x_ND, grad_NF, sizes_E), None


differentiable.defvjp(_forward, _backward)


@functools.cache
def mosaic_kernels() -> Kernels:
    """The Pallas kernels, with the tiles that were fastest on one H200 (docs/log.md). A batch of products is done one
    after another.

    Imported where they are used: they need what only a jax with CUDA has.
    """
    from mtp_jax.layers import grouped_hopper
    from mtp_jax.layers.grouped_hopper import Tiles

    forward = functools.partial(grouped_hopper.product, tiles=Tiles(turns=11), is_transposed=False)
    rows = functools.partial(grouped_hopper.product, tiles=Tiles(turns=8), is_transposed=True)
    matrices = functools.partial(grouped_hopper.matrices, tiles=Tiles(turns=8))
    return Kernels(*map(jax.custom_batching.sequential_vmap, (forward, rows, matrices)))


@functools.cache
def megablox_kernels() -> Kernels:
    """jax's Pallas kernels for TPUs. A batch of products is done one after another."""
    mega = grouped_megablox  # lambdas: of a function with defaults, sequential_vmap would trace these as arrays
    three = (lambda x, w, sizes: mega.product(x, w, sizes), lambda y, w, sizes: mega.product(y, w, sizes, True))
    return Kernels(*map(jax.custom_batching.sequential_vmap, (*three, lambda x, y, sizes: mega.matrices(x, y, sizes))))
