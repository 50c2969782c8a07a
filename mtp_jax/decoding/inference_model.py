"""Model unstacked for inference: one module per layer with weights in the compute dtype, run with KV caches.

A scan over stacked weights would copy each layer's weights out of the stack, and cast them, for every token.

Shape letters: B rows, T new tokens, D model, V vocabulary, S slots, N extra depths.
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax.config import Architecture
from mtp_jax.kernels.device import device
from mtp_jax.layers.attention import attention_of
from mtp_jax.layers.block import Block
from mtp_jax.layers.cache import Slots
from mtp_jax.layers.linear import outputs_first
from mtp_jax.layers.norm import RMSNorm
from mtp_jax.layers.spec import layer_specs
from mtp_jax.model import Tree, abstract_model
from mtp_jax.mtp import Caches, DecoderInputs, Kind, MainModel, kind_of
from mtp_jax.sharding import constrain, constrain_weight
from mtp_jax.typing import Cache, PyTree


class Parts(NamedTuple):
    """Weights and modules of the model.

    blocks: blocks of the main model, in order.
    mtp: drafting modules, as returned by `Kind.unstack`.
    draft_vocabulary: int32[V'], increasing ids of the tokens that may be drafted; None: all.
    draft_head_VD: the rows of head_VD of the draft vocabulary; None: all.
    """

    embed_VD: jax.Array
    head_VD: jax.Array
    final_norm: RMSNorm
    blocks: list[Block]
    mtp: PyTree
    draft_vocabulary: jax.Array | None = None
    draft_head_VD: jax.Array | None = None


class _Structure:
    """Pytree structure and MTP kind, compared by identity first."""

    def __init__(self, tree: jax.tree_util.PyTreeDef, kind: Kind):
        self.tree, self.kind, self.hash = tree, kind, hash((tree, kind))

    def __hash__(self) -> int:
        return self.hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Structure) and self.tree == other.tree and self.kind == other.kind)


@jax.tree_util.register_pytree_node_class
class Network:
    """`Parts` as a pytree of plain arrays: flattening nnx modules would take 0.25 ms per call of a program."""

    def __init__(self, parts: Parts, kind: Kind):
        leaves, tree = jax.tree.flatten(parts)
        self._leaves, self._structure = leaves, _Structure(tree, kind)

    def tree_flatten(self) -> tuple[list[jax.Array], _Structure]:
        return self._leaves, self._structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, leaves: Iterable[jax.Array]) -> "Network":
        network = object.__new__(cls)
        network._leaves, network._structure = list(leaves), structure
        return network

    @functools.cached_property
    def parts(self) -> Parts:
        return jax.tree.unflatten(self._structure.tree, self._leaves)

    @property
    def kind(self) -> Kind:
        return self._structure.kind

    def for_drafts(self, num_speculative_tokens: int) -> "Network":
        """Returns the network with those MTP modules alone that draft this many tokens."""
        mtp = self.kind.parts_for(self.mtp, num_speculative_tokens)
        return self if mtp is self.mtp else Network(self.parts._replace(mtp=mtp), self.kind)

    @property
    def blocks(self) -> list[Block]:
        return self.parts.blocks

    @property
    def mtp(self) -> PyTree:
        return self.parts.mtp

    @property
    def vocab_size(self) -> int:
        return self.parts.embed_VD.shape[0]

    @property
    def final_norm(self) -> RMSNorm:
        return self.parts.final_norm

    def embed(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the embeddings [B, T, D]."""
        return constrain(jnp.take(self.parts.embed_VD, tokens_BT, axis=0), "batch", None, None)

    def logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the logits of normed hidden states, float32[B, T, V]."""
        return jnp.einsum("btd,vd->btv", hidden_BTD, self.parts.head_VD, preferred_element_type=jnp.float32)

    @property
    def draft_vocabulary(self) -> jax.Array | None:
        return self.parts.draft_vocabulary

    def draft_logits(self, hidden_BTD: jax.Array) -> jax.Array:
        """Returns the logits of normed hidden states for the draft vocabulary, float32[B, T, V']."""
        if self.parts.draft_head_VD is None:
            return self.logits(hidden_BTD)
        return jnp.einsum("btd,vd->btv", hidden_BTD, self.parts.draft_head_VD, preferred_element_type=jnp.float32)


@functools.partial(jax.jit, static_argnums=0)
def unstack(
    architecture: Architecture, params: Tree, biases: Tree, draft_vocabulary: jax.Array | None = None
) -> Network:
    """Returns the network of a model: a copy of its weights, in the compute dtype except norms, biases and routers.

    On devices that prefer it, weights read by `layers.linear` alone have their contracted dims last, and those that
    multiply a norm include its scale.

    Args:
      draft_vocabulary: int32[V'], increasing ids of the tokens that may be drafted; None: all.
    """
    model = abstract_model(architecture).merge(params, biases)
    dtype = jnp.dtype(architecture.model.compute_dtype)

    def one(variable: nnx.Variable) -> nnx.Variable:
        info = variable.get_metadata().get("info")
        if info is None:
            return variable
        is_cast = info.is_matrix and "router" not in info.axes  # the router computes in float32
        value = variable[...].astype(dtype if is_cast else variable.dtype)
        variable = variable.replace(value)
        if info.is_linear and device().prefers_outputs_first:
            variable = outputs_first(variable)
        return variable.replace(constrain_weight(variable[...], variable.get_metadata()["info"].axes))

    def ready(module: Any) -> Any:
        return jax.tree.map(one, module, is_leaf=lambda x: isinstance(x, nnx.Variable))

    decoder = model.trunk
    head_VD = constrain(decoder.output_head().astype(dtype).T, "vocab", "embed")
    parts = Parts(
        embed_VD=constrain(decoder.embed[...].astype(dtype), "vocab", "embed"),
        head_VD=head_VD,
        final_norm=decoder.final_norm,
        blocks=[ready(block.folded()).joined() for block in decoder.layers()],
        mtp=model.kind.unstack(model.mtp, ready),
        draft_vocabulary=draft_vocabulary,
        draft_head_VD=None if draft_vocabulary is None else jnp.take(head_VD, draft_vocabulary, axis=0),
    )
    return Network(parts, model.kind)


@jax.jit  # traced and lowered once for all equal layers
def _decode(block: Block, h_BTD: jax.Array, slots: Slots, cache: Cache) -> tuple[jax.Array, Cache]:
    return block.decode(h_BTD, slots, cache)


def run_main(
    network: Network, tokens_BT: jax.Array, slots: Slots, caches: list[Cache]
) -> tuple[MainModel, list[Cache]]:
    """Runs new tokens through the main model; returns its outputs and the caches with the entries of the new tokens."""
    inputs = DecoderInputs(network.embed(tokens_BT), slots.positions_BT, None)
    hidden_BTD = branch_BTD = network.kind.decoder_inputs(network.mtp, inputs).h_BTD
    written = []
    for block, cache in zip(network.blocks, caches, strict=True):
        branch_BTD = hidden_BTD
        hidden_BTD, cache = _decode(block, hidden_BTD, slots, cache)
        written.append(cache)
    return MainModel(hidden_BTD, branch_BTD, network.final_norm, network.embed), written


def empty_caches(
    architecture: Architecture, network: Network, num_speculative_tokens: int, num_rows: int, num_slots: int
) -> tuple[list[Cache], Caches]:
    """Returns empty caches of all main blocks, and those for drafting `num_speculative_tokens` tokens."""
    dtype, kind = jnp.dtype(architecture.model.compute_dtype), kind_of(architecture)

    def empty(block: Block) -> Cache:
        return block.attention.empty_cache(num_rows, num_slots, num_speculative_tokens + 1, dtype)

    main = placed([empty(block) for block in network.blocks])
    return main, placed(kind.empty_caches(network.mtp, empty, num_speculative_tokens), kind.stacks_caches)


def placed(caches: Caches, is_stacked: bool = False) -> Caches:
    """Shards caches by rows and, if entries are per head, by heads; latents are shared by all heads."""

    def one(x: jax.Array) -> jax.Array:
        leading = (None,) * is_stacked
        heads = ("kv_heads", None) if x.ndim - is_stacked == 4 else (None,)
        return constrain(x, *leading, "batch", None, *heads)

    return jax.tree.map(one, caches)


def cache_bytes_per_token(architecture: Architecture) -> dict[str, int]:
    """Returns the cache bytes per token of the main model; in layers with a window, of a token inside the window.

    Returns:
      "kept": bytes of this model. "multi_head": bytes of plain multi-head attention with the same number of heads and
      value dim, the comparison of the DeepSeek-V2 report (2405.04434, table 1).
    """
    model = architecture.model
    itemsize, attention = jnp.dtype(model.compute_dtype).itemsize, attention_of(model)
    specs = layer_specs(model, kind_of(architecture).num_main_layers)
    kept = sum(attention.cache_size(model, spec.attention) for spec in specs)
    plain = 2 * model.num_heads * attention.value_dim(model) * len(specs)
    return {"kept": kept * itemsize, "multi_head": plain * itemsize}
