"""Several continuations of one context: read once or each by itself, the scores are the same."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax import sharding
from mtp_jax.config import MeshConfig
from mtp_jax.decoding import generation as states
from mtp_jax.decoding import shared_context
from tests.decoding.models import GQA, MLA, MOE, WINDOW, build

CONTEXT = 48


def drawn(lengths, seed=0):
    """(contexts, continuations): of each pair of lengths a context and its continuations."""
    rng = np.random.default_rng(seed)
    contexts = [rng.integers(0, 16, n) for n, _ in lengths]
    return contexts, [[rng.integers(0, 16, n) for n in each] for _, each in lengths]


def log_softmax(logits):
    top = logits.max(axis=-1, keepdims=True)
    return logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))


def one_by_one(built, contexts, continuations):
    """The scores from whole rows through the model, without caches."""
    out = []
    for context, each in zip(contexts, continuations, strict=True):
        scores = []
        for tokens in each:
            row = np.concatenate([context, tokens])
            logits = built.main_logits(row[None, :-1])[0].astype(np.float64)
            at = np.arange(len(context) - 1, len(row) - 1)
            scores.append((log_softmax(logits)[at, tokens].sum(), bool((logits[at].argmax(-1) == tokens).all())))
        out.append(scores)
    return out


# Lengths of a context and of its continuations: one token, many, as long as the context, filling the model's context.
LENGTHS = [(1, [1, 2]), (17, [1, 1, 1, 1]), (30, [3, 18, 7]), (CONTEXT, [1, 1]), (20, [29, 1, 12, 5, 6]), (9, [4])]


@pytest.mark.parametrize("model", [MLA, GQA, MOE, replace(GQA, **WINDOW)], ids=["mla", "gqa", "moe", "window"])
def test_scores_are_those_of_whole_rows(model):
    built = build(model, context=CONTEXT)
    contexts, continuations = drawn(LENGTHS)
    # The likeliest token after a context is greedy, whatever comes beside it.
    best = built.main_logits(contexts[1][None])[0, -1].argmax()
    continuations[1][2][:] = best
    done = []
    found = shared_context.score(built.decoder(), contexts, continuations, done.append)
    expected = one_by_one(built, contexts, continuations)
    for scores, wanted in zip(found, expected, strict=True):
        assert len(scores) == len(wanted)
        for (log_p, is_greedy), (wanted_log_p, wanted_greedy) in zip(scores, wanted, strict=True):
            assert log_p == pytest.approx(wanted_log_p, abs=1e-4)
            assert is_greedy == wanted_greedy
    assert found[1][2][1] and sum(done) == sum(len(each) for each in continuations)


def test_a_context_is_read_once_and_in_few_batches(monkeypatch):
    """Small batches give the same scores, and no batch's caches are larger than allowed."""
    built = build(MLA, context=CONTEXT)
    contexts, continuations = drawn(LENGTHS * 3)
    expected = shared_context.score(built.decoder(), contexts, continuations)
    batches = []
    begin = states.begin
    monkeypatch.setattr(states, "begin", lambda *args: batches.append(args[3].shape) or begin(*args))
    choices_row = 128 * 2 * (8 + 4) * 4  # slots, layers, latent and rotary key, float32
    monkeypatch.setattr(shared_context, "CACHE_BYTES", 4 * (1 + 5) * choices_row)
    found = shared_context.score(built.decoder(), contexts, continuations)
    # At most five continuations twice, then four, then two: of those, more contexts fit.
    assert [rows for rows, _ in batches] == [4, 4, 4, 8] and {slots for _, slots in batches} == {128}
    for scores, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([s for s, _ in scores], [s for s, _ in wanted], atol=1e-4)


def test_many_continuations_of_one_context_are_scored_in_parts(monkeypatch):
    built = build(MLA, context=CONTEXT)
    contexts, continuations = drawn([(20, [3] * 11 + [9, 1]), (17, [1, 2])])
    expected = shared_context.score(built.decoder(), contexts, continuations)
    sizes, batch = [], shared_context._batch

    def seen(decoder, contexts, continuations, *rest):
        sizes.extend(map(len, continuations))
        return batch(decoder, contexts, continuations, *rest)

    monkeypatch.setattr(shared_context, "_batch", seen)
    monkeypatch.setattr(shared_context, "CACHE_BYTES", (1 + 6) * 128 * 2 * (8 + 4) * 4)  # of six, and of the context
    done = []
    found = shared_context.score(built.decoder(), contexts, continuations, done.append)
    assert sorted(sizes) == [1, 2, 6, 6] and sum(done) == 15
    for scores, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([s for s, _ in scores], [s for s, _ in wanted], atol=1e-4)
    monkeypatch.setattr(shared_context, "CACHE_BYTES", 1)
    sizes.clear()
    shared_context.score(built.decoder(), contexts, continuations)
    assert max(sizes) == shared_context.FEWEST


@pytest.mark.parametrize("mesh", [{"data": 4, "tensor": 2}, {"fsdp": 2, "expert": 2, "context": 2}], ids=str)
def test_scores_are_the_same_on_a_mesh(mesh):
    built = build(replace(MOE, num_kv_heads=2), context=CONTEXT)
    contexts, continuations = drawn(LENGTHS[:5])
    expected = shared_context.score(built.decoder(), contexts, continuations)
    found = shared_context.score(built.decoder(MeshConfig(**mesh)), contexts, continuations)
    assert sharding.make_mesh(MeshConfig(**mesh)).size == len(jax.devices()) == 8
    for scores, wanted in zip(found, expected, strict=True):
        np.testing.assert_allclose([s for s, _ in scores], [s for s, _ in wanted], atol=1e-4)
        assert [g for _, g in scores] == [g for _, g in wanted]
