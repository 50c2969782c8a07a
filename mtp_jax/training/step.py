"""The training step and the validation step: pure functions of a state and a batch, each jitted once.

Shape letters: K depths (1 + extra), D extra depths, B rows, T positions, M micro-batches, L layers, E experts.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from mtp_jax import sharding, targets
from mtp_jax.config import Config
from mtp_jax.kernels.device import device
from mtp_jax.layers.router import RouterStats, moved_bias
from mtp_jax.losses import DepthSums, depth_sums, evaluate, token_terms, weight_sum
from mtp_jax.model import AbstractModel, Tree, abstract_model, init
from mtp_jax.mtp import Kind, Scales, kind_of
from mtp_jax.targets import Rows
from mtp_jax.training import gradient_groups, optimizer, schedules

GROUP_NORMS = "grad_norms"  # the only metric that is not a scalar: float32[G], see `gradient_groups`
Batch = dict[str, jax.Array]  # tokens, segment_ids, positions: int32[B, T + 1 + D]


class Aux(NamedTuple):
    """Sums of a micro-batch. extra: (value, weights) of each term that has a name of its own."""

    sums: DepthSums
    extra: dict[str, tuple[jax.Array, jax.Array]]
    stats: dict[str, RouterStats | None]  # of the decoder's stacked modules, and "mtp"
    balance: jax.Array  # the balance loss of all routers, float32


def rows_of(batch: Batch, kind: Kind) -> Rows:
    """Returns a batch in the form that the model and the losses read."""
    return targets.rows(
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        kind.depth,
        kind.lookahead,
        batch.get("loss_mask"),
    )


def loss_scales(config: Config, count_K: jax.Array, step: jax.Array) -> Scales:
    """Returns the factor of each depth's sum.

    L = L_0 + lambda(step) * sum_k w_k L_k / sum_k w_k, L_k = sum / N with N the weights of the valid depth-0 targets of
    the whole global batch (normalize="paper", the T of eq. 24), or depth k's own (normalize="valid"). Depths that a
    curriculum has disabled contribute nothing to the sum but still count in the divisor.
    """
    mtp, kind = config.mtp, kind_of(config)
    main = 1.0 / jnp.maximum(count_K[0], 1.0)
    tokens = step.astype(jnp.float32) * (config.data.batch_size * config.data.sequence_length)
    lambda_ = schedules.mtp_weight(mtp, kind.default_weight)(step, tokens)
    if kind.is_baseline:
        return Scales(main, jnp.zeros(0), jnp.float32(0.0))
    w_D = jnp.asarray(schedules.depth_weights(mtp, kind.depth))
    active_D = schedules.active_depths(mtp, kind.depth, config.training.num_steps)(step)
    divisor_D = jnp.maximum(count_K[1:], 1.0) if mtp.normalize == "valid" else jnp.maximum(count_K[0], 1.0)
    return Scales(main, lambda_ * active_D * w_D / w_D.sum() / divisor_D, lambda_)


class Trainer(NamedTuple):
    """The jitted functions of a config and the sharding of its state.

    init() -> state; step(state, batch) -> (state, metrics), which donates the old state;
    evaluate(state, batch, token_bytes) -> sums. state: {"params", "biases", "opt_state", "step"}. groups: parts of the
    model whose gradient norms are the metric GROUP_NORMS.
    """

    init: Callable[[], Tree]
    step: Callable[[Tree, Batch], tuple[Tree, dict[str, jax.Array]]]
    evaluate: Callable[[Tree, Batch, jax.Array], dict[str, jax.Array]]
    abstract_state: Tree
    batch_sharding: Any
    abstract: AbstractModel
    groups: list[tuple[str, int | None]]


@functools.lru_cache(maxsize=2)
def make_trainer(config: Config, mesh: jax.sharding.Mesh) -> Trainer:
    """Builds, shards and jits everything; nothing is compiled or allocated before the first call.

    The same arguments give the same trainer, so that a run repeated or continued in a process compiles nothing again.

    Args:
      config: validated, with model.vocab_size set.
      mesh: from `sharding.make_mesh`; calls must run under `jax.set_mesh(mesh)`.
    """
    built = abstract_model(config.architecture)
    trained_infos, _ = trained_part(config, built.infos)
    tx = optimizer.build(config.optimizer, config.training.num_steps, trained_infos)

    def fresh(seed: jax.typing.ArrayLike) -> Tree:
        params, biases = init(config.architecture, seed)
        opt_state = tx.init(trained_part(config, params)[0])
        return {"params": params, "biases": biases, "opt_state": opt_state, "step": jnp.zeros((), jnp.int32)}

    place = state_shardings(config, built, tx, mesh)
    shapes = jax.eval_shape(fresh, config.seed)
    abstract = jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where), shapes, place
    )
    # The length of a row (T + 1 + D tokens) need not divide the context axis, so batches are sharded by row only.
    rows = sharding.named(mesh, ("batch", None))
    replicated = sharding.named(mesh, ())
    make_state = jax.jit(fresh, out_shardings=place, compiler_options=init_options(mesh))
    return Trainer(
        init=functools.partial(make_state, np.uint32(config.seed)),  # an argument: one program for all seeds
        step=jax.jit(
            make_step(config, abstract_model(config.training_architecture), tx),
            in_shardings=(place, rows),
            out_shardings=(place, replicated),
            donate_argnums=0,
            compiler_options=compiler_options(mesh),
        ),
        evaluate=jax.jit(make_evaluate(config, built), out_shardings=replicated),
        abstract_state=abstract,
        batch_sharding=rows,
        abstract=built,
        groups=gradient_groups.names(trained_infos, trained_part(config, built.params)[0]),
    )


def compiler_options(mesh: jax.sharding.Mesh) -> dict[str, bool]:
    """Returns options of the compiler for the training step on the devices of a mesh."""
    with jax.set_mesh(mesh):
        return device().compiler_options


def init_options(mesh: jax.sharding.Mesh) -> dict[str, int]:
    """Returns options of the compiler for the program that makes the initial state, which runs once.

    On CPUs it is compiled with few optimizations, which changes no value: configs/quickstart.py in 8 s instead of 13.
    """
    is_cpu = all(device.platform == "cpu" for device in mesh.devices.flat)
    has_fewer = jax.config.read("jax_disable_most_optimizations")  # which a level given here would overrule
    return {"xla_backend_optimization_level": 1} if is_cpu and not has_fewer else {}


def state_shardings(
    config: Config, built: AbstractModel, tx: optax.GradientTransformation, mesh: jax.sharding.Mesh
) -> Tree:
    """Returns the sharding of each leaf of the state: optimizer moments as their weight, the rest replicated."""
    params, biases = built.shardings(mesh)
    replicated = sharding.named(mesh, ())
    trained, _ = trained_part(config, built.params)
    opt_state = optimizer.state_shardings(tx, trained, trained_part(config, params)[0], replicated)
    return {"params": params, "biases": biases, "opt_state": opt_state, "step": replicated}


def trained_part(config: Config, tree: Tree) -> tuple[Tree, Tree]:
    """Returns (the trained part of params, the rest): everything, or the MTP modules alone (mtp.freeze_decoder)."""
    if not config.mtp.freeze_decoder:
        return tree, {}
    return {"mtp": tree["mtp"]}, {name: part for name, part in tree.items() if name != "mtp"}


def make_step(config: Config, built: AbstractModel, tx: optax.GradientTransformation):
    """Returns (state, batch) -> (state, metrics); see `Trainer`."""
    grads_of = jax.value_and_grad(make_loss(config, built), has_aux=True)
    kind = kind_of(config)
    infos = trained_part(config, built.infos)[0]

    def step(state: Tree, batch: Batch) -> tuple[Tree, dict[str, jax.Array]]:
        rows = rows_of(batch, kind)
        # Summed over the whole global batch before it is split: the divisor depends neither on the number of devices
        # nor on the number of micro-batches.
        count_K = weight_sum(rows.weight_KBT)
        scales = loss_scales(config, count_K, state["step"])
        assert rows.segments_KBT is not None
        counts_KB = jnp.not_equal(rows.segments_KBT, targets.PADDING).any(2)  # routers ignore loss weights
        num_rows = jnp.maximum(counts_KB.sum(1).astype(jnp.float32), 1.0)
        trained, frozen = trained_part(config, state["params"])

        def micro(rows: Rows):
            return grads_of(trained, frozen, state["biases"], rows, scales, num_rows)

        (loss, aux), grads = _accumulate(micro, rows, config.training.grad_accum_steps)
        grad_norm = gradient_groups.norm(infos, grads)
        done = optimizer.num_updates(state["opt_state"])
        with jax.named_scope("optimizer"):
            updates, opt_state = tx.update(grads, state["opt_state"], trained)
            params = {**frozen, **optax.apply_updates(trained, updates)}
        biases = move_biases(config, state["biases"], aux.stats, state["step"])
        metrics = step_metrics(config, loss, aux, count_K) | {
            "mtp_lambda": scales.weight,
            "grad_norm": grad_norm,
            GROUP_NORMS: gradient_groups.norms(infos, grads),
            "learning_rate": schedules.learning_rate(config.optimizer, config.training.num_steps)(done),
        }
        changed = {"params": params, "biases": biases, "opt_state": opt_state}
        if config.training.skip_nonfinite:
            is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
            kept = {name: state[name] for name in changed}
            changed = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), changed, kept)
            metrics["skipped_steps"] = state["step"] + 1 - optimizer.num_updates(changed["opt_state"])
        return {**changed, "step": state["step"] + 1}, metrics

    return step


def make_loss(config: Config, built: AbstractModel):
    """Returns (trained, frozen, biases, rows, scales, num_rows_K) -> (this micro-batch's part of the loss, Aux)."""
    is_packed = any(source.packing != "contiguous" for source in config.data.sources)

    def loss(trained: Tree, frozen: Tree, biases: Tree, rows: Rows, scales: Scales, num_rows_K: jax.Array):
        model = built.merge({**jax.lax.stop_gradient(frozen), **trained}, biases)
        # Contiguous rows are declared as one document each: attention then compares no segment ids.
        out = model(rows if is_packed else rows._replace(segments_KBT=None))
        with jax.named_scope("loss"):
            terms = model.terms(out.hidden, rows, scales, config.training.z_loss_weight)
            total, sums = evaluate(terms, config.training.loss_chunk, config.training.loss_precision)
        mtp_stats = _active(out.mtp_stats, scales.depth_N)
        parts = [balance(decoder_stats, num_rows_K[:1]) for decoder_stats in out.decoder_stats.values()]
        parts.append(balance(mtp_stats, num_rows_K[1:]))
        for part in parts:
            total += config.model.balance_loss_weight * part
        named = {t.name: (s.value.sum(), s.num.sum()) for t, s in zip(terms, sums, strict=True) if t.name}
        stats = jax.lax.stop_gradient({**out.decoder_stats, "mtp": mtp_stats})
        return total, Aux(depth_sums(terms, sums), named, stats, jax.lax.stop_gradient(sum(parts, jnp.float32(0.0))))

    return loss


def _active(stats: RouterStats | None, weight_D: jax.Array) -> RouterStats | None:
    """Statistics of depths that contribute to the loss; a depth of weight 0 balances nothing and moves no bias."""
    if stats is None:
        return None
    on_D = (weight_D != 0).astype(jnp.float32)
    return RouterStats(stats.load_E * on_D[:, None], stats.balance * on_D, stats.num_rows * on_D)


def balance(stats: RouterStats | None, num_rows: jax.Array) -> jax.Array:
    """Sequence-wise balance loss over a stack of layers: the mean over the global batch's rows, summed over layers."""
    return jnp.float32(0.0) if stats is None else (stats.balance / num_rows).sum()


def _accumulate(micro: Callable, rows: Rows, num: int):
    """Sums `micro` over `num` equal parts of the batch. Every term is already divided by the count of the batch."""
    if num == 1:
        return micro(rows)
    parts = rows.micro_batches(num)
    zero = jax.tree.map(
        lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(micro, jax.tree.map(lambda x: x[0], parts))
    )
    return jax.lax.scan(lambda total, part: (jax.tree.map(jnp.add, total, micro(part)), None), zero, parts)[0]


def move_biases(config: Config, biases: Tree, stats: dict[str, RouterStats | None], step: jax.Array) -> Tree:
    """Moves every router's bias by the global load of its valid tokens, in decoder and MTP blocks alike.

    A module shared by all depths has one bias and the load of all its depths.
    """
    until = config.model.router.bias_until
    rate = jnp.where((step < until) | (until == 0), config.model.router.bias_rate, 0.0)

    def moved(tree: Tree, stat: RouterStats | None) -> Tree:
        def one(bias: jax.Array) -> jax.Array:
            assert stat is not None
            load = stat.load_E if bias.shape == stat.load_E.shape else stat.load_E.sum(0, keepdims=True)
            return moved_bias(bias, load, rate)

        return jax.tree.map(one, tree)

    out = dict(biases)
    if "trunk" in biases and not config.mtp.freeze_decoder:
        out["trunk"] = {name: moved(tree, stats[name]) for name, tree in biases["trunk"].items()}
    if "mtp" in biases:
        out["mtp"] = moved(biases["mtp"], stats["mtp"])
    return out


def step_metrics(config: Config, loss: jax.Array, aux: Aux, count_K: jax.Array) -> dict[str, jax.Array]:
    """Returns the metrics of a step. loss_mtp_k is L_k, divided as in the loss; accuracies use their own count."""
    sums = aux.sums
    own_K = jnp.maximum(sums.num, 1.0)
    divisor_K = own_K if config.mtp.normalize == "valid" else jnp.maximum(count_K[0], 1.0)
    loss_K = sums.nll / divisor_K
    accuracy_K, agreement_K = sums.correct / own_K, sums.agree / jnp.maximum(sums.num_compared, 1.0)
    out = {"loss": loss, "loss_main": loss_K[0], "accuracy_main": accuracy_K[0]}
    for k in range(1, len(loss_K)):
        out |= {
            f"loss_mtp_{k}": loss_K[k],
            f"accuracy_mtp_{k}": accuracy_K[k],
            f"agreement_mtp_{k}": agreement_K[k],
        }
    out |= {f"loss_{name}": value / jnp.maximum(num, 1.0) for name, (value, num) in aux.extra.items()}
    loads = [stat.load_E for stat in aux.stats.values() if stat is not None]
    if loads:
        load_LE = jnp.concatenate(loads)
        ratio_L = load_LE.max(-1) / jnp.maximum(load_LE.mean(-1), 1e-9)
        out["moe_load_max_over_mean"] = ratio_L.max()
        out["moe_balance_loss"] = aux.balance
    return out


def make_evaluate(config: Config, built: AbstractModel):
    """Returns (state, batch, token_bytes int32[V]) -> sums per depth, float32[K]: `DepthSums` and target "bytes"."""
    kind = kind_of(config)

    def evaluate_batch(state: Tree, batch: Batch, token_bytes: jax.Array) -> dict[str, jax.Array]:
        rows = rows_of(batch, kind)
        model = built.merge(state["params"], state["biases"])
        zeros = Scales(jnp.float32(0.0), jnp.zeros(kind.depth), jnp.float32(0.0))
        terms = token_terms(model.terms(model(rows).hidden, rows, zeros, 0.0))
        sums = depth_sums(terms, evaluate(terms, config.training.loss_chunk)[1])
        bytes_KBT = rows.weight_KBT * jnp.take(token_bytes, rows.targets_KBT)
        return sums._asdict() | {"bytes": bytes_KBT.sum((1, 2))}

    return evaluate_batch
