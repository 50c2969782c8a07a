"""Losses of drafts against the main model's predictions (`mtp.loss`): values, gradients and meshes."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import sharding
from mtp_jax.config import Config, DataConfig, MeshConfig, MTPConfig, TrainingConfig, conventions
from mtp_jax.losses import weight_sum
from mtp_jax.model import abstract_model
from mtp_jax.mtp import Scales, kind_of
from mtp_jax.training.step import loss_scales, make_loss, rows_of
from tests.bridge import packed_rows, to_model
from tests.decoding.models import GQA, markov, parallel, sequential
from tests.reference import draft_losses as oracle
from tests.reference.model import forward
from tests.reference.params import random_params

LENGTH, VOCAB = 8, 12
MODEL = dataclasses.replace(GQA, vocab_size=VOCAB, remat="none")


def config_of(mtp, **fields):
    mtp = dataclasses.replace(mtp, **fields)
    return Config(
        model=MODEL,
        mtp=mtp,
        data=DataConfig(sequence_length=LENGTH, batch_size=4, packing="packed"),
        training=TrainingConfig(loss_chunk=5),
    )


def params_of(config):
    """Oracle's parameters; every matrix is random, so that the logits of all depths differ."""
    return random_params(config, kind_of(config).num_main_layers, conventions(config.mtp).output_norm, 3)


@functools.cache
def batch_of(depth):
    """Packed documents of 1 to 9 tokens, padding, and weights of target tokens, some of them 0."""
    rng, length = np.random.default_rng(4), LENGTH + 1 + depth
    tokens, segments, positions = packed_rows(rng, 4, length, VOCAB, 1)
    segments[0] = 1  # a row in which every depth counts up to the last position that has a teacher
    positions[0] = np.arange(length)
    mask = rng.choice([0.0, 0.5, 1.0], segments.shape)
    return {
        **{"tokens": tokens.astype(np.int32), "segment_ids": segments.astype(np.int32)},
        **{"positions": positions.astype(np.int32), "loss_mask": mask.astype(np.float32)},
    }


def loss_and_grads(config, is_main_counted=True, **sizes):
    """Loss and `Aux` of a step, and the gradients of all weights, on a mesh of these sizes."""
    kind, built = kind_of(config), abstract_model(config.architecture)
    mesh = sharding.make_mesh(MeshConfig(**{"data": 1, **sizes}), jax.devices()[: math.prod(sizes.values())])

    def run(params, biases, batch):
        rows = rows_of(batch, kind)
        scales = loss_scales(config, weight_sum(rows.weight_KBT), jnp.int32(0))
        scales = scales if is_main_counted else Scales(0 * scales.main, scales.depth_N, scales.weight)
        args = params, {}, biases, rows, scales, jnp.ones(1 + kind.depth)
        return jax.value_and_grad(make_loss(config, built), has_aux=True)(*args)

    with jax.set_mesh(mesh):
        params, biases = jax.device_put(to_model(params_of(config)), built.shardings(mesh))
        return jax.device_get(jax.jit(run)(params, biases, batch_of(kind.depth)))


def expected_loss(config, reference, teacher_BTV=None):
    """(loss, sum of the drafts' loss, sum of its weights) by the oracle; and the logits of every depth."""
    mtp, batch = config.mtp, batch_of(config.mtp.depth)
    arrays = batch["tokens"], batch["segment_ids"]
    logits = forward(reference, config, *arrays, batch["positions"][:, :LENGTH], conventions(mtp))["logits"]
    args = mtp.loss, mtp.cross_entropy_share, kind_of(config).default_weight, teacher_BTV
    return oracle.draft_loss(logits, *arrays, batch["loss_mask"], *args), logits


CASES = {
    "sequential": config_of(sequential(3), loss="end_to_end_tv"),
    "shared": config_of(sequential(2, shared_depths=True), loss="tv", cross_entropy_share=0.1),
    "parallel": config_of(parallel(1), loss="tv"),
    "markov": config_of(markov(3), loss="end_to_end_tv", cross_entropy_share=0.1),
}
single = functools.cache(lambda name: loss_and_grads(CASES[name]))


@pytest.mark.parametrize("name", CASES)
def test_the_loss_of_a_step_is_the_oracles(name):
    config = CASES[name]
    (loss, aux), _ = single(name)
    (expected, extra, num), _ = expected_loss(config, params_of(config))
    assert loss == pytest.approx(expected, rel=1e-5)
    value, weights = aux.extra[config.mtp.loss]
    assert value == pytest.approx(extra, rel=1e-5) and weights == pytest.approx(num, rel=1e-6)
    assert extra / num > 0.05 and num > 5


@pytest.mark.parametrize("name", ["shared", "markov"])
def test_gradients_are_those_with_a_constant_teacher(name):
    """Along a random direction of all weights, against a central difference of the oracle in float64."""
    config = CASES[name]
    (_, _), grads = single(name)
    reference, rng = params_of(config), np.random.default_rng(7)
    direction = jax.tree.map(lambda w: rng.standard_normal(w.shape), reference)
    slope = sum(map(np.vdot, jax.tree.leaves(grads), jax.tree.leaves(to_model(direction)[0])), 0.0)
    teacher_BTV = expected_loss(config, reference)[1][0]

    def difference(teacher_BTV):
        ends = []
        for step in (1e-5, -1e-5):
            moved = jax.tree.map(lambda w, d, step=step: w + step * d, reference, direction)
            ends.append(expected_loss(config, moved, teacher_BTV)[0][0])
        return (ends[0] - ends[1]) / 2e-5

    constant, moving = difference(teacher_BTV), difference(None)
    assert slope == pytest.approx(constant, rel=5e-4)
    assert slope != pytest.approx(moving, rel=2e-3)  # a gradient through the teacher would be seen


DETACHED = {
    "sequential": config_of(sequential(2), loss="end_to_end_tv", cross_entropy_share=0.1, detach_decoder=True),
    "markov": config_of(markov(2), loss="tv", detach_decoder=True),
    "markov, cross-entropy": config_of(markov(2), detach_decoder=True),
}


@pytest.mark.parametrize("name", DETACHED)
def test_drafts_move_no_weight_of_a_detached_decoder(name):
    """Nor its output head; W_out, which is beside it, trains. Without the main model's own loss."""
    config = DETACHED[name]
    (loss, _), grads = loss_and_grads(config, is_main_counted=False)
    assert max(np.abs(g).max() for g in jax.tree.leaves(grads["trunk"])) == 0.0
    assert min(np.abs(g).max() for g in jax.tree.leaves(grads["mtp"])) > 0.0
    (whole, extra, _), _ = expected_loss(config, params_of(config))
    divisor = float(weight_sum(rows_of(batch_of(2), kind_of(config)).weight_KBT)[0])
    assert loss == pytest.approx(kind_of(config).default_weight * extra / 2 / divisor, rel=1e-5) and loss < whole


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("sequential", {"context": 2}),
        ("markov", {"fsdp": 2, "context": 2}),  # which does not divide the rows of the head and W_out
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_mesh_computes_the_loss_of_one_device(name, sizes):
    """The teacher of a position is on another device where a row is split."""
    (loss, aux), grads = single(name)
    (found, other), many = loss_and_grads(CASES[name], **sizes)
    assert found == pytest.approx(loss, rel=1e-5)
    key = CASES[name].mtp.loss
    assert other.extra[key][0] == pytest.approx(aux.extra[key][0], rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), grads, many)


def test_a_kind_without_mtp_takes_a_draft_loss_for_sweeps():
    """As every key of the section: none has an effect."""
    kind_of(config_of(MTPConfig(), loss="tv")).check(config_of(MTPConfig(), loss="tv"))
