"""Matmuls of activations and weights in 8-bit floating point, with both gradients.

    y = x w,   dx = g w^T,   dw = x^T g

DeepSeek-V3 (2412.19437, section 3.3) with coarser scales. x, w and the gradient g of y are rounded once each, to
float8_e4m3fn; sums are float32, results have the compute dtype. An array is divided by its scales before it is rounded,
and results are multiplied by them: one scale per token of x and of g, one for w. The backward pass reads x in 8 bits,
which takes half the memory of bfloat16 between the passes.

A scale must be constant along the summed dim of a matmul. In dw, which sums over tokens, the scales of tokens are
therefore applied to the rounded g, as shifts of its exponents relative to the largest of them (`with_one_scale`).

Scales are powers of two. An 8-bit float has an exponent of its own: within the 14 binades of its normal numbers a scale
changes no rounding error, it only decides which values underflow. One scale per token is then as exact as DeepSeek-V3's
one per 128 values, while one for all of g loses the gradients of tokens with a small loss (docs/log.md has the errors).
Powers of two also make every multiplication by a scale exact: a result may be rounded to bfloat16 before it is scaled,
rounded arrays are exact in bfloat16, and normal numbers are rounded alike under every scale, on every mesh.

Gradients are rounded to e4m3 as in DeepSeek-V3: with a scale per token its range suffices, and the errors of dx and dw
are lower than with e5m2 by a third.

Everything is a plain operation of the jit that calls it, so that the compiler can fuse maxima and casts with what comes
before them. A device without 8-bit matmuls converts the rounded operands first, with the same result.
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from mtp_jax.errors import warn_once
from mtp_jax.kernels.device import device

DTYPE = jnp.float8_e4m3fn  # of activations and weights
GRADIENT_DTYPE = jnp.float8_e4m3fn  # of gradients of outputs; float8_e5m2 has more range and one bit less
# Sums in float32: by default Hopper GPUs keep about 14 bits of a sum of 8-bit products (2412.19437, section 3.3.2).
PRECISION = jax.lax.Precision.HIGHEST
SMALLEST = 2.0**-100  # maxima below it count as this, so that a row of zeros has a scale
SMALLEST_SCALE = 2.0**-120  # of the product of two scales, the smallest of which underflow
EXPONENT_BITS = np.uint32(0x7F800000)  # of a float32


class Rounded(NamedTuple):
    """Array rounded to 8 bits, `values * scale`.

    values: float8. scale: float32 powers of two, with size 1 in the dims that share a scale.
    """

    values: jax.Array
    scale: jax.Array

    def dequantized(self, dtype: DTypeLike) -> jax.Array:
        """Returns values * scale; exact in bfloat16 and float32."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def rounded(x: jax.Array, dims: Sequence[int], dtype: DTypeLike = DTYPE) -> Rounded:
    """Rounds x to 8 bits with one scale for the elements along `dims`, from their largest absolute value.

    That value is scaled to [128, 256) for e4m3 and [16384, 32768) for e5m2, so nothing overflows. A row of zeros stays
    zero. An infinity or NaN becomes NaN, and the other elements with its scale become zero.

    Args:
      x: bfloat16 or float32.
    """
    x = x.astype(jnp.float32)
    largest = jnp.maximum(jnp.max(jnp.abs(x), axis=tuple(dims), keepdims=True), SMALLEST)
    # The exponent alone is the largest power of two in it; that of an infinity or NaN is infinity.
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, jnp.uint32) & EXPONENT_BITS, jnp.float32)
    scale = power * 2.0 ** (1 - math.floor(math.log2(float(jnp.finfo(dtype).max))))
    return Rounded((x * (1 / scale)).astype(dtype), scale)


def with_one_scale(x: Rounded, factor: jax.Array) -> Rounded:
    """Returns x * factor with one scale for all elements, a scalar; exact but for values that underflow.

    Args:
      factor: powers of two in the shape of x.scale.
    """
    both = x.scale * factor
    scale = jnp.maximum(jnp.max(both), SMALLEST_SCALE)
    return Rounded((x.values.astype(jnp.float32) * (both / scale)).astype(x.values.dtype), scale)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: jax.Array, w: jax.Array, in_dims: tuple[int, ...]) -> jax.Array:
    """Product of x [tokens..., contracted...] and a weight: [tokens..., outputs...] in the dtype of x.

    Args:
      w: in the dtype of x.
      in_dims: the dims of w that are contracted, increasing; the others are outputs.
    """
    return _forward(x, w, in_dims)[0]


def _forward(x, w, in_dims):
    assert x.dtype == w.dtype and list(in_dims) == sorted(set(in_dims)), (x.dtype, w.dtype, in_dims)
    if not device().multiplies_fp8:
        warn_once("model.matmul_precision=fp8: slow here; this device multiplies fp8 operands in a larger dtype")
    _, summed, outputs = _dims(x.ndim, w.ndim, in_dims)
    x8, w8 = rounded(x, summed), rounded(w, range(w.ndim))
    y = _product(x8.values, w8.values, (summed, in_dims), x.dtype)
    return _scaled(y, _per_token(x8, summed, outputs), w8.scale.reshape(())), (x8, w8)


def _backward(in_dims, residuals, g):
    x8, w8 = residuals
    tokens, summed, outputs = _dims(x8.values.ndim, w8.values.ndim, in_dims)
    own = tuple(range(len(tokens), g.ndim))  # the outputs, in g
    g8 = rounded(g, own, GRADIENT_DTYPE)
    dx = _product(g8.values, w8.values, (own, outputs), g.dtype)
    dx = _scaled(dx, _per_token(g8, own, summed), w8.scale.reshape(()))
    shifted = with_one_scale(g8, _per_token(x8, summed, outputs))
    dw = _product(x8.values, shifted.values, (tokens, tokens), g.dtype)
    dw = _scaled(dw, shifted.scale)
    # From [contracted..., outputs...] to the order of the weight's dims.
    return dx, jnp.transpose(dw, sorted(range(dw.ndim), key=(*in_dims, *outputs).__getitem__))


dot.defvjp(_forward, _backward)


def _dims(x_ndim: int, w_ndim: int, in_dims: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Returns the dims of x that are tokens and those that are contracted, and the output dims of w."""
    first = x_ndim - len(in_dims)
    return tuple(range(first)), tuple(range(first, x_ndim)), tuple(d for d in range(w_ndim) if d not in in_dims)


def _product(a: jax.Array, b: jax.Array, summed: tuple[Sequence[int], Sequence[int]], dtype: DTypeLike) -> jax.Array:
    return jax.lax.dot_general(a, b, (summed, ((), ())), PRECISION, preferred_element_type=jnp.dtype(dtype))


def _scaled(x: jax.Array, *scales: jax.Array) -> jax.Array:
    """Returns x times scales, in its dtype."""
    return functools.reduce(jnp.multiply, scales, x.astype(jnp.float32)).astype(x.dtype)


def _per_token(x: Rounded, old: tuple[int, ...], new: tuple[int, ...]) -> jax.Array:
    """Returns the scales of tokens, followed by as many dims of size 1 as `new` has, in place of those of `old`."""
    return x.scale.reshape(*x.scale.shape[: x.scale.ndim - len(old)], *(1 for _ in new))
