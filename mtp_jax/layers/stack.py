"""Stacking of modules along a leading dim, and scans over the stack."""

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
    """Returns `num` modules, initialized from different keys, stacked along a leading dim ("layers") of all weights."""
    module = nnx.vmap(lambda key: make(nnx.Rngs(params=key)))(jax.random.split(rngs.params(), num))
    return _each_info(ParamInfo.stacked, module)


def unstacked(module: Any) -> list[Any]:
    """Returns the modules of a stack; the inverse of `stacked`."""
    num = jax.tree.leaves(module)[0].shape[0]
    return [_each_info(ParamInfo.unstacked, jax.tree.map(lambda w, i=i: w[i], module)) for i in range(num)]


def _each_info(change: Callable[[ParamInfo], ParamInfo], tree: Any) -> Any:
    """Returns `tree` with `change` applied to the declaration of every weight."""

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
    """Scans `carry, y = body(layer, carry, x)` over the layers stacked in `module` and the leading dim of `xs`.

    Activations of the body that config.remat does not save are recomputed in the backward pass. The loop is unrolled by
    `unrolled`.

    Args:
      is_shared: the stack holds a single layer, which is applied to every x.

    Returns:
      the final carry and the stacked y.
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
    """`scan_over` for several stacks: runs the first layer of every stack in turn, then the second of every stack, ...

    Returns:
      the final carry, and the stacked y of each of `modules`.
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
    # `read_here` keeps the cast of the weights inside the loop; a fully unrolled scan has none.
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


MOST_UNROLLED = 16  # layers, with scan_unroll=0: limits compilation time


def unrolled(config: ModelConfig, length: int) -> int:
    """Returns the unroll factor of a scan over `length` layers.

    config.scan_unroll if set. Otherwise all layers if a loop would copy the saved activations and nothing is
    recomputed, else 1.
    """
    if config.scan_unroll:
        return min(config.scan_unroll, length)
    is_free = device().loops_copy_activations and config.remat == "none" and length <= MOST_UNROLLED
    return length if is_free else 1


def _is_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive.name == cudnn.FORWARD  # saves output and normalizers: the backward pass reads both


_saved = jax.checkpoint_policies
_any = _saved.save_from_both_policies
# Kernels are matmuls too, but jax's policies do not recognize them as such.
_kernels = _any(_is_attention, _saved.save_only_these_names(KERNEL))
_attention = _any(_kernels, _saved.save_only_these_names(ATTENTION))
POLICIES = {
    "dots": _any(_saved.dots_with_no_batch_dims_saveable, _attention),
    "kernels": _any(_attention, _saved.save_only_these_names(RAGGED_DOT)),
    "full": None,
}
