"""Modules stacked into one, and run one after another by a scan."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from mtp_jax.config import ModelConfig
from mtp_jax.kernels import KERNEL
from mtp_jax.kernels.attention import cudnn
from mtp_jax.kernels.attention.xla import ATTENTION
from mtp_jax.kernels.device import device
from mtp_jax.kernels.grouped_matmul.xla import RAGGED_DOT
from mtp_jax.layers import compiler
from mtp_jax.layers.param import ParamInfo
from mtp_jax.typing import PyTree


def stacked(make: Callable[[nnx.Rngs], nnx.Module], num: int, rngs: nnx.Rngs) -> Any:
    """`num` modules as one, every weight with a leading dim of size `num` ("layers"), each from its own key."""
    module = nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), num))
    return _each_info(ParamInfo.stacked, module)


def unstacked(module: Any) -> list[Any]:
    """The modules that were `stacked`."""
    num = jax.tree.leaves(module)[0].shape[0]
    return [_each_info(ParamInfo.unstacked, jax.tree.map(lambda w, i=i: w[i], module)) for i in range(num)]


def _each_info(change: Callable[[ParamInfo], ParamInfo], tree: Any) -> Any:
    """`tree` with the declaration of every weight changed."""

    def one(variable: Any) -> Any:
        info = variable.get_metadata().get("info") if isinstance(variable, nnx.Variable) else None
        return variable if info is None else variable.replace(variable.get_value(), info=change(info))

    return jax.tree.map(one, tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def scan_over(
    module: nnx.Module,
    body: Callable[..., Any],
    carry: PyTree,
    xs: PyTree,
    config: ModelConfig,
    is_shared: bool = False,
) -> tuple[PyTree, PyTree]:
    """`carry, y = body(one module, carry, x)` over the stack of `module` and the leading dim of `xs`.

    `unrolled` says how many layers are compiled, one in most cases. What config.remat does not keep of the body's
    activations is recomputed in the backward pass. With is_shared the stack is of one module, which every x goes
    through.

    Returns:
      the last carry and the stacked y.
    """
    carry, (y,) = scan_over_periods([module], body, carry, xs, config, is_shared)
    return carry, y


def scan_over_periods(
    modules: Sequence[nnx.Module],
    body: Callable[..., Any],
    carry: PyTree,
    xs: PyTree,
    config: ModelConfig,
    is_shared: bool = False,
) -> tuple[PyTree, list[PyTree]]:
    """`scan_over` with several stacks: the first module of every stack in turn, then the second of every stack ...

    Returns:
      the last carry, and for each of `modules` the stacked y.
    """
    graphs, state = zip(*map(nnx.split, modules), strict=True)
    if is_shared:
        state, carry = compiler.gradients_together((state, carry))
        shared = [unstacked(one)[0] for one in state]
        scanned = None
    else:
        dtype = jax.tree.leaves(carry)[0].dtype
        taps, carry = compiler.gradients_together(([compiler.taps(one, dtype) for one in state], carry))
        scanned = jax.lax.stop_gradient(state), taps

    length = jax.tree.leaves((scanned, xs))[0].shape[0]
    unroll = unrolled(config, length)
    # Without a loop there is nothing to keep the cast of the weights out of.
    is_loop = unroll < length or not device().loops_copy_activations

    def run(graph, layer, carry, x):
        weights = (
            layer if is_shared else compiler.cast_layer(compiler.read_here(layer[0]) if is_loop else layer[0], layer[1])
        )
        return body(nnx.merge(graph, weights), carry, x)

    def step(carry, per_layer):
        layers, x = per_layer
        ys = []
        for graph, layer in zip(graphs, shared if is_shared else zip(*layers, strict=True), strict=True):
            one = functools.partial(run, graph)
            recomputed = jax.checkpoint(one, policy=POLICIES[config.remat]) if config.remat != "none" else one
            carry, y = recomputed(layer, carry, x)
            ys.append(y)
        return carry, ys

    return jax.lax.scan(step, carry, (scanned, xs), unroll=unroll)


MOST_UNROLLED = 16  # layers, without being asked: compilation takes its time


def unrolled(config: ModelConfig, length: int) -> int:
    """Number of a scan's layers that are compiled side by side: config.scan_unroll, or where that is 0 all of them
    where a loop would copy the activations kept, and nothing is recomputed."""
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
