"""Next-latent prediction against its oracle, on a mesh, as a run, and drafting losslessly."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mtp_jax.config import Config, DataConfig, MTPConfig
from mtp_jax.decoding.drafting import draft
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.losses import evaluate
from mtp_jax.model import abstract_model, init
from mtp_jax.mtp import Scales, Text, kind_of
from mtp_jax.training.step import rows_of
from tests.decoding.models import MLA, Built, prompts_of
from tests.mtp.kinds import batch_of, small, steps, trained_and_resumed
from tests.reference import nextlat as oracle

NEXTLAT = ["--config.mtp.kind=nextlat", "--config.mtp.depth=2", "--config.mtp.nextlat.width=48"]


def test_the_loss_is_the_oracles():
    config = small(*NEXTLAT, "--config.data.sequence_length=8", "--config.data.batch_size=3")
    built, kind = abstract_model(config.architecture), kind_of(config)
    params, biases = jax.jit(lambda: init(config.architecture, 0))()
    params["mtp"] = jax.tree.map(lambda w: w + 0.3 * jax.random.normal(jax.random.key(1), w.shape), params["mtp"])
    batch = batch_of(config)
    rows = rows_of(batch, kind)
    scales = Scales(jnp.float32(1.0), jnp.array([0.5, 0.25]), jnp.float32(1.0))

    @jax.jit
    def run(params):
        model = built.merge(params, biases)
        hidden = model(rows).hidden
        total, sums = evaluate(model.terms(hidden, rows, scales, 0.0), 5)
        return hidden, model.head(), total, [s._replace(picks=None) for s in sums]

    hidden, head, total, (main, kl, latent) = run(params)
    as_float64 = lambda x: np.asarray(x, np.float64)  # noqa: E731
    mtp, embed, head = params["mtp"], as_float64(params["trunk"]["embed"]), as_float64(head)
    weights = {
        "norm": {"scale": as_float64(mtp["norm"]["scale"])},
        "layers": [as_float64(mtp[name]) for name in ("w1", "w2", "w3")],
    }
    h = as_float64(hidden[0])
    args = weights, h, lambda word: embed[word], batch["tokens"], 2
    for got, expected in zip(as_float64(hidden[1:]), oracle.hidden_states(*args), strict=True):
        valid = np.asarray(rows.weight_KBT[2]) > 0
        np.testing.assert_allclose(got[valid], expected[valid], rtol=1e-3, atol=1e-4)
    expected = oracle.losses(
        weights, h, lambda x: x @ head, lambda word: embed[word], batch["tokens"], batch["segment_ids"], 2
    )
    assert min(each["latent_count"] for each in expected) > 3
    for k, each in enumerate(expected):
        assert float(latent.value[k]) == pytest.approx(each["smooth_l1"], rel=1e-3)
        assert float(kl.value[k]) == pytest.approx(each["kl"], rel=2e-3)
        assert float(kl.num[k]) == float(latent.num[k]) == each["latent_count"]
    extra = sum(s * (e["smooth_l1"] + e["kl"]) for s, e in zip((0.5, 0.25), expected, strict=True))
    assert float(total) == pytest.approx(float(main.value[0]) + extra, rel=1e-3)


def test_the_teacher_receives_no_gradient():
    """With the next-token loss off, the latent and KL terms move the MLP and not what they are compared with."""
    config = small(*NEXTLAT, "--config.mtp.detach_decoder=true")
    built, kind = abstract_model(config.architecture), kind_of(config)
    params, biases = jax.jit(lambda: init(config.architecture, 0))()
    rows = rows_of(batch_of(config), kind)
    scales = Scales(jnp.float32(0.0), jnp.ones(2), jnp.float32(1.0))

    def loss(params):
        model = built.merge(params, biases)
        return evaluate(model.terms(model(rows).hidden, rows, scales, 0.0), 64)[0]

    grads = jax.jit(jax.grad(loss))(params)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["trunk"])) == 0.0
    assert min(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads["mtp"])) > 0.0


def test_a_mesh_of_eight_takes_the_steps_of_one_device():
    config = small(*NEXTLAT)
    batches = [batch_of(config, seed) for seed in range(3)]
    one, _ = steps(config, batches)
    eight, _ = steps(config, batches, fsdp=2, context=2, tensor=2)
    for a, b in zip(one, eight, strict=True):
        for name in ("loss", "loss_main", "loss_mtp_2", "loss_kl", "loss_latent", "grad_norm"):
            assert b[name] == pytest.approx(a[name], rel=1e-4), name


@pytest.mark.usefixtures("one_device")
def test_a_run_reports_every_depth_and_resumes(tmp_path):
    whole, halves = trained_and_resumed(small(*NEXTLAT, "--config.model.vocab_size=264"), tmp_path)
    assert [row["loss"] for row in halves] == pytest.approx([row["loss"] for row in whole], rel=1e-6)
    for name in ("loss_mtp_1", "loss_mtp_2", "accuracy_mtp_2", "agreement_mtp_1", "loss_kl", "loss_latent"):
        assert np.isfinite(whole[-1][name]), name
    assert whole[-1]["loss_main"] < whole[0]["loss_main"]


def random_model(model, mtp):
    config = Config(model=replace(model, init_std=0.4), mtp=mtp, data=DataConfig(sequence_length=60))
    return Built(config, None, *jax.jit(lambda: init(config.architecture, 5))())


@pytest.mark.parametrize("num_speculative_tokens", [1, 4])  # fewer and more than the trained depth
def test_drafts_change_nothing_but_the_number_of_passes(num_speculative_tokens):
    """Greedy text is the same; some drafts are kept and some refused."""
    mtp = MTPConfig(kind="nextlat", depth=2)
    built = random_model(replace(MLA, vocab_size=4, num_layers=1), mtp)
    decoder, prompts = built.decoder(), prompts_of([1, 2, 5, 17], 4)
    plain = decoder.generate(prompts, 40)
    drafted = decoder.generate(prompts, 40, num_speculative_tokens=num_speculative_tokens)
    for a, b in zip(plain.tokens, drafted.tokens, strict=True):
        np.testing.assert_array_equal(a, b)
    assert 0 < drafted.accepted.sum() < drafted.tested.sum()
    assert drafted.num_speculative_steps.sum() < plain.num_speculative_steps.sum()


def test_drafts_are_the_trained_roll():
    """Drafts are drawn from what `MTPModel` predicts for the text with its drafts, at the position before the last."""
    mtp = MTPConfig(kind="nextlat", depth=3)
    built = random_model(replace(MLA, vocab_size=8), mtp)
    decoder, sampler, prompts = built.decoder(), make_sampler(1.0), prompts_of([2, 5, 17], 8)
    state = decoder.start(prompts, 20, num_speculative_tokens=3, seed=1)
    keys = jax.random.split(jax.random.key(0), (3, 3))
    with jax.set_mesh(decoder.mesh):
        text = Text(state.tokens_BS, state.length_B - 1, state.recent_BWD)
        drafts = draft(decoder.architecture, decoder.network, sampler, 3, text, state.mtp_caches, keys)
    tokens, lengths = np.array(state.tokens_BS)[:, :40], np.asarray(state.length_B)
    for row, length, new in zip(tokens, lengths, np.asarray(drafts.tokens_BK), strict=True):
        row[length : length + 3] = new
    expected = built.logits(tokens)[np.arange(3), lengths - 2, 1:4]
    np.testing.assert_allclose(drafts.logits_BKV, expected, rtol=1e-4, atol=1e-4)
