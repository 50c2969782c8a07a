"""Norms of the gradients of parts of the model: each layer, each MTP block, the embedding, the output head.

The norms are taken in the pass over the gradients that their global norm needs anyway, so they cost nothing.

Shape letters: G groups, L layers of a stack.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.layers.param import ParamInfo

Tree = Any  # nested dicts of the parameters' structure
Path = tuple[str, ...]

NAMES: dict[Path, str] = {
    ("trunk", "embed"): "embedding",
    ("trunk", "unembed"): "output head",
    ("trunk", "final_norm"): "final norm",
}


def group_of(path: Path) -> str:
    """Returns the name of the group of a weight; a stack of layers is one name, its layers are told apart by index."""
    if path[0] == "mtp":
        return "MTP block"
    return NAMES.get(path[:2]) or f"decoder {path[1]}"


def squared_norms(infos: Tree, grads: Tree) -> dict[str, jax.Array]:
    """Returns the sum of squares of each group's gradients, float32[L]; L is 1 for a group that is no stack.

    Args:
      infos: one ParamInfo per weight.
      grads: arrays in the same structure.
    """
    out: dict[str, jax.Array] = {}
    leaves = jax.tree_util.tree_leaves_with_path(infos, is_leaf=lambda x: isinstance(x, ParamInfo))
    for (path, info), grad in zip(leaves, jax.tree.leaves(grads), strict=True):
        squares = jnp.square(grad.astype(jnp.float32))
        is_stack = info.axes[0] == "layers"
        sums = squares.sum(tuple(range(1, squares.ndim))) if is_stack else squares.sum()[None]
        name = group_of(tuple(key.key for key in path))
        # Weights beside a stack in one group (of an MTP kind with both) count in its first entry.
        before = out.get(name, jnp.zeros(1, jnp.float32))
        longest = max(len(before), len(sums))
        out[name] = _padded(before, longest) + _padded(sums, longest)
    return out


def norm(infos: Tree, grads: Tree) -> jax.Array:
    """Returns the global norm of the gradients, float32."""
    return jnp.sqrt(sum((x.sum() for x in squared_norms(infos, grads).values()), jnp.float32(0.0)))


def norms(infos: Tree, grads: Tree) -> jax.Array:
    """Returns the norm of each group's gradients, float32[G], in the order of `names`."""
    return jnp.sqrt(jnp.concatenate(list(squared_norms(infos, grads).values())))


def names(infos: Tree, abstract_params: Tree) -> list[tuple[str, int | None]]:
    """Returns (name, index in its stack; None for a group of one) of each of the G groups."""
    sizes = jax.eval_shape(lambda grads: squared_norms(infos, grads), abstract_params)
    lengths = {name: size.shape[0] for name, size in sizes.items()}
    return [(name, index if num > 1 else None) for name, num in lengths.items() for index in range(num)]


def not_finite(groups: Sequence[tuple[str, int | None]], norms_G: np.ndarray) -> str:
    """Returns the groups whose norm is NaN or infinite, as `decoder blocks[0..3], embedding`; "" if there are none."""
    bad = [group for group, value in zip(groups, norms_G, strict=True) if not np.isfinite(value)]
    if len(bad) == len(groups):
        return "every part of the model"
    indices: dict[str, list[int]] = {}
    for name, index in bad:
        indices.setdefault(name, []).extend([] if index is None else [index])
    return ", ".join(f"{name}{_ranges(found)}" for name, found in indices.items())


def _ranges(indices: list[int]) -> str:
    """Returns `[0..2,5]`; "" for no index."""
    parts: list[list[int]] = []
    for index in indices:
        if parts and index == parts[-1][1] + 1:
            parts[-1][1] = index
        else:
            parts.append([index, index])
    text = ",".join(str(low) if low == high else f"{low}..{high}" for low, high in parts)
    return f"[{text}]" if text else ""


def _padded(x: jax.Array, length: int) -> jax.Array:
    return x if len(x) == length else jnp.pad(x, (0, length - len(x)))
