"""Identity functions that reduce the memory the compiler uses around a scan over layers."""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from mtp_jax.sharding import constrain_weight
from mtp_jax.typing import PyTree


def taps(state: nnx.State, dtype: DTypeLike) -> nnx.State:
    """Returns zeros shaped like the stacked weights, in the dtypes in which layers use them, to differentiate by.

    The gradient of scanned weights is a stack that is kept until the end of the backward pass, in the dtype of the
    weights: float32, twice the size of the compute dtype that every entry was computed in. So layers read the weights
    as constants, the gradient is taken with respect to the taps, and cast when it is used.
    """

    def one(variable: nnx.Variable) -> nnx.Variable:
        info = variable.get_metadata().get("info")
        is_cast = info is not None and info.is_matrix and "router" not in info.axes  # the router computes in float32
        return variable.replace(_tap(variable[...], jnp.dtype(dtype if is_cast else variable.dtype)))

    return jax.tree.map(one, state, is_leaf=lambda x: isinstance(x, nnx.Variable))


def cast_layer(weights: nnx.State, layer_taps: nnx.State) -> nnx.State:
    """Returns one layer's weights in their taps' dtypes, sharded as stored so that gathering follows the cast."""

    def one(variable: nnx.Variable, tap: nnx.Variable) -> nnx.Variable:
        weight = _tapped(variable[...], tap[...])
        info = variable.get_metadata().get("info")
        if info is None:
            return variable.replace(weight)
        info = info.unstacked()
        return variable.replace(constrain_weight(weight, info.axes), info=info)

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
    """Returns the weight in the dtype of the tap; the gradient goes to the tap."""
    return weight.astype(tap.dtype)


_tapped.defvjp(
    lambda weight, tap: (weight.astype(tap.dtype), None),
    lambda _, grad: (None, grad),
)


@jax.custom_vjp
def gradients_together(tree: PyTree) -> PyTree:
    """Returns `tree`; in the backward pass all of its gradients are computed before any of them is used.

    A scan over one layer compiles to straight-line code, and the compiler may delay that layer's weight gradients, and
    keep the activations they need, until the backward pass of the layers below is done: one MTP module then adds its
    activations to the peak memory of the decoder. A barrier with the gradient passed to the layers below prevents it.
    """
    return tree


gradients_together.defvjp(lambda tree: (tree, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def read_here(tree: PyTree) -> PyTree:
    """Returns `tree`, read at this point in its own dtypes; not differentiable.

    Without it the compiler moves the cast of a layer's weights out of the loop: it casts the whole stack before the
    loop and keeps the copy from the start of the forward to the end of the backward pass. Weights read as bits cannot
    be cast early.
    """

    def bits(w: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(w, jnp.uint32) if w.dtype == jnp.float32 else w

    read = jax.lax.optimization_barrier(jax.tree.map(bits, tree))
    return jax.tree.map(lambda b, w: jax.lax.bitcast_convert_type(b, w.dtype), read, tree)
