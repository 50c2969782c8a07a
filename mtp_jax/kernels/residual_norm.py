"""Sum of a residual stream and a layer's output, and its RMSNorm, of a few tokens in one GPU kernel.

XLA takes two kernels for the norm of a single row, and each adds up the outputs of all layers before it again.

Shape letters: N tokens, D model.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from mtp_jax.kernels.device import device
from mtp_jax.kernels.triton_call import triton_call

MOST_TOKENS = 32
MOST_DIM = 8192  # in the registers of one program


def add_and_norm(
    h_ND: jax.Array, out_ND: jax.Array | None, scale_D: jax.Array, eps: float
) -> tuple[jax.Array, jax.Array]:
    """Returns h + out (h if out is None), and its RMSNorm (1910.07467) computed in float32; both in the dtype of h."""
    num_rows, dim = h_ND.shape
    arrays = (h_ND, scale_D) if out_ND is None else (h_ND, scale_D, out_ND)
    shape = jax.ShapeDtypeStruct(h_ND.shape, h_ND.dtype)
    found = triton_call(
        functools.partial(_kernel, eps=eps),
        *arrays,
        grid=(num_rows,),
        out_shape=(shape,) if out_ND is None else (shape, shape),
        name="add_and_norm",
        num_warps=4 if dim <= 2048 else 8,
    )
    return (h_ND, found[0]) if out_ND is None else (found[0], found[1])


def unsupported_reason(h_ND: jax.Array) -> str:
    """Returns why the kernel does not support the residual stream or the device; empty if it does."""
    if reason := device().lacks_hopper():
        return reason
    if h_ND.shape[0] > MOST_TOKENS or h_ND.shape[1] > MOST_DIM:
        return f"it is for {MOST_TOKENS} tokens of {MOST_DIM} dims, and these are {h_ND.shape}"
    return ""


def _kernel(h_ND, scale_D, *others, eps):
    """Program (row,); others: the normed rows, or outputs to add, sums and normed rows."""
    normed_ND = others[-1]
    row, dim = pl.program_id(0), h_ND.shape[1]
    at = jnp.arange(pl.next_power_of_2(dim))  # a slice would be out of bounds
    mask = at < dim

    def load(ref):
        return plgpu.load(ref, mask=mask, other=0.0).astype(jnp.float32)

    x_D = load(h_ND.at[row, at])
    if len(others) > 1:
        out_ND, sum_ND, _ = others
        sum_D = (x_D + load(out_ND.at[row, at])).astype(sum_ND.dtype)
        plgpu.store(sum_ND.at[row, at], sum_D, mask=mask)
        x_D = sum_D.astype(jnp.float32)
    x_D = x_D * jax.lax.rsqrt(jnp.sum(x_D * x_D) / dim + eps) * load(scale_D.at[at])
    plgpu.store(normed_ND.at[row, at], x_D.astype(normed_ND.dtype), mask=mask)
