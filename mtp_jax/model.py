"""Trunk and multi-token strategy as one model, and its weights as plain nested dicts.

Outside this file weights are dicts (what optax, orbax and the mapping tables like); `Skeleton.merge` makes the module.

Shape letters: B rows, T positions, D model, K depths (1 + extra), L main mixture-of-experts layers, N extra depths.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.layers.param import ParamInfo, RouterBias
from mtp_jax.layers.router import RouterStats
from mtp_jax.mtp import MainModel, make_strategy
from mtp_jax.trunk import Trunk

Tree = dict[str, Any]


class ModelOutput(NamedTuple):
    """hidden: [K, B, T, D], normed and ready for the shared head; depth 0 is the main model.

    trunk_stats, mtp_stats: router statistics, stacked over layers and over depths; None without experts.
    """

    hidden: jax.Array
    trunk_stats: RouterStats | None
    mtp_stats: RouterStats | None


class MTPModel(nnx.Module):
    """The waist of the hourglass: everything below builds it, everything above calls it."""

    def __init__(self, config: Config, rngs: nnx.Rngs):
        self.config = config
        self.trunk = Trunk(config, rngs)
        self.mtp = make_strategy(config, rngs)

    def __call__(self, inputs_KBT: jax.Array, segments_KBT: jax.Array | None, positions_BT: jax.Array) -> ModelOutput:
        """Hidden states of every depth.

        Args:
          inputs_KBT: int; depth k reads x[i + k] (`targets.build(...).inputs`).
          segments_KBT: int; 0 at depth k marks a position that does not count there: nobody attends to it, no router
            counts it. Elsewhere the segment id of position i. None: every row is one document and all of it counts.
          positions_BT: int, for the rotary embedding; the same at every depth.
        """
        trunk = self.trunk
        segments_BT, segments_NBT = (None, None) if segments_KBT is None else (segments_KBT[0], segments_KBT[1:])
        out = trunk(inputs_KBT[0], positions_BT, segments_BT)
        seen = MainModel(out.hidden, out.branch, trunk.final_norm, trunk.look_up)
        if self.config.mtp.detach_trunk:
            seen = self._detached(seen)
        with jax.named_scope("mtp"):
            extra = self.mtp(seen, inputs_KBT[1:], segments_NBT, positions_BT)
        hidden_KBTD = jnp.concatenate([trunk.final_norm(out.hidden)[None], extra.hidden])
        return ModelOutput(hidden_KBTD, out.stats, extra.stats)

    def main(self, tokens_BT: jax.Array, segments_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        """Hidden states [B, T, D] of the next-token model alone, ready for the head."""
        return self.trunk.final_norm(self.trunk(tokens_BT, positions_BT, segments_BT).hidden)

    def head(self) -> jax.Array:
        """The shared output head [D, V]."""
        return self.trunk.head()

    @staticmethod
    def _detached(main: MainModel) -> MainModel:
        """The same values with no way back to the main model's weights."""
        parts: Any = nnx.split(main.final_norm)
        norm = nnx.merge(parts[0], jax.lax.stop_gradient(parts[1]))
        stop = jax.lax.stop_gradient
        return MainModel(stop(main.hidden), stop(main.branch), norm, lambda tokens: stop(main.look_up(tokens)))


class Skeleton(NamedTuple):
    """A model without its weights.

    params, biases: nested dicts of ShapeDtypeStruct: trained weights, and router biases, which a rule of their own
      moves. infos: the `ParamInfo` of every trained weight, in a dict like params.
    """

    graph: Any
    states: tuple[Any, Any]
    params: Tree
    biases: Tree
    infos: Tree

    def merge(self, params: Tree, biases: Tree) -> MTPModel:
        """The module over these weights; cheap, for use inside jit."""
        filled = []
        for state, values in zip(self.states, (params, biases), strict=True):
            copy = jax.tree.map(lambda leaf: leaf, state)
            nnx.replace_by_pure_dict(copy, values)
            filled.append(copy)
        return nnx.merge(self.graph, *filled)

    def shardings(self, mesh: jax.sharding.Mesh) -> tuple[Tree, Tree]:
        """Where params and biases live; leading dims of stacked weights are not cut."""

        def place(info: ParamInfo, leaf: jax.ShapeDtypeStruct):
            return sharding.named(mesh, (None,) * (leaf.ndim - len(info.axes)) + info.axes)

        params = jax.tree.map(place, self.infos, self.params, is_leaf=lambda x: isinstance(x, ParamInfo))
        return params, jax.tree.map(lambda _: sharding.named(mesh, ()), self.biases)


def skeleton(config: Config) -> Skeleton:
    """Shapes, dtypes and declarations of a config's model; allocates nothing.

    `config.model.vocab_size` must be set (`resolve_vocab_size`).
    """
    return _skeleton(Config(model=config.model, mtp=config.mtp))  # whatever the mesh or the data


@functools.lru_cache(maxsize=32)
def _skeleton(config: Config) -> Skeleton:
    model = nnx.eval_shape(lambda: MTPModel(config, nnx.Rngs(params=jax.random.key(0))))
    parts: Any = nnx.split(model, nnx.Param, RouterBias)
    graph, params, biases = parts
    infos = jax.tree.map(lambda v: v.get_metadata()["info"], params, is_leaf=lambda x: isinstance(x, nnx.Param))
    return Skeleton(
        graph, (params, biases), nnx.to_pure_dict(params), nnx.to_pure_dict(biases), nnx.to_pure_dict(infos)
    )


def init(config: Config, seed: int) -> tuple[Tree, Tree]:
    """Fresh params and biases as nested dicts; a pure function of (config, seed), whatever the mesh. Use inside jit."""
    model = MTPModel(config, nnx.Rngs(params=jax.random.key(seed)))
    parts: Any = nnx.split(model, nnx.Param, RouterBias)
    _, params, biases = parts
    return nnx.to_pure_dict(params), nnx.to_pure_dict(biases)


class ParameterCounts(NamedTuple):
    """Weights of the main model, and of the MTP modules or heads on top of it. Router biases are not counted.

    active: what a token is multiplied with: without the routed experts it did not choose, and without the embedding
      table it only reads a row of (unless that is the output head too). DeepSeek counts so: V3 is 671 B and 37 B,
      V2-Lite 15.7 B and 2.4 B.
    """

    total: int
    active: int
    mtp_total: int
    mtp_active: int


def count_parameters(config: Config) -> ParameterCounts:
    """Counts from shapes alone; nothing is allocated."""
    total, active = {"trunk": 0, "mtp": 0}, {"trunk": 0, "mtp": 0}
    for part, info, leaf in weights(config):
        total[part] += leaf.size
        is_looked_up = info.axes == ("vocab", "embed") and not config.model.tie_embeddings
        active[part] += 0 if is_looked_up else active_size(config, info, leaf)
    return ParameterCounts(total["trunk"], active["trunk"], total["mtp"], active["mtp"])


def weights(config: Config) -> list[tuple[str, ParamInfo, jax.ShapeDtypeStruct]]:
    """("trunk" or "mtp", declaration, shape) of every trained weight."""
    built = skeleton(config)
    infos = jax.tree_util.tree_leaves_with_path(built.infos, is_leaf=lambda x: isinstance(x, ParamInfo))
    return [(p[0].key, info, leaf) for (p, info), leaf in zip(infos, jax.tree.leaves(built.params), strict=True)]


def active_size(config: Config, info: ParamInfo, leaf: jax.ShapeDtypeStruct) -> int:
    """Elements of a weight that a token uses: of routed experts its num_experts_per_token, of others all."""
    model = config.model
    return leaf.size * model.num_experts_per_token // model.num_experts if "experts" in info.axes else leaf.size
