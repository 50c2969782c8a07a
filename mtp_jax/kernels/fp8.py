"""Matmuls of activations and weights in 8-bit floating point, with both gradients.

    y = x w,   dx = g w^T,   dw = x^T g

DeepSeek-V3 (2412.19437, section 3.3) with coarser scales. x, w and the gradient g of y are rounded once each, to
float8_e4m3fn; results have the compute dtype. An array is divided by its scales before it is rounded, and results are
multiplied by them: one scale per token of x and of g, one for w. The backward pass reads x in 8 bits, which takes half
the memory of bfloat16 between the passes.

A scale must be constant along the summed dim of a matmul. In dw, which sums over tokens, the scales of tokens are
therefore applied to the rounded g, as shifts of its exponents relative to the largest of them (`with_one_scale`).

Scales are powers of two. An 8-bit float has an exponent of its own: within the 14 binades of its normal numbers a scale
changes no rounding error, it only decides which values underflow. One scale per token is then as exact as DeepSeek-V3's
one per 128 values, while one for all of g loses the gradients of tokens with a small loss (docs/log.md has the errors).
Powers of two also make every multiplication by a scale exact: a result may be rounded to bfloat16 before it is scaled,
rounded arrays are exact in bfloat16, and normal numbers are rounded alike under every scale, on every mesh.

Gradients are rounded to e4m3 as in DeepSeek-V3: with a scale per token its range suffices, and the errors of dx and dw
are lower than with e5m2 by a third.

Gradients of logits are an exception (`losses/driver.py`): most are 1e-5 of the largest of their token and less, which
would be zero in e4m3, so they are rounded to e5m2.

Everything is a plain operation of the jit that calls it, so that the compiler can fuse maxima and casts with what comes
before them. A device without 8-bit matmuls converts the rounded operands first, with the same result.

8-bit matmuls of Hopper GPUs read operands whose contracted dim is the last one in memory. x, w and g are contracted
over one dim in one product and over another in a second one, so the pass that rounds them writes both orders
(`ordered`).
"""

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Layout, with_layout_constraint
from jax.typing import DTypeLike

from mtp_jax.errors import warn_once
from mtp_jax.kernels import rounding
from mtp_jax.kernels.device import device
from mtp_jax.sharding import is_on_one_device

DTYPE = jnp.float8_e4m3fn  # of activations and weights
GRADIENT_DTYPE = jnp.float8_e4m3fn  # of gradients of outputs; float8_e5m2 has more range and one bit less
# By default Hopper GPUs keep about 14 bits of a sum of 8-bit products (2412.19437, section 3.3.2). Gradients are summed
# in float32, which takes 19 % longer (H200); as in NVIDIA's Transformer Engine, the forward pass is not.
FORWARD_PRECISION = jax.lax.Precision.DEFAULT
GRADIENT_PRECISION = jax.lax.Precision.HIGHEST
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


def rounded(x: jax.Array, dims: Sequence[int], dtype: DTypeLike = DTYPE, largest: jax.Array | None = None) -> Rounded:
    """Rounds x to 8 bits with one scale for the elements along `dims`, from their largest absolute value.

    That value is scaled to [128, 256) for e4m3 and [16384, 32768) for e5m2, so nothing overflows. A row of zeros stays
    zero. An infinity or NaN becomes NaN, and the other elements with its scale become zero.

    Args:
      x: bfloat16 or float32.
      largest: float32, the largest absolute values, with size 1 in `dims`, where they are known already.
    """
    x = x.astype(jnp.float32)
    if largest is None:
        largest = jnp.max(jnp.abs(x), axis=tuple(dims), keepdims=True)
    largest = jnp.maximum(largest, SMALLEST)
    # The exponent alone is the largest power of two in it; that of an infinity or NaN is infinity.
    power = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(largest, jnp.uint32) & EXPONENT_BITS, jnp.float32)
    scale = power * 2.0 ** (1 - math.floor(math.log2(float(jnp.finfo(dtype).max))))
    return Rounded(_row_major((x * (1 / scale)).astype(dtype)), scale)


def common_scale(scale: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns one scale for all elements, a scalar, and the factors from `scale` to it."""
    common = jnp.maximum(jnp.max(scale), SMALLEST_SCALE)
    return common, scale / common


def with_one_scale(x: Rounded, factor: jax.Array) -> Rounded:
    """Returns x * factor with one scale for all elements, a scalar; exact but for values that underflow.

    Args:
      factor: powers of two in the shape of x.scale.
    """
    common, shift = common_scale(x.scale * factor)
    values = (x.values.astype(jnp.float32) * shift).astype(x.values.dtype)
    return Rounded(_row_major(values), common)


def ordered(x: jax.Array, order: Sequence[int]) -> jax.Array:
    """Returns an array of `rounded` values with its dims in another order, on GPUs as stored in memory.

    Without layouts and a barrier the compiler would take the order to be a matter of layout: it would propagate it to
    the activations before, or to the matmul, and then transpose the rounded array in a pass of its own.
    """
    x = jnp.transpose(x, order)
    return jax.lax.optimization_barrier(_row_major(x)) if device().family == "gpu" else x


def scaled(x: jax.Array, *scales: jax.Array) -> jax.Array:
    """Returns x times scales, in its dtype."""
    return functools.reduce(jnp.multiply, scales, x.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def dot(x: jax.Array, w: jax.Array, in_dims: tuple[int, ...]) -> jax.Array:
    """Product of x [tokens..., contracted...] and a weight: [tokens..., outputs...] in the dtype of x.

    Args:
      w: in the dtype of x.
      in_dims: the dims of w that are contracted, increasing; the others are outputs.
    """
    return _forward(x, w, in_dims)[0]


class Residuals(NamedTuple):
    """Arrays kept for the backward pass, in the order in which it contracts them.

    x: [contracted..., tokens...]. w: [contracted..., outputs...], and as many scales. x_scale: [tokens..., outputs...].
    """

    x: jax.Array
    x_scale: jax.Array
    w: Rounded


def _forward(x, w, in_dims):
    assert x.dtype == w.dtype and list(in_dims) == sorted(set(in_dims)), (x.dtype, w.dtype, in_dims)
    warn_if_emulated("model.matmul_precision")
    outputs = tuple(d for d in range(w.ndim) if d not in in_dims)
    w8 = rounded(w, range(w.ndim))
    values, kept = residuals(x, weight_residuals(w8, in_dims), len(in_dims))
    y = _product(values, ordered(w8.values, (*outputs, *in_dims)), len(in_dims), x.dtype, FORWARD_PRECISION)
    return scaled(y, kept.x_scale, w8.scale.reshape(())), kept


def warn_if_emulated(key: str) -> None:
    """States on stderr, once, that the device has no 8-bit matmuls, where a config key is "fp8"."""
    if not device().multiplies_fp8:
        warn_once(f"{key}=fp8: slow here; this device multiplies fp8 operands in a larger dtype")


def weight_residuals(w8: Rounded, in_dims: Sequence[int]) -> Rounded:
    """Returns a weight, rounded with one scale, as `Residuals` hold it: [contracted..., outputs...] and a scalar."""
    outputs = (d for d in range(w8.values.ndim) if d not in in_dims)
    return Rounded(ordered(w8.values, (*in_dims, *outputs)), w8.scale.reshape(()))


def residuals(x: jax.Array, w: Rounded, num_summed: int) -> tuple[jax.Array, Residuals]:
    """Returns the values of x [tokens..., contracted...] rounded per token, and the arrays of the backward pass.

    Args:
      w: `weight_residuals`.
      num_summed: number of contracted dims.
    """
    tokens, summed = _split(x.ndim, num_summed)
    x8 = rounded(x, summed)
    values, turned = both_orders(x, x8, len(tokens))
    return values, Residuals(turned.values, _per_token(x8.scale, len(tokens), w.values.ndim - num_summed), w)


def gradients(
    kept: Residuals,
    g: jax.Array,
    num_summed: int,
    dtype: DTypeLike = GRADIENT_DTYPE,
    dw_dtype: DTypeLike | None = None,
    largest: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Returns dx [tokens..., contracted...] in the dtype of g, and dw [contracted..., outputs...].

    Args:
      kept: of `residuals`.
      g: gradient of the product, [tokens..., outputs...].
      num_summed: number of contracted dims of the product.
      dtype: 8-bit dtype of g.
      dw_dtype: dtype of dw; None: that of g.
      largest: as in `rounded`, of g, [tokens..., 1...].
    """
    x, x_scale, w8 = kept
    outputs = w8.values.ndim - num_summed
    tokens, own = _split(g.ndim, outputs)
    g8 = rounded(g, own, dtype, largest)
    values, shifted = both_orders(g, g8, len(tokens), x_scale)
    dx = _product(values, w8.values, outputs, g.dtype)
    dx = scaled(dx, _per_token(g8.scale, len(tokens), num_summed), w8.scale)
    dw = _product(x, shifted.values, len(tokens), dw_dtype or g.dtype)
    return dx, scaled(dw, shifted.scale)


def _backward(in_dims, kept, g):
    dx, dw = gradients(kept, g, len(in_dims))
    # From [contracted..., outputs...] to the order of the weight's dims.
    order = (*in_dims, *(d for d in range(dw.ndim) if d not in in_dims))
    return dx, jnp.transpose(dw, sorted(range(dw.ndim), key=order.__getitem__))


dot.defvjp(_forward, _backward)


def _split(ndim: int, num_last: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the first and the last dims of an array."""
    return tuple(range(ndim - num_last)), tuple(range(ndim - num_last, ndim))


def both_orders(
    x: jax.Array, x8: Rounded, num_tokens: int, factor: jax.Array | None = None
) -> tuple[jax.Array, Rounded]:
    """Returns the values of x rounded per token, and x rounded with the dims of its tokens last.

    Args:
      x: [tokens..., others...]. x8: `rounded(x, others)`.
      factor: as in `with_one_scale`, which the second result is then scaled by.
    """
    tokens, others = _split(x.ndim, x.ndim - num_tokens)
    shape = math.prod(x.shape[:num_tokens]), math.prod(x.shape[num_tokens:])
    if not is_on_one_device() or rounding.unsupported_reason(*shape):
        turned = x8 if factor is None else with_one_scale(x8, factor)
        return ordered(x8.values, (*tokens, *others)), turned._replace(
            values=ordered(turned.values, (*others, *tokens))
        )
    common, shift = (x8.scale, None) if factor is None else common_scale(x8.scale * factor)
    shift_N = None if shift is None else shift.reshape(-1)
    dtype, inverse_N = x8.values.dtype, 1 / x8.scale.reshape(-1)
    values_NK, turned_KN = rounding.rounded_in_both_orders(x.reshape(shape), inverse_N, shift_N, dtype)
    last = turned_KN.reshape(*x.shape[num_tokens:], *x.shape[:num_tokens])
    return values_NK.reshape(x.shape), Rounded(last, common)


def _row_major(x: jax.Array) -> jax.Array:
    """Returns x, on GPUs with its last dim contiguous in memory."""
    return with_layout_constraint(x, Layout(tuple(range(x.ndim)))) if device().family == "gpu" else x


def _product(
    a: jax.Array, b: jax.Array, num_summed: int, dtype: DTypeLike, precision: jax.lax.Precision = GRADIENT_PRECISION
) -> jax.Array:
    """Product of two arrays over their last dims."""
    last = tuple(range(a.ndim - num_summed, a.ndim)), tuple(range(b.ndim - num_summed, b.ndim))
    y = jax.lax.dot_general(a, b, (last, ((), ())), precision, preferred_element_type=jnp.dtype(dtype))
    return _row_major(y)


def _per_token(scale: jax.Array, num_tokens: int, num_others: int) -> jax.Array:
    """Returns the scales of tokens followed by `num_others` dims of size 1."""
    return scale.reshape(*scale.shape[:num_tokens], *(1 for _ in range(num_others)))
