"""Identities that make the compiler keep less in memory around a scan over layers; none changes a value."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.sharding import constrain
from mtp_jax.typing import PyTree


def taps(state: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Zeros that stand for the stacked weights where gradients are concerned, in the dtype the layers use each in.

    The gradient of a scanned stack is a stack, kept until the whole backward pass is done. Taken of the weights it has
    their dtype: float32, twice the size of the compute dtype that every entry was computed in. So the layers
    read the weights as constants, and the gradient is taken of a tap, and cast once it is used.
    """

    def one(variable: nnx.Variable) -> nnx.Variable:
        info = variable.get_metadata().get("info")
        is_cast = info is not None and info.is_matrix and "router" not in info.axes  # the router computes in float32
        return variable.replace(_tap(variable[...], jnp.dtype(dtype if is_cast else variable.dtype)))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def cast_layer(weights: nnx.State, layer_taps: nnx.State) -> nnx.State:
    """One layer's weights in their taps' dtypes, placed as they are stored: it is the cast ones that are collected."""

    def one(variable: nnx.Variable, tap: nnx.Variable) -> nnx.Variable:
        weight = _tapped(variable[...], tap[...])
        info = variable.get_metadata().get("info")
        if info is None:
            return variable.replace(weight)
        info = info.unstacked()
        return variable.replace(constrain(weight, *info.axes), info=info)

    return jax.tree.map(one, weights, layer_taps, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tap(weight: jax.Array, dtype: DTypeLike) -> jax.Array:
    return jnp.zeros(weight.shape, dtype)


_tap.defvjp(
    lambda weight, dtype: (_tap(weight, dtype), jnp.zeros((), weight.dtype)),
    lambda _, like, grad: (grad.astype(like.dtype),),
)


@jax.custom_vjp
def _tapped(weight: jax.Array, tap: jax.Array) -> jax.Array:
    """The weight in the tap's dtype; its gradient is the tap's."""
    return weight.astype(tap.dtype)


_tapped.defvjp(
    lambda weight, tap: (weight.astype(tap.dtype), None),
    lambda _, grad: (None, grad),
)


@jax.custom_vjp
def gradients_together(tree: PyTree) -> PyTree:
    """`tree` itself; in the backward pass none of its gradients is used further before all of them are computed.

    A scan over one layer is no loop once compiled, and the compiler may put off that layer's weight gradients, and keep
    all they are made of, until the backward pass below it is done: one MTP module then adds its own activations to the
    trunk's peak. Tied to the gradient that goes on down, they are made first.
    """
    return tree


gradients_together.defvjp(lambda tree: (tree, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def read_here(tree: PyTree) -> PyTree:
    """`tree` itself, read here and as it is; not differentiable.

    Without it the compiler sees that the loop over layers only uses a weight in the compute dtype, casts the whole
    stack before the loop and keeps the copy from the start of the forward to the end of the backward pass. What is read
    as bits it cannot narrow.
    """

    def bits(w: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(w, jnp.uint32) if w.dtype == jnp.float32 else w

    read = jax.lax.optimization_barrier(jax.tree.map(bits, tree))
    return jax.tree.map(lambda b, w: jax.lax.bitcast_convert_type(b, w.dtype), read, tree)
