"""Texts do not depend on a draft vocabulary, a Markov head and a confidence stop: greedy ones, and the distribution of
sampled ones.
"""

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.decoding import drafting
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.mtp import Text
from tests.decoding.models import GQA, build, markov, parallel, prompts_of, sequential
from tests.decoding.statistics import LIKELY, count_rows, p_value
from tests.decoding.test_sampled_texts import SMALLEST
from tests.reference import decoding as oracle


class Options(NamedTuple):
    """Settings of drafting. thresholds: values of `min_confidence`, which share one compiled program."""

    mtp: Any
    num_speculative_tokens: int
    vocabulary: list[int] | None = None
    thresholds: tuple[float | None, ...] = (None,)


# ---------------------------------------------------------------------------------------------------------------
# Greedy texts

NUM_NEW = 100
MODEL = replace(GQA, vocab_size=8)
HALF = [0, 2, 3, 6]
GREEDY_CASES = {
    "markov": Options(markov(2), 2),
    "vocabulary, sequential": Options(sequential(2), 3, HALF),
    "vocabulary, parallel": Options(parallel(2), 2, HALF),
    "stop, sequential": Options(sequential(2), 2, None, (0.0, 0.3, 1.0)),
    "all": Options(markov(2), 2, HALF, (0.0, 0.3, 1.0)),
}


@functools.cache
def plain():
    prompts = prompts_of([1, 2, 6, 13], 8)
    return prompts, build(MODEL, blocks=0.3).decoder().generate(prompts, NUM_NEW).tokens


@pytest.mark.parametrize("name", GREEDY_CASES)
def test_greedy_texts_are_the_plain_ones(name):
    case, (prompts, expected) = GREEDY_CASES[name], plain()
    decoder, tested = build(MODEL, case.mtp, blocks=0.3).decoder(draft_vocabulary=case.vocabulary), []
    for threshold in case.thresholds:
        found = decoder.generate(
            prompts, NUM_NEW, num_speculative_tokens=case.num_speculative_tokens, min_confidence=threshold
        )
        for tokens, wanted in zip(found.tokens, expected, strict=True):
            np.testing.assert_array_equal(tokens, wanted)
        tested.append(found.tested.sum(0))
        assert threshold == 1.0 or 0 < found.accepted.sum() < found.tested.sum()
        assert threshold != 1.0 or found.tested.sum() == 0 and found.num_forward_passes == NUM_NEW
    assert len(tested) == 1 or tested[0][1] > tested[1][1] > 0  # some drafts were stopped, and not all


# ---------------------------------------------------------------------------------------------------------------
# Sampled texts

NUM_BATCHES, NUM_ROWS, PROMPT = 2, 10_000, [1, 3, 0]
PLAIN, NUCLEUS = (1.0, None, None), (1.0, None, 0.8)
SAMPLED_CASES = {
    "vocabulary, sequential": (Options(sequential(2), 2, [0, 2, 3]), NUCLEUS),
    "stop, sequential": (Options(sequential(2), 2, None, (0.3,)), PLAIN),
    "all": (Options(markov(2), 2, [0, 2, 3], (0.0, 0.3, 1.0)), PLAIN),
}


@functools.cache
def exact(numbers):
    """[4, 4, 4]: probabilities of all texts of three tokens, from whole rows of the main model."""
    prefixes = np.array([[*PROMPT, a, b] for a in range(4) for b in range(4)])
    logits = build(SMALLEST, seed=6).main_logits(prefixes)[:, 2:].astype(float)
    probs = np.array([[oracle.distribution(row, *numbers) for row in rows] for rows in logits])
    out = np.ones((4, 4, 4))
    for a, b, c in np.ndindex(4, 4, 4):
        of = probs[4 * a + b]
        out[a, b, c] = of[0, a] * of[1, b] * of[2, c]
    return out


@pytest.mark.parametrize("name", SAMPLED_CASES)
def test_sampled_texts_have_the_distribution_of_the_main_model(name):
    case, numbers = SAMPLED_CASES[name]
    decoder, tested = build(SMALLEST, case.mtp, seed=6).decoder(draft_vocabulary=case.vocabulary), []
    for threshold in case.thresholds:
        counts, kept, seen = np.zeros((4, 4, 4)), np.zeros(2, int), np.zeros(2, int)
        for seed in range(NUM_BATCHES):
            found = decoder.generate(
                [PROMPT] * NUM_ROWS,
                3,
                sampler=make_sampler(*numbers),
                num_speculative_tokens=case.num_speculative_tokens,
                seed=seed,
                min_confidence=threshold,
            )
            counts += count_rows(np.array(found.tokens), 4)
            kept, seen = kept + found.accepted.sum(0), seen + found.tested.sum(0)
        value = p_value(counts, exact(numbers))
        assert value > LIKELY, (threshold, value)
        assert p_value(counts, (exact(numbers) + 0.05 / 64) / 1.05) < LIKELY  # a mistake of 5 % of the mass is seen
        assert threshold == 1.0 or 0.05 * seen[0] < kept[0] < 0.95 * seen[0]
        tested.append(seen.tolist())
    assert len(tested) == 1 or tested[0][1] > tested[1][1] > tested[2][1] == tested[2][0] == 0


# ---------------------------------------------------------------------------------------------------------------
# Drafts

_draft = jax.jit(drafting.draft, static_argnums=(0, 3))


def test_drafts_of_a_vocabulary_are_those_of_training_without_the_other_tokens():
    """And their confidence is the probability of the likeliest token, whatever the temperature."""
    built, prompts = build(MODEL, markov(2), context=60, seed=5), prompts_of([2, 5, 17], 8)
    decoder, sampler = built.decoder(draft_vocabulary=HALF), make_sampler(0.7)
    state = decoder.start(prompts, 20, num_speculative_tokens=2, seed=1)
    keys = jax.random.split(jax.random.key(0), (3, 2))
    with jax.set_mesh(decoder.mesh):
        text = Text(state.tokens_BS, state.length_B - 1, state.recent_BWD)
        drafts = _draft(decoder.architecture, decoder.network, sampler, 2, text, state.mtp_caches, keys)
    tokens, lengths = np.array(state.tokens_BS)[:, :40], np.asarray(state.length_B)
    for row, length, new in zip(tokens, lengths, np.asarray(drafts.tokens_BK), strict=True):
        row[length : length + 2] = new
    expected = built.logits(tokens)[np.arange(3), lengths - 2, 1:]
    np.testing.assert_allclose(np.asarray(drafts.logits_BKV)[..., HALF], expected[..., HALF] / 0.7, rtol=0, atol=1e-4)
    others = [v for v in range(8) if v not in HALF]
    assert np.isneginf(np.asarray(drafts.logits_BKV)[..., others]).all()
    assert np.isin(drafts.tokens_BK, HALF).all()
    np.testing.assert_allclose(drafts.confidence_BK, jax.nn.softmax(expected[..., HALF]).max(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("ids", [[], [3, 2], [1, 1], [-1, 2], [2, 8], [[0, 1]], [0.5, 1.0]], ids=str)
def test_a_draft_vocabulary_of_other_than_increasing_ids_is_refused(ids):
    with pytest.raises(UserError, match="^draft_vocabulary=.*: must be increasing token ids from 0 to 7"):
        build(MODEL, sequential(1)).decoder(draft_vocabulary=ids)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_a_confidence_that_is_no_probability_is_refused(value):
    with pytest.raises(UserError, match=f"^min_confidence={value}: must lie between 0 and 1"):
        build(MODEL, sequential(1)).decoder().generate([[1]], 2, num_speculative_tokens=1, min_confidence=value)
