"""Token order prediction against its oracle, on a mesh, and as a run."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import load_config
from mtp_jax.losses import evaluate
from mtp_jax.model import abstract_model, init
from mtp_jax.mtp import Scales, kind_of
from mtp_jax.mtp.top import FURTHEST, order_targets
from mtp_jax.training.step import rows_of
from tests.mtp.kinds import batch_of, small, steps, trained_and_resumed
from tests.reference import top as oracle

TOP = ["--config.mtp.kind=top", "--config.mtp.top.window=6", "--config.model.vocab_size=8"]


def test_scores_are_those_of_each_words_nearest_occurrence():
    rng, window = np.random.default_rng(0), 5
    tokens = rng.integers(0, 6, (3, 20))
    segments = np.array([[1] * 9 + [2] * 11, [1] * 3 + [2] * 3 + [3] * 14, [1] * 14 + [0] * 6])
    words, probs = (np.asarray(x) for x in order_targets(jnp.asarray(tokens), jnp.asarray(segments), window))
    for b in range(3):
        for i in range(20 - window):
            scores = oracle.scores(tokens[b], segments[b], i, window) if segments[b, i] else {}
            weights = {word: np.exp(score - window) for word, score in scores.items()}
            expected = {word: weight / sum(weights.values()) for word, weight in weights.items()}
            got = {int(w): p for w, p in zip(words[b, i], probs[b, i], strict=True) if p > 0}
            assert got == pytest.approx(expected, rel=1e-5), (b, i)


@pytest.mark.parametrize("chunk", [3, 1000])
def test_the_loss_is_the_oracles(chunk):
    config = small(*TOP)
    built, kind = abstract_model(config.architecture), kind_of(config)
    params, biases = jax.jit(lambda: init(config.architecture, 0))()
    params["mtp"]["unembed"] = 0.5 * jax.random.normal(jax.random.key(1), params["mtp"]["unembed"].shape)
    batch = batch_of(config)
    rows = rows_of(batch, kind)
    scales = Scales(jnp.float32(1.0), jnp.zeros(0), jnp.float32(0.5))

    @jax.jit
    def run(params):
        model = built.merge(params, biases)
        hidden = model(rows).hidden
        terms = model.terms(hidden, rows, scales, 0.0)
        total, sums = evaluate(terms, chunk)
        return hidden, total, [s.value for s in sums], [s.num for s in sums]

    hidden, total, values, nums = run(params)
    unembed = np.asarray(params["mtp"]["unembed"], np.float64)
    expected, count = oracle.top_loss_sum(
        np.asarray(hidden[0], np.float64), unembed, batch["tokens"], batch["segment_ids"], 6, hidden.shape[2]
    )
    assert float(values[1][0]) == pytest.approx(expected, rel=1e-4)
    assert float(nums[1][0]) == count > 30
    assert float(total) == pytest.approx(float(values[0][0]) + 0.5 * expected, rel=1e-4)


def test_a_mesh_of_eight_takes_the_steps_of_one_device():
    config = small(*TOP)
    batches = [batch_of(config, seed) for seed in range(3)]
    one, _ = steps(config, batches)
    eight, _ = steps(config, batches, fsdp=2, expert=2, tensor=2)
    for a, b in zip(one, eight, strict=True):
        for name in ("loss", "loss_main", "loss_top", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name


@pytest.mark.usefixtures("one_device")
def test_a_run_trains_both_heads_reports_them_and_resumes(tmp_path):
    whole, halves = trained_and_resumed(small(*TOP, "--config.model.vocab_size=264"), tmp_path)
    assert [row["loss"] for row in halves] == pytest.approx([row["loss"] for row in whole], rel=1e-6)
    assert whole[-1]["loss_top"] < whole[0]["loss_top"] and whole[-1]["loss_main"] < whole[0]["loss_main"]
    assert "loss_mtp_1" not in whole[0] and whole[0]["mtp_lambda"] == 1.0


def test_windows_beyond_float32_need_no_more_lookahead():
    config = load_config("configs/tiny.py", ["--config.mtp.kind=top", "--config.mtp.top.window=4096"])
    assert kind_of(config).lookahead == FURTHEST - 1
    assert np.exp(np.float32(-FURTHEST)) == 0 < np.exp(np.float32(1 - FURTHEST))
