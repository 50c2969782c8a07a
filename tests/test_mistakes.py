"""Mistakes that shipped in other frameworks, one test each, named after what it protects."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax import sharding
from mtp_jax.config import MeshConfig, load_config
from mtp_jax.losses import CrossEntropy, Term, evaluate
from mtp_jax.model import abstract_model
from mtp_jax.mtp import kind_of
from mtp_jax.training.step import make_trainer, rows_of
from tests.bridge import packed_rows

TINY = ["--config.model.vocab_size=40", "--config.model.num_layers=3", "--config.data.sequence_length=16"]


def tiny(*overrides):
    config = load_config("configs/tiny.py", [*TINY, *overrides])
    return replace(config, mesh=MeshConfig())


def rows(config, seed=0, num_padding=0):
    length = config.data.sequence_length + 1 + kind_of(config).lookahead
    rng = np.random.default_rng(seed)
    names = ("tokens", "segment_ids", "positions")
    arrays = packed_rows(rng, config.data.batch_size, length, config.model.vocab_size, num_padding)
    return {name: array.astype(np.int32) for name, array in zip(names, arrays, strict=True)}


def scalars(metrics):
    """The metrics of a step as Python floats, without the norms of the parts of the model."""
    return {name: float(value) for name, value in jax.device_get(metrics).items() if np.ndim(value) == 0}


def trainer_of(config, num_devices):
    """(mesh, trainer) on the first devices."""
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:num_devices])
    with jax.set_mesh(mesh):
        return mesh, make_trainer(config, mesh)


def run_steps(config, batches, num_devices=1):
    """(final state, metrics of each step) on the first `num_devices` devices."""
    mesh, trainer = trainer_of(config, num_devices)
    with jax.set_mesh(mesh):
        state, out = trainer.init(), []
        for batch in batches:
            state, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
            out.append(scalars(metrics))
        return jax.device_get(state), out


@pytest.mark.parametrize("kind", ["parallel", "sequential"])
def test_packed_documents_do_not_see_each_other_at_any_depth(kind):
    """Mistake 1. Change every token of one document: no valid position of any other document, at any depth, moves."""
    config = tiny(f"--config.mtp.kind={kind}", "--config.mtp.depth=3", "--config.mtp.parameter_matched=false")
    batch = rows(config)
    built = abstract_model(config.architecture)
    from mtp_jax.model import init

    params, biases = jax.jit(lambda: init(config.architecture, 0))()

    @jax.jit
    def hidden(batch):
        return built.merge(params, biases)(rows_of(batch, kind_of(config))).hidden

    before = np.asarray(hidden(batch))
    mask = np.asarray(rows_of(batch, kind_of(config)).weight_KBT) > 0
    for segment in (1, 2, 3):
        inside = batch["segment_ids"] == segment
        changed = {**batch, "tokens": np.where(inside, (batch["tokens"] + 7) % 40, batch["tokens"]).astype(np.int32)}
        after = np.asarray(hidden(changed))
        others = mask & ~inside[None, :, : mask.shape[2]]
        assert others[3].any()  # there is something to leak into at the deepest depth
        np.testing.assert_array_equal(after[others], before[others])
        assert np.abs(after - before)[mask & inside[None, :, : mask.shape[2]]].max() > 1e-3


def test_depths_are_divided_by_the_global_count_and_an_empty_device_is_not_0_over_0():
    """Mistake 2. Rows whose documents are too short for depth 2 sit on devices of their own."""
    config = tiny()
    batch = rows(config)
    batch["segment_ids"][:4] = np.arange(batch["segment_ids"].shape[1]) // 2 + 1  # two tokens a document
    _, one = run_steps(config, [batch, batch])
    _, eight = run_steps(config, [batch, batch], num_devices=8)
    mask = np.asarray(rows_of(batch, kind_of(config)).weight_KBT) > 0
    assert not mask[1:, :4].any() and mask[2, 4:].any()
    for a, b in zip(one, eight, strict=True):
        assert np.isfinite(list(a.values())).all()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-4), name


def test_the_divisor_is_the_papers_or_the_depths_own():
    config = tiny()
    batch = rows(config)
    count = np.asarray(rows_of(batch, kind_of(config)).weight_KBT).sum((1, 2))
    _, (paper,) = run_steps(config, [batch])
    _, (valid,) = run_steps(tiny("--config.mtp.normalize=valid"), [batch])
    for k in (1, 2):
        ratio = count[k] / count[0]
        assert ratio < 0.9
        assert paper[f"loss_mtp_{k}"] == pytest.approx(valid[f"loss_mtp_{k}"] * ratio, rel=1e-5)


def test_gradient_accumulation_does_not_change_the_step():
    config = tiny("--config.optimizer.name=adamw", "--config.training.z_loss_weight=0.01")
    batches = [rows(config, seed) for seed in range(3)]
    state, whole = run_steps(config, batches)
    accumulated = replace(config, training=replace(config.training, grad_accum_steps=4))
    other, parts = run_steps(accumulated, batches)
    for a, b in zip(whole, parts, strict=True):
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=2e-4, abs=1e-6), name
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), state["biases"], other["biases"])


def test_the_evaluated_mtp_loss_is_the_trained_one():
    """Mistake 4: an evaluation MTP loss of silently 0."""
    config = tiny()
    batch = rows(config)
    mesh = sharding.make_mesh(config.mesh, jax.devices()[:1])
    with jax.set_mesh(mesh):
        trainer = make_trainer(config, mesh)
        state = trainer.init()
        token_bytes = np.ones(config.model.vocab_size, np.int32)
        sums = jax.device_get(trainer.evaluate(state, batch, token_bytes))
        _, metrics = trainer.step(state, jax.device_put(batch, trainer.batch_sharding))
    for k, name in enumerate(("loss_main", "loss_mtp_1", "loss_mtp_2")):
        assert sums["num"][k] > 0 and sums["nll"][k] / sums["num"][0] == pytest.approx(float(metrics[name]), rel=1e-5)
    np.testing.assert_array_equal(sums["bytes"], sums["num"])


@pytest.mark.parametrize("shared", ["true", "false"])
def test_every_router_bias_moves_by_the_load_of_valid_tokens(shared):
    """Mistake 5: MTP blocks left out of the update, padding counted."""
    config = tiny(f"--config.mtp.shared_depths={shared}")
    batch = rows(config, num_padding=5)
    state, _ = run_steps(config, [batch])
    rate = config.model.router.bias_rate
    main = state["biases"]["trunk"]["blocks"]["ffn"]["router"]["bias"]
    mtp = state["biases"]["mtp"]["module"]["block"]["ffn"]["router"]["bias"]
    assert main.shape == (2, 8) and mtp.shape == (1 if shared == "true" else 2, 8)
    for bias in (*main, *mtp):
        assert set(np.round(np.abs(bias) / rate, 4)) <= {0.0, 1.0} and bias.min() < 0 < bias.max()
    # What padding holds moves nothing.
    noisy = {**batch, "tokens": np.where(batch["segment_ids"] == 0, 39, batch["tokens"]).astype(np.int32)}
    assert (noisy["tokens"] != batch["tokens"]).any()
    other, _ = run_steps(config, [noisy])
    jax.tree.map(np.testing.assert_array_equal, state["biases"], other["biases"])


def test_recomputation_changes_neither_loss_nor_gradients():
    """Mistake 6: recomputation that drops masks or gradients."""
    kept = tiny("--config.mtp.depth=1")
    batch = rows(kept, num_padding=3)
    results = {}
    for remat in ("none", "full", "dots", "kernels"):
        unroll = 2 if remat == "kernels" else 1
        config = replace(kept, model=replace(kept.model, remat=remat, scan_unroll=unroll))
        results[remat] = run_steps(config, [batch, batch])
    for remat in ("full", "dots", "kernels"):
        for a, b in zip(results["none"][1], results[remat][1], strict=True):
            for name in a:
                assert b[name] == pytest.approx(a[name], rel=1e-5), (remat, name)


def test_a_depth_that_is_switched_off_balances_nothing_and_moves_no_bias():
    config = tiny("--config.mtp.curriculum=forward", "--config.model.balance_loss_weight=0.1")
    state, (metrics,) = run_steps(config, [rows(config)])
    bias = state["biases"]["mtp"]["module"]["block"]["ffn"]["router"]["bias"]
    assert np.abs(bias[0]).max() > 0 and np.abs(bias[1]).max() == 0
    everything = tiny("--config.model.balance_loss_weight=0.1")
    _, (other,) = run_steps(everything, [rows(config)])
    extra = 0.15 * other["loss_mtp_2"] + 0.1 * 1.0  # a balanced router's balance loss is 1
    assert other["loss"] - metrics["loss"] == pytest.approx(extra, rel=0.02)


def _temporary_bytes(depth, chunk_tokens):
    shape = (depth + 1, 2, 64, 16)
    vocab = 4096
    hidden = jax.ShapeDtypeStruct(shape, jnp.float32)
    ints, ones = jax.ShapeDtypeStruct(shape[:3], jnp.int32), jax.ShapeDtypeStruct(shape[:3], jnp.float32)
    head, weights = jax.ShapeDtypeStruct((16, vocab), jnp.float32), jax.ShapeDtypeStruct((depth + 1,), jnp.float32)

    def loss(hidden, head, targets, weight, scale):
        return evaluate([Term(CrossEntropy(), hidden, head, targets, weight, scale)], chunk_tokens)[0]

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1))).lower(hidden, head, ints, ones, weights).compile()
    return compiled.memory_analysis().temp_size_in_bytes, vocab


def test_the_logits_of_no_more_than_a_chunk_exist_whatever_the_depth():
    """Mistake 7: full logits for every depth."""
    shallow, vocab = _temporary_bytes(1, 16)
    deep, _ = _temporary_bytes(8, 16)
    one_depths_logits = 2 * 64 * vocab * 4
    assert deep - shallow < one_depths_logits / 4  # seven more depths add less than a fraction of one depth's logits
    whole, _ = _temporary_bytes(1, 128)
    assert whole - shallow > one_depths_logits / 2  # the measure does see logits
