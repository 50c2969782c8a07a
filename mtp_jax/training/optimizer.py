"""Optimizers from optax: the update rule of each weight, and the sharding of the optimizer state.

| weight                                         | adamw        | muon  | decayed |
|------------------------------------------------|--------------|-------|---------|
| matrices                                       | Adam         | Muon  | yes     |
| unembedding and router ("vocab" or "router" is | Adam         | Adam  | yes     |
| one of the dims multiplied)                    |              |       |         |
| embedding table, tied or not; norm scales      | Adam         | Adam  | no      |

A matrix is declared as one (`ParamInfo`): the number of dims does not identify it once layers are stacked. A tied
embedding is one weight, declared as an embedding, so it is updated once, by the embedding's rule.
"""

import contextlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
import optax.contrib

from mtp_jax.config import OptimizerConfig
from mtp_jax.layers.param import ParamInfo
from mtp_jax.training import gradient_groups, schedules, stochastic_rounding

Tree = Any  # nested dicts of the parameters' structure

# Muon's updates, scaled to the RMS that Adam's have in practice, take AdamW's learning rate and decay (2502.16982, 2.2)
MUON_UPDATE_RMS = 0.2


def build(config: OptimizerConfig, num_steps: int, infos: Tree) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW or Muon by weight, then the learning rate schedule.

    Moments are stored in config.moment_dtype and computed in float32. With bfloat16, beta2 above about 0.99 stalls the
    second moment: an update smaller than 2^-9 of it is rounded away. bfloat16_stochastic keeps it in expectation.

    Args:
      num_steps: length of the run, which the schedule spans.
      infos: one ParamInfo per weight.
    """
    labels = jax.tree.map(lambda info: label(config, info), infos, is_leaf=lambda x: isinstance(x, ParamInfo))
    schedule = schedules.learning_rate(config, num_steps)
    decay = optax.add_decayed_weights(config.weight_decay)
    down = optax.scale_by_learning_rate(schedule)
    rules = {
        "adam": optax.chain(_adam(config), down),
        "adam_decayed": optax.chain(_adam(config), decay, down),
        "muon": optax.chain(_muon(config, labels, infos), decay, down),
    }
    used = set(jax.tree.leaves(labels))
    clip = _clip(config.clip_norm, infos) if config.clip_norm else optax.identity()
    in_float32 = optax.stateless(lambda grads, _: optax.tree.cast(grads, jnp.float32))
    return optax.chain(in_float32, clip, optax.partition({k: v for k, v in rules.items() if k in used}, labels))


def label(config: OptimizerConfig, info: ParamInfo) -> str:
    """Returns the rule of one weight: adam, adam_decayed or muon."""
    if not info.is_matrix:
        return "adam"
    multiplied = {info.axes[dim] for dim in (*info.in_dims, *info.out_dims)}
    if config.name == "muon" and not multiplied & {"vocab", "router"}:
        return "muon"
    return "adam_decayed"


def num_updates(opt_state: Any) -> jax.Array:
    """Returns the number of updates that an optimizer state has received, int32: its schedule's count."""
    return optax.tree.get_all_with_path(opt_state, "count")[0][1]


def state_shardings(
    tx: optax.GradientTransformation, abstract_params: Tree, param_shardings: Tree, replicated: Any
) -> Any:
    """Returns a sharding for every leaf of `tx.init(params)`: a moment has that of its weight, all else is replicated.

    A leaf belongs to the weight whose path is a suffix of its own and whose shape is equal, so any nesting of chains,
    masks and partitions is supported.

    Args:
      abstract_params: ShapeDtypeStructs or arrays.
      param_shardings: shardings in the same structure.
      replicated: the sharding of counters and other small state.
    """
    weights = jax.tree_util.tree_leaves_with_path(abstract_params)
    placed = {path: (w.shape, s) for (path, w), s in zip(weights, jax.tree.leaves(param_shardings), strict=True)}

    def place(path: tuple, leaf: jax.ShapeDtypeStruct) -> Any:
        for start in range(len(path)):  # the longest suffix first
            shape, sharding = placed.get(path[start:], (None, None))
            if shape == leaf.shape:
                return sharding
        return replicated

    return jax.tree_util.tree_map_with_path(place, jax.eval_shape(tx.init, abstract_params))


def _clip(max_norm: float, infos: Tree) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm` with the norm that the step reports, so that it is computed once."""

    def clipped(grads: Tree, _: Tree) -> Tree:
        norm = gradient_groups.norm(infos, grads)
        return jax.tree.map(lambda g: jnp.where(norm < max_norm, g, g / norm * max_norm), grads)

    return optax.stateless(clipped)


def _adam(config: OptimizerConfig) -> optax.GradientTransformation:
    """optax's Adam with both moments in moment_dtype: it has an option for the first, the second follows `init`."""
    if config.moment_dtype == "bfloat16_stochastic":
        return stochastic_rounding.of_state(optax.scale_by_adam(config.beta1, config.beta2, config.eps))
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=config.stored_dtype)
    return optax.GradientTransformation(
        lambda params: adam.init(optax.tree.cast(params, jnp.dtype(config.stored_dtype))), adam.update
    )


def _muon(config: OptimizerConfig, labels: Tree, infos: Tree) -> optax.GradientTransformation:
    """Muon on each matrix of a stack: dims that the matmul neither contracts nor produces are batch dims.

    The Adam half of `optax.contrib.muon` is not used: it switches Adam to Nesterov momentum, which AdamW does not have.
    """
    numbers = jax.tree.map(
        lambda name, info: (
            optax.contrib.MuonDimensionNumbers(info.in_dims, info.out_dims) if name == "muon" else optax.MaskedNode()
        ),
        labels,
        infos,
    )
    is_stochastic = config.moment_dtype == "bfloat16_stochastic"
    muon = optax.contrib.scale_by_muon(
        ns_steps=config.muon.steps,
        beta=config.muon.momentum,
        eps=config.eps,
        mu_dtype="float32" if is_stochastic else config.stored_dtype,
        weight_dimension_numbers=numbers,
    )
    if is_stochastic:
        muon = stochastic_rounding.of_state(muon)

    def update(grads: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        is_rounded = config.muon.matmul_precision == "bfloat16"
        with jax.default_matmul_precision("BF16_BF16_F32") if is_rounded else contextlib.nullcontext():
            return muon.update(grads, state, params)

    return optax.chain(optax.GradientTransformation(muon.init, update), _scale_by_shape(numbers))


def _scale_by_shape(numbers: Tree) -> optax.GradientTransformation:
    """Scales by 0.2 sqrt(max(fan_in, fan_out)): an orthogonal matrix has an RMS of 1 / sqrt(max(fan_in, fan_out))."""

    def scale(update: jax.Array, dims: optax.contrib.MuonDimensionNumbers) -> jax.Array:
        fans = [math.prod(update.shape[d] for d in group) for group in dims]
        return MUON_UPDATE_RMS * math.sqrt(max(fans)) * update

    return optax.stateless(lambda updates, _: jax.tree.map(scale, updates, numbers))
