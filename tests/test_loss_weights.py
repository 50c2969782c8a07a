"""Loss weights: a target token's own weight decides what it is worth, and nothing else."""

import math
from dataclasses import replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax import targets
from mtp_jax.config import MeshConfig
from mtp_jax.losses import evaluate
from mtp_jax.mtp import Scales, kind_of
from mtp_jax.sharding import make_mesh
from mtp_jax.training.step import loss_scales, make_trainer, rows_of
from tests.mtp.kinds import batch_of, small, steps
from tests.test_mistakes import scalars
from tests.test_targets import packed_rows

BALANCE = 0.1


def expected_weights(segment_ids, loss_mask, length, depth):
    """[K, B, T], one position at a time."""
    out = np.zeros((depth + 1, len(segment_ids), length), np.float32)
    for k, b, i in np.ndindex(*out.shape):
        is_one_document = segment_ids[b, i] == segment_ids[b, i + 1 + k] != targets.PADDING
        out[k, b, i] = loss_mask[b, i + 1 + k] if is_one_document else 0.0
    return out


@settings(max_examples=100, deadline=None)
@given(packed_rows(), st.data())
def test_depth_k_has_the_weight_of_the_token_it_predicts(rows, data):
    tokens, segment_ids, lookahead = rows
    depth = data.draw(st.integers(0, lookahead))
    mask = np.random.default_rng(tokens[0, 0]).choice([0.0, 0.5, 1.0, 3.0], tokens.shape).astype(np.float32)
    args = tokens, segment_ids, np.zeros_like(tokens), depth, lookahead
    length = tokens.shape[1] - 1 - lookahead
    weighted, plain = targets.rows(*args, mask), targets.rows(*args)
    np.testing.assert_array_equal(weighted.weight_KBT, expected_weights(segment_ids, mask, length, depth))
    np.testing.assert_array_equal(plain.weight_KBT, expected_weights(segment_ids, np.ones_like(mask), length, depth))
    for name in ("inputs_KBT", "targets_KBT", "segments_KBT"):  # what is read does not depend on loss weights
        np.testing.assert_array_equal(getattr(weighted, name), getattr(plain, name))


class OneDevice(NamedTuple):
    """step(batch) -> (metrics, new state) of a fresh model's first step. evaluate(batch) -> its sums. hidden(batch)
    -> hidden states [K, B, T, D] and the head, as numpy arrays."""

    config: object
    step: object
    evaluate: object
    hidden: object


@pytest.fixture(scope="module")
def one_device():
    config = small(f"--config.model.balance_loss_weight={BALANCE}")
    mesh = make_mesh(MeshConfig(data=1), jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)

        @jax.jit
        def hidden_of(state, batch):
            model = trainer.abstract.merge(state["params"], state["biases"])
            return model(rows_of(batch, kind_of(config))).hidden, model.head()

        def step(batch):
            state, metrics = trainer.step(trainer.init(), jax.device_put(batch, trainer.batch_sharding))
            return scalars(metrics), jax.device_get(state)

        def evaluated(batch):
            return jax.device_get(trainer.evaluate(trainer.init(), batch, np.ones(config.model.vocab_size, np.int32)))

        def hidden(batch):
            return jax.device_get(hidden_of(trainer.init(), batch))

        yield OneDevice(config, step, evaluated, hidden)


def chat(config, answers=1.0):
    """Rows of one document each: four tokens of prompt, and an answer."""
    batch = batch_of(config)
    shape = batch["tokens"].shape
    mask = np.full(shape, answers, np.float32)
    mask[:, :4] = 0.0
    positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape)
    return {**batch, "segment_ids": np.ones(shape, np.int32), "positions": positions, "loss_mask": mask}


def with_token(batch, at):
    """The token of every row at this position changed."""
    tokens = batch["tokens"].copy()
    tokens[:, at] = (tokens[:, at] + 7) % 40
    return {**batch, "tokens": tokens}


def combined(metrics):
    """The loss without the balance loss: lambda 0.3, both depths alike."""
    return metrics["loss_main"] + 0.3 * (metrics["loss_mtp_1"] + metrics["loss_mtp_2"]) / 2


def assert_equal_trees(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def test_a_step_divides_weighted_sums_by_the_sum_of_weights(one_device):
    """Fractional weights, packed documents; training, its divisors and validation against a loop over positions."""
    batch = batch_of(one_device.config)
    mask = np.random.default_rng(5).choice([0.0, 0.3, 1.0, 2.0], batch["tokens"].shape).astype(np.float32)
    batch["loss_mask"] = mask
    weight = expected_weights(batch["segment_ids"], mask, 16, 2).astype(np.float64)
    hidden, head = one_device.hidden(batch)
    logits = np.asarray(hidden, np.float64) @ np.asarray(head, np.float64)
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll, correct = np.zeros(3), np.zeros(3)
    for k, b, i in np.ndindex(*weight.shape):
        target = batch["tokens"][b, i + 1 + k]
        nll[k] -= weight[k, b, i] * log_p[k, b, i, target]
        correct[k] += weight[k, b, i] * (logits[k, b, i].argmax() == target)
    count = weight.sum((1, 2))
    assert len({round(c, 3) for c in count}) == 3

    metrics, _ = one_device.step(batch)
    for k, (loss, accuracy) in enumerate(
        [("loss_main", "accuracy_main"), ("loss_mtp_1", "accuracy_mtp_1"), ("loss_mtp_2", "accuracy_mtp_2")]
    ):
        assert metrics[loss] == pytest.approx(nll[k] / count[0], rel=1e-5)
        assert metrics[accuracy] == pytest.approx(correct[k] / count[k], rel=1e-5)
    assert metrics["loss"] - combined(metrics) == pytest.approx(3 * BALANCE, rel=0.2)  # three routers, near 1 each
    sums = one_device.evaluate(batch)
    for name, expected in (("nll", nll), ("correct", correct), ("num", count)):
        np.testing.assert_allclose(sums[name], expected, rtol=1e-5)

    config = one_device.config
    paper = loss_scales(config, count, jnp.int32(0))
    valid = loss_scales(replace(config, mtp=replace(config.mtp, normalize="valid")), count, jnp.int32(0))
    np.testing.assert_allclose(paper.depth_N, 0.15 / count[[0, 0]], rtol=1e-5)
    np.testing.assert_allclose(valid.depth_N, 0.15 / count[1:], rtol=1e-5)
    assert float(paper.main) == float(valid.main) == pytest.approx(1 / count[0], rel=1e-5)


def test_a_prompt_token_is_read_and_not_learnt(one_device):
    """The last token of a row is no input: without weight its id is worth nothing. A prompt token is one, to all."""
    answered = chat(one_device.config)
    batch = {**answered, "loss_mask": answered["loss_mask"].copy()}
    batch["loss_mask"][:, -1] = 0.0
    metrics, state = one_device.step(batch)
    assert_equal_trees(one_device.step(with_token(batch, -1)), (metrics, state))
    assert one_device.step(with_token(answered, -1))[0]["loss_mtp_2"] != one_device.step(answered)[0]["loss_mtp_2"]
    other, _ = one_device.step(with_token(batch, 2))
    for name in ("loss_main", "loss_mtp_1", "loss_mtp_2"):
        assert other[name] != pytest.approx(metrics[name], rel=1e-6), name


def test_targets_without_weight_reach_no_loss_and_no_gradient(one_device):
    """At every depth: the same ids as inputs, others as targets."""
    config, kind = one_device.config, kind_of(one_device.config)
    rows = rows_of(chat(config), kind)
    keys = jax.random.split(jax.random.key(0))
    hidden, head = jax.random.normal(keys[0], (*rows.weight_KBT.shape, 8)), jax.random.normal(keys[1], (8, 40))
    scales = Scales(jnp.float32(1.0), jnp.array([0.5, 0.25]), jnp.float32(1.0))

    def result(changed):
        other = rows._replace(targets_KBT=jnp.where(changed, (rows.targets_KBT + 7) % 40, rows.targets_KBT))

        def loss(hidden, head):
            total, sums = evaluate(kind.terms(None, hidden, head, other, scales, 0.01), 32)
            return total, [s._replace(picks=None) for s in sums]

        return jax.value_and_grad(loss, (0, 1), has_aux=True)(hidden, head)

    is_prompt = rows.weight_KBT == 0
    assert is_prompt.any((1, 2)).all() and not is_prompt.all((1, 2)).any()
    assert_equal_trees(result(is_prompt), result(jnp.zeros_like(is_prompt)))
    with pytest.raises(AssertionError):
        assert_equal_trees(result(~is_prompt), result(jnp.zeros_like(is_prompt)))


def test_routers_ignore_loss_weights(one_device):
    """Nor does a batch that trains nothing divide by zero; its loss is the balance loss."""
    answers, nothing = chat(one_device.config), chat(one_device.config, answers=0.0)
    (some, state), (none, other) = one_device.step(answers), one_device.step(nothing)
    assert_equal_trees(state["biases"], other["biases"])
    assert min(np.abs(bias).max() for bias in jax.tree.leaves(state["biases"])) > 0
    assert none["moe_load_max_over_mean"] == some["moe_load_max_over_mean"]
    assert np.isfinite(list(none.values())).all() and combined(none) == 0.0
    assert none["loss"] == pytest.approx(some["loss"] - combined(some), abs=1e-5) and none["loss"] > BALANCE


def test_equal_weights_of_any_size_are_the_same_step(one_device):
    """Only the ratios of weights count."""
    ones, quarters = chat(one_device.config), chat(one_device.config, answers=0.25)
    (some, state), (other, same) = one_device.step(ones), one_device.step(quarters)
    assert other == pytest.approx(some, rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state["params"], same["params"])


MESH = {"fsdp": 2, "expert": 2, "context": 2}


def test_the_divisor_is_that_of_the_global_batch():
    """Two micro-batches on eight devices: rows of very different weight, and none for a quarter of the devices nor, in
    the second step, for a micro-batch."""
    config = small()
    batches = []
    for seed in range(2):
        batch = batch_of(config, seed)
        odd = 0 if seed else 0.25  # the second micro-batch is the odd rows
        of_rows = np.array([1, odd, 0.5, odd, 0, 0, 0.25, 0], np.float32)[:, None]
        batch["loss_mask"] = np.where(batch["positions"] < 2, 0, of_rows).astype(np.float32)
        batches.append(batch)
    expected, state = steps(config, batches)
    split = replace(config, training=replace(config.training, grad_accum_steps=2))
    found, other = steps(split, batches, **MESH)
    for step, (a, b) in enumerate(zip(expected, found, strict=True)):
        assert min(a["loss_main"], a["loss_mtp_1"], a["loss_mtp_2"]) > 0
        for name in ("loss", "loss_main", "loss_mtp_1", "loss_mtp_2", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), (step, name)
    norm = math.sqrt(sum(float((w**2).sum()) for w in jax.tree.leaves(state["params"])))
    differences = jax.tree.map(lambda a, b: float(((a - b) ** 2).sum()), state["params"], other["params"])
    assert math.sqrt(sum(jax.tree.leaves(differences))) < 1e-3 * norm
