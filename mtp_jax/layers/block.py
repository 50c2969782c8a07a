"""The transformer block of trunk and MTP modules alike: h + attention(norm(h)), then h + ffn(norm(h))."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.attention import cudnn
from mtp_jax.kernels.attention.xla import ATTENTION
from mtp_jax.kernels.device import device
from mtp_jax.kernels.grouped_matmul.xla import RAGGED_DOT
from mtp_jax.layers.cache import NOWHERE, Slots
from mtp_jax.layers.ffn import SwiGLU
from mtp_jax.layers.gqa import GroupedQueryAttention
from mtp_jax.layers.mla import MultiHeadLatentAttention
from mtp_jax.layers.moe import MixtureOfExperts
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.router import RouterStats
from mtp_jax.sharding import constrain, num_shards


class Block(nnx.Module):
    """Pre-norm block with a dense or a mixture-of-experts feed-forward."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, is_moe: bool):
        attention = MultiHeadLatentAttention if config.attention == "mla" else GroupedQueryAttention
        self.attention_norm = RMSNorm(config.embed_dim, config)
        self.attention = attention(config, rngs)
        self.ffn_norm = RMSNorm(config.embed_dim, config)
        self.ffn = MixtureOfExperts(config, rngs) if is_moe else SwiGLU(config.ffn_dim, config, rngs)

    def __call__(
        self, h_BTD: jax.Array, positions_BT: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, RouterStats | None]:
        """[B, T, D] -> [B, T, D] and the router's statistics (None for a dense block).

        Args:
          h_BTD: the residual stream.
          positions_BT: int, for the rotary embedding.
          segments_BT: int; 0 is padding, which is seen by no document and counted nowhere. None: every row is one
            document.
        """
        h_BTD = constrain(h_BTD, "batch", "length", None)
        with jax.named_scope("attention"):
            h_BTD = h_BTD + self.attention(self.attention_norm(h_BTD), positions_BT, segments_BT)
        valid_BT = jnp.ones(h_BTD.shape[:2], bool) if segments_BT is None else segments_BT != 0
        return self._feed_forward(h_BTD, valid_BT)

    def decode(
        self, h_BTD: jax.Array, slots: Slots, cache: Any, num_wanted: int | None = None
    ) -> tuple[jax.Array, Any]:
        """New tokens [B, T, D] -> [B, T, D], reading the tokens before them from the attention's cache.

        Args:
          num_wanted: the block's output is wanted for the last so many tokens only: the others are worth no more than
            their entries. None: for all.

        Returns:
          the residual stream of the tokens wanted, and the cache with the entries of all.
        """
        num_rows, length = h_BTD.shape[:2]
        first = 0 if num_wanted is None else length - num_wanted
        least = 2 if num_rows == 1 and device().single_row_products_are_slow else 1
        padded = max(length, least)
        padded += -padded % num_shards("length")  # equal shards
        if padded > length:
            h_BTD, slots = jnp.pad(h_BTD, ((0, 0), (0, padded - length), (0, 0))), slots.padded(padded - length)
        start = 0 if num_shards("length") > 1 else min(first, padded - least)
        out_BTD, cache = self.attention.decode(self.attention_norm(h_BTD), slots, cache, start)
        h_BTD, _ = self._feed_forward(h_BTD[:, start:] + out_BTD, slots.slots_BT[:, start:] < NOWHERE)
        return h_BTD[:, first - start : length - start], cache

    def _feed_forward(self, h_BTD: jax.Array, valid_BT: jax.Array) -> tuple[jax.Array, RouterStats | None]:
        x_BTD = self.ffn_norm(h_BTD)
        if isinstance(self.ffn, MixtureOfExperts):
            out_BTD, stats = self.ffn(x_BTD, valid_BT)
        else:
            with jax.named_scope("ffn"):
                out_BTD, stats = self.ffn(x_BTD), None
        return constrain(h_BTD + out_BTD, "batch", "length", None), stats


def stacked(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> Any:
    """`num` modules as one, every weight with a leading dim of size `num`, each from its own key."""
    return nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), num))


def unstacked(module: Any) -> list[Any]:
    """The modules that were `stacked`."""
    num = jax.tree.leaves(module)[0].shape[0]
    return [jax.tree.map(lambda w, i=i: w[i], module) for i in range(num)]


def scan_over(
    module: nnx.Module, body: Callable[..., Any], carry: Any, xs: Any, config: ModelConfig, is_shared: bool = False
) -> tuple[Any, Any]:
    """`carry, y = body(one module, carry, x)` over the stack of `module` and the leading dim of `xs`.

    `unrolled` says how many layers are compiled, one in most cases. What config.remat does not keep of the body's
    activations is recomputed in the backward pass. With is_shared the stack is of one module, which every x goes
    through.

    Returns:
      the last carry and the stacked y.
    """
    graph, state = nnx.split(module)
    if is_shared:
        state, carry = gradients_together((state, carry))
        shared = jax.tree.map(lambda w: w[0], state)
        scanned = None
    else:
        taps, carry = gradients_together((_taps(state, jax.tree.leaves(carry)[0].dtype), carry))
        scanned = jax.lax.stop_gradient(state), taps

    length = jax.tree.leaves((scanned, xs))[0].shape[0]
    unroll = unrolled(config, length)
    # Without a loop there is nothing to keep the cast of the weights out of.
    is_loop = unroll < length or not device().loops_copy_activations

    def step(carry, per_layer):
        layer, x = per_layer
        weights = shared if is_shared else _cast(read_here(layer[0]) if is_loop else layer[0], layer[1])
        return body(nnx.merge(graph, weights), carry, x)

    if config.remat != "none":
        step = jax.checkpoint(step, policy=POLICIES[config.remat])
    return jax.lax.scan(step, carry, (scanned, xs), unroll=unroll)


MOST_UNROLLED = 16  # layers, without being asked: compilation takes its time


def unrolled(config: ModelConfig, length: int) -> int:
    """How many of a scan's layers are compiled side by side: config.scan_unroll, or where that is 0 all of them where a
    loop would copy the activations kept, and nothing is recomputed."""
    if config.scan_unroll:
        return min(config.scan_unroll, length)
    is_free = device().loops_copy_activations and config.remat == "none" and length <= MOST_UNROLLED
    return length if is_free else 1


def _is_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive.name == cudnn.FORWARD  # output and normalisers alike: the backward pass reads both


_saved = jax.checkpoint_policies
_any = _saved.save_from_both_policies
# Kernels are matmuls too, though jax's own policies do not know them as such.
_kernels = _any(_is_attention, _saved.save_only_these_names(KERNEL))
POLICIES = {
    "dots": _any(_saved.dots_with_no_batch_dims_saveable, _kernels),
    "kernels": _any(_kernels, _saved.save_only_these_names(RAGGED_DOT, ATTENTION)),
    "full": None,
}


def _taps(state: nnx.State, dtype: Any) -> nnx.State:
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


def _cast(weights: nnx.State, taps: nnx.State) -> nnx.State:
    """One layer's weights in their taps' dtypes, placed as they are stored: it is the cast ones that are collected."""

    def one(variable: nnx.Variable, tap: nnx.Variable) -> nnx.Variable:
        weight = _tapped(variable[...], tap[...])
        info = variable.get_metadata().get("info")
        return variable.replace(weight if info is None else constrain(weight, *info.axes))

    return jax.tree.map(one, weights, taps, is_leaf=lambda x: isinstance(x, nnx.Variable))


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _tap(weight: jax.Array, dtype: Any) -> jax.Array:
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
def gradients_together(tree: Any) -> Any:
    """`tree` itself; in the backward pass none of its gradients is handed on before all of them are there.

    A scan over one layer is no loop once compiled, and the compiler may put off that layer's weight gradients, and keep
    all they are made of, until the backward pass below it is done: one MTP module then adds its own activations to the
    trunk's peak. Tied to the gradient that goes on down, they are made first.
    """
    return tree


gradients_together.defvjp(lambda tree: (tree, None), lambda _, grads: (jax.lax.optimization_barrier(grads),))


def read_here(tree: Any) -> Any:
    """`tree` itself, read here and as it is; not differentiable.

    Without it the compiler sees that the loop over layers only uses a weight in the compute dtype, casts the whole
    stack before the loop and keeps the copy from the start of the forward to the end of the backward pass. What is read
    as bits it cannot narrow.
    """

    def bits(w: jax.Array) -> jax.Array:
        return jax.lax.bitcast_convert_type(w, jnp.uint32) if w.dtype == jnp.float32 else w

    read = jax.lax.optimization_barrier(jax.tree.map(bits, tree))
    return jax.tree.map(lambda b, w: jax.lax.bitcast_convert_type(b, w.dtype), read, tree)
