"""A model taken apart for decoding: one module a layer, its weights in the compute dtype, run over caches.

A loop over stacked weights would copy each layer's out of the stack, and cast it, for every token.

Shape letters: B rows, T new tokens, D model, V vocabulary, S slots, N extra depths.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import Config
from mtp_jax.layers.block import Block, unstacked
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.model import Tree, skeleton
from mtp_jax.sharding import constrain


class Parts(NamedTuple):
    """blocks: of the main model, first to last.
    depths: what drafts: a list of sequential modules (one where depths share it), the parallel heads' blocks as one
      with stacked weights, since they run side by side, or an empty list.
    """

    embed_VD: jax.Array
    head_DV: jax.Array
    final_norm: RMSNorm
    blocks: list[Block]
    depths: Any


class _Structure:
    """A tree's structure that is compared by identity first."""

    def __init__(self, tree: Any):
        self.tree, self.hash = tree, hash(tree)

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree)


@jax.tree_util.register_pytree_node_class
class Network:
    """`Parts` as a pytree of plain arrays: modules are walked through in Python, 0.25 ms at each call of a program."""

    def __init__(self, parts: Parts):
        leaves, tree = jax.tree.flatten(parts)
        self._leaves, self._structure = leaves, _Structure(tree)

    def tree_flatten(self) -> tuple[list[Any], _Structure]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: Any) -> "Network":
        network = object.__new__(cls)
        network._leaves, network._structure = list(leaves), structure
        return network

    @functools.cached_property
    def parts(self) -> Parts:
        return jax.tree.unflatten(self._structure.tree, self._leaves)

    @property
    def blocks(self) -> list[Block]:
        return self.parts.blocks

    @property
    def depths(self) -> Any:
        return self.parts.depths

    @property
    def vocab_size(self) -> int:
        return self.parts.embed_VD.shape[0]

    @property
    def final_norm(self) -> RMSNorm:
        return self.parts.final_norm

    def look_up(self, tokens_BT: jax.Array) -> jax.Array:
        """Embeddings [B, T, D]."""
        return constrain(jnp.take(self.parts.embed_VD, tokens_BT, axis=0), "batch", None, None)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """float32[B, T, V] of normed hidden states."""
        return jnp.einsum("btd,dv->btv", hidden_BTD, self.parts.head_DV, preferred_element_type=jnp.float32)


class MainOutput(NamedTuple):
    """hidden, branch: [B, T, D] as `trunk.TrunkOutput`. caches: with the new tokens' entries."""

    hidden_BTD: jax.Array
    branch_BTD: jax.Array
    caches: list[Any]


@functools.partial(jax.jit, static_argnums=0)
def take_apart(config: Config, params: Tree, biases: Tree) -> Network:
    """The network of a model's weights: a copy of them, in the compute dtype but for norms, biases and routers."""
    model = skeleton(config).merge(params, biases)
    dtype = jnp.dtype(config.model.compute_dtype)

    def one(variable: nnx.Variable) -> nnx.Variable:
        info = variable.get_metadata().get("info")
        if info is None:
            return variable
        is_cast = info.is_matrix and "router" not in info.axes  # the router computes in float32
        value = variable[...].astype(dtype if is_cast else variable.dtype)
        return variable.replace(constrain(value, *(None,) * (value.ndim - len(info.axes)), *info.axes))

    def ready(module: Any) -> Any:
        return jax.tree.map(one, module, is_leaf=lambda x: isinstance(x, nnx.Variable))

    trunk = model.trunk
    groups = [getattr(trunk, name) for name in ("dense_blocks", "blocks") if hasattr(trunk, name)]
    depths: Any = []
    if config.mtp.kind == "sequential":
        depths = [ready(module) for module in unstacked(model.mtp.module)]
    elif config.mtp.kind == "parallel":
        depths = ready(model.mtp.block)
    parts = Parts(
        embed_VD=constrain(trunk.embed[...].astype(dtype), "vocab", "embed"),
        head_DV=constrain(trunk.head().astype(dtype), "embed", "vocab"),
        final_norm=trunk.final_norm,
        blocks=[ready(block) for group in groups for block in unstacked(group)],
        depths=depths,
    )
    return Network(parts)


def run_main(network: Network, tokens_BT: jax.Array, slots: Slots, caches: list[Any]) -> MainOutput:
    """New tokens through the main model."""
    h_BTD = branch_BTD = network.look_up(tokens_BT)
    written = []
    for block, cache in zip(network.blocks, caches, strict=True):
        branch_BTD = h_BTD
        h_BTD, cache = block.decode(h_BTD, slots, cache)
        written.append(cache)
    return MainOutput(h_BTD, branch_BTD, written)


def empty_caches(config: Config, network: Network, num_depths: int, num_rows: int, num_slots: int) -> tuple[Any, Any]:
    """Caches of every main block, and of the first `num_depths` extra depths: a list, stacked for parallel heads."""
    dtype = jnp.dtype(config.model.compute_dtype)

    def empty(*stacked: int) -> Any:
        cache = network.blocks[0].attention.empty_cache(num_rows, num_slots, dtype)  # all layers attend alike
        return jax.tree.map(lambda x: jnp.broadcast_to(x, (*stacked, *x.shape)), cache)

    main = placed([empty() for _ in network.blocks])
    if config.mtp.kind == "parallel" and num_depths:
        return main, placed(empty(num_depths), is_stacked=True)
    return main, placed([empty() for _ in range(num_depths)])


def placed(caches: Any, is_stacked: bool = False) -> Any:
    """Caches cut by rows and, where heads have their own entries, by heads; latents are shared by all."""

    def one(x: jax.Array) -> jax.Array:
        leading = (None,) * is_stacked
        heads = ("kv_heads", None) if x.ndim - is_stacked == 4 else (None,)
        return constrain(x, *leading, "batch", None, *heads)

    return jax.tree.map(one, caches)


def cache_bytes_per_token(config: Config) -> dict[str, int]:
    """What decoding keeps of one token in the main model, bytes.

    Returns:
      "kept": of this model. "multi_head": plain multi-head attention with as many heads of the same value size, keys
      and values of every head, which is what the DeepSeek-V2 report compares with (2405.04434, table 1).
    """
    model = config.model
    layers, itemsize = config.num_main_layers, jnp.dtype(model.compute_dtype).itemsize
    if model.attention == "mla":
        kept, size = model.kv_lora_rank + model.qk_rope_head_dim, model.v_head_dim
    else:
        kept, size = 2 * model.num_kv_heads * model.head_dim, model.head_dim
    return {"kept": kept * layers * itemsize, "multi_head": 2 * model.num_heads * size * layers * itemsize}
