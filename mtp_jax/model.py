"""Decoder and MTP kind as one model, and its weights as plain nested dicts.

Outside this file weights are dicts, as optax, orbax and the conversion tables expect; `AbstractModel.merge` builds the
module. Functions that depend only on the computation of the weights take an `Architecture`, not a whole `Config`.

Shape letters: B rows, T positions, D model, K depths (1 + extra), L main mixture-of-experts layers, N extra depths.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from mtp_jax import config as configs
from mtp_jax import sharding
from mtp_jax.config import Architecture, Config
from mtp_jax.decoder import DecoderOutput, TransformerDecoder
from mtp_jax.layers.attention import attention_of
from mtp_jax.layers.param import ParamInfo, RouterBias
from mtp_jax.layers.router import RouterStats
from mtp_jax.losses import HiddenTerm, Term
from mtp_jax.mtp import DecoderInputs, MainModel, Scales, kind_of
from mtp_jax.targets import Rows

Tree = dict[str, Any]


def validate(config: Config, num_devices: int, tokenizer_size: int | None = None) -> None:
    """Checks a config by `config.validate`, the attention variant, the mesh and the MTP kind.

    Raises:
      UserError: on the first problem, naming field, value and remedy.
    """
    configs.validate(config, num_devices, tokenizer_size)
    attention = attention_of(config.model)
    attention.check(config.model)
    sharding.check_divides(config.mesh, num_devices, attention.sharded_sizes(config.model))
    kind_of(config).check(config)


class ModelOutput(NamedTuple):
    """Outputs of the model.

    hidden: [K, B, T, D], normed, as the shared head reads it, with the features that the MTP kind adds; depth 0 is the
      main model.
    decoder_stats: router statistics of each stacked module of the decoder with experts, by its name.
    mtp_stats: router statistics of the MTP kind's blocks, stacked over depths; None without experts.
    """

    hidden: jax.Array
    decoder_stats: dict[str, RouterStats]
    mtp_stats: RouterStats | None


class MTPModel(nnx.Module):
    """Decoder and MTP modules: from rows to the hidden states of every depth, and from these to the loss terms."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        self.kind = kind_of(architecture)
        self.is_detached = architecture.mtp.detach_decoder
        # `trunk` and `mtp` are names in the weights tree, which checkpoints keep
        self.trunk = TransformerDecoder(architecture.model, self.kind.num_main_layers, rngs)
        self.mtp = self.kind.make_module(rngs)

    def __call__(self, rows: Rows) -> ModelOutput:
        """Returns the hidden states of every depth.

        Args:
          rows: from `targets.rows`, with the kind's depth and lookahead. If `segments_KBT` is None, every row is one
            document and all of its positions count.
        """
        out = self._decoded(rows)
        main = MainModel(out.hidden, out.branch, self.trunk.final_norm, self.trunk.embed_tokens)
        with jax.named_scope("mtp"):
            extra = self.kind.hidden_states(self.mtp, _detached(main) if self.is_detached else main, rows)
        main_BTD = self.trunk.final_norm(out.hidden)
        if self.kind.num_features:
            main_BTD = jnp.pad(main_BTD, ((0, 0), (0, 0), (0, self.kind.num_features)))
        hidden_KBTD = jnp.concatenate([main_BTD[None], extra.hidden])
        return ModelOutput(hidden_KBTD, out.stats, extra.stats)

    def main(self, rows: Rows) -> jax.Array:
        """Returns the hidden states of depth 0 only, [B, T, D]."""
        return self.trunk.final_norm(self._decoded(rows).hidden)

    def _decoded(self, rows: Rows) -> DecoderOutput:
        segments_BT = None if rows.segments_KBT is None else rows.segments_KBT[0]
        inputs = DecoderInputs(self.trunk.embed_tokens(rows.inputs_KBT[0]), rows.positions_BT, segments_BT)
        return self.trunk(*self.kind.decoder_inputs(self.mtp, inputs))

    def terms(self, hidden_KBTD: jax.Array, rows: Rows, scales: Scales, z_weight: float) -> list[Term | HiddenTerm]:
        """Returns the terms of the loss; see `Kind.terms`."""
        return self.kind.terms(self.mtp, hidden_KBTD, self.head(), rows, scales, z_weight)

    def head(self) -> jax.Array:
        """Returns the output head of all depths, [D, V]; D includes the features that the MTP kind adds."""
        return self.kind.head(self.mtp, self.trunk.output_head())

    def main_head(self) -> jax.Array:
        """Returns the output head of the main model, [D, V]."""
        return self.trunk.output_head()


def _detached(main: MainModel) -> MainModel:
    """Returns `main` with gradients to the main model's weights stopped."""
    graph, weights = nnx.split(main.final_norm)
    stop = jax.lax.stop_gradient
    norm = nnx.merge(graph, stop(weights))
    return MainModel(stop(main.hidden), stop(main.branch), norm, lambda tokens: stop(main.embed(tokens)))


class AbstractModel(NamedTuple):
    """Model without weights.

    params: trained weights, a nested dict of ShapeDtypeStruct. biases: the same for router biases, which are updated
      by their own rule. infos: `ParamInfo` of every trained weight, in the structure of params.
    """

    graph: nnx.GraphDef
    states: tuple[nnx.State, nnx.State]
    params: Tree
    biases: Tree
    infos: Tree

    def merge(self, params: Tree, biases: Tree) -> MTPModel:
        """Returns the module with the given weights; cheap, for use inside jit."""
        filled = [
            jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(values))
            for state, values in zip(self.states, (params, biases), strict=True)
        ]
        return nnx.merge(self.graph, *filled)

    def shardings(self, mesh: jax.sharding.Mesh) -> tuple[Tree, Tree]:
        """Returns the shardings of params and biases."""
        is_info = lambda x: isinstance(x, ParamInfo)  # noqa: E731
        place = lambda info, leaf: sharding.named_weight(mesh, info.axes, leaf.shape)  # noqa: E731
        params = jax.tree.map(place, self.infos, self.params, is_leaf=is_info)
        return params, jax.tree.map(lambda _: sharding.named(mesh, ()), self.biases)


@functools.lru_cache(maxsize=32)
def abstract_model(architecture: Architecture) -> AbstractModel:
    """Returns the structure, shapes and declarations of a model, without allocation; `model.vocab_size` must be set."""
    model = nnx.eval_shape(lambda: MTPModel(architecture, nnx.Rngs(params=jax.random.key(0))))
    graph, (params, biases) = _split(model)
    infos = jax.tree.map(lambda v: v.get_metadata()["info"], params, is_leaf=lambda x: isinstance(x, nnx.Param))
    return AbstractModel(
        graph, (params, biases), nnx.to_pure_dict(params), nnx.to_pure_dict(biases), nnx.to_pure_dict(infos)
    )


def _split(model: MTPModel) -> tuple[nnx.GraphDef, tuple[nnx.State, nnx.State]]:
    """Returns (structure, (trained weights, router biases))."""
    parts: Any = nnx.split(model, nnx.Param, RouterBias)
    return parts[0], (parts[1], parts[2])


def init(architecture: Architecture, seed: jax.typing.ArrayLike) -> tuple[Tree, Tree]:
    """Returns initial params and biases as nested dicts; independent of the mesh, for use inside jit.

    Args:
      seed: int in [0, 2^31); it may be traced.
    """
    _, (params, biases) = _split(MTPModel(architecture, nnx.Rngs(params=jax.random.key(seed))))
    return nnx.to_pure_dict(params), nnx.to_pure_dict(biases)


class ParameterCounts(NamedTuple):
    """Numbers of weights of the main model, and of the MTP modules or heads; router biases are not counted.

    active: weights that a token is multiplied with, without routed experts that it did not choose and without
      embedding tables (unless one is also the output head). This is DeepSeek's convention: V3 has 671 B and 37 B,
      V2-Lite 15.7 B and 2.4 B.
    """

    total: int
    active: int
    mtp_total: int
    mtp_active: int


def count_parameters(architecture: Architecture) -> ParameterCounts:
    """Returns the counts, computed from shapes without allocation."""
    total, active = {"trunk": 0, "mtp": 0}, {"trunk": 0, "mtp": 0}
    for part, info, leaf in weights(architecture):
        total[part] += leaf.size
        is_head = info.is_matrix or (part == "trunk" and architecture.model.tie_embeddings)
        is_table = info.axes[0] == "vocab" and not is_head
        active[part] += 0 if is_table else active_size(architecture, info, leaf)
    return ParameterCounts(total["trunk"], active["trunk"], total["mtp"], active["mtp"])


def weights(architecture: Architecture) -> list[tuple[str, ParamInfo, jax.ShapeDtypeStruct]]:
    """Returns ("trunk" or "mtp", declaration, shape) of every trained weight."""
    built = abstract_model(architecture)
    infos = jax.tree_util.tree_leaves_with_path(built.infos, is_leaf=lambda x: isinstance(x, ParamInfo))
    return [(p[0].key, info, leaf) for (p, info), leaf in zip(infos, jax.tree.leaves(built.params), strict=True)]


def active_size(architecture: Architecture, info: ParamInfo, leaf: jax.ShapeDtypeStruct) -> int:
    """Returns the elements of a weight that a token uses: num_experts_per_token experts of routed ones, else all."""
    model = architecture.model
    return leaf.size * model.num_experts_per_token // model.num_experts if "experts" in info.axes else leaf.size
