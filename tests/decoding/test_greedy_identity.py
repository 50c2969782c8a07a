"""Greedy text is the same, token for token, with every source of drafts: 200 new tokens each, float32."""

import functools
import itertools
from dataclasses import replace

import jax
import numpy as np
import pytest

from mtp_jax.config import LocalConfig, UserError
from tests.decoding.models import EXPERTS, GQA, MLA, MOE, WINDOW, build, parallel, prompts_of, sequential

NUM_NEW = 200
MODELS = {"mla": MLA, "mla moe": MOE, "gqa": GQA, "gqa moe": replace(GQA, **EXPERTS)}
MODELS["mla window"] = replace(MLA, local=LocalConfig(window=3))
MODELS["gqa window"] = replace(GQA, **WINDOW)
MODELS["mla moe"] = replace(MOE, num_layers=1, num_dense_layers=0)  # experts take long to compile
MODELS["gqa moe"] = replace(MODELS["gqa moe"], num_layers=1, num_dense_layers=0)
STRATEGIES = {"sequential": sequential, "parallel": parallel}
LENGTHS = [1, 2, 6, 33, 12]
kept: dict[tuple[str, int], int] = {}


tests_run = itertools.count(1)


@pytest.fixture(autouse=True)
def programs_dropped_here():
    """Hardly any is used twice, and there are hundreds."""
    yield
    if next(tests_run) % 8 == 0:
        jax.clear_caches()


@functools.cache
def plain(name):
    """Text of the main model by itself after five prompts, and after the fourth alone."""
    built = build(MODELS[name], blocks=0.3)
    decoder, prompts = built.decoder(), prompts_of(LENGTHS, 16)
    found = decoder.generate(prompts, NUM_NEW)
    assert found.num_forward_passes == NUM_NEW and found.acceptance == []
    assert len({tuple(tokens) for tokens in found.tokens}) > 1  # not five times the same
    (alone,) = decoder.generate(prompts[3:4], NUM_NEW).tokens
    np.testing.assert_array_equal(alone, found.tokens[3])
    return prompts, found.tokens


def assert_identical(name, mtp, num_speculative_tokens, alone=False):
    prompts, expected = plain(name)
    decoder = build(MODELS[name], mtp, blocks=0.3).decoder()
    found = decoder.generate(prompts, NUM_NEW, num_speculative_tokens=num_speculative_tokens)
    for tokens, wanted in zip(found.tokens, expected, strict=True):
        np.testing.assert_array_equal(tokens, wanted)
    if alone:
        (tokens,) = decoder.generate(prompts[3:4], NUM_NEW, num_speculative_tokens=num_speculative_tokens).tokens
        np.testing.assert_array_equal(tokens, expected[3])
    for k, num in enumerate(found.accepted.sum(axis=0)):
        kept[mtp.kind, k] = kept.get((mtp.kind, k), 0) + int(num)
    return found


# Every depth of either kind, every model with both kinds. With a prompt alone, which is one more program, once a kind.
CASES = [
    *(("mla", "sequential", depth, depth == 4) for depth in (1, 2, 3, 4)),
    *(("mla", "parallel", 3, False), ("mla moe", "sequential", 2, False), ("mla moe", "parallel", 1, False)),
    *(("gqa", "sequential", 1, False), ("gqa", "parallel", 2, True), ("gqa moe", "sequential", 1, False)),
    *(("gqa moe", "parallel", 2, False), ("mla window", "sequential", 2, False), ("mla window", "parallel", 1, False)),
    *(("gqa window", "sequential", 2, False), ("gqa window", "parallel", 4, False)),
]


@pytest.mark.parametrize(("name", "kind", "depth", "alone"), CASES)
def test_speculated_text_is_the_plain_text(name, kind, depth, alone):
    """Five prompts of unequal lengths as one batch, and one of them alone."""
    found = assert_identical(name, STRATEGIES[kind](depth), depth, alone)
    assert found.num_speculative_steps.sum() <= NUM_NEW * len(LENGTHS) and found.tested[:, 0].min() > 0


@pytest.mark.parametrize(
    ("mtp", "num_speculative_tokens"),
    [(sequential(3), 1), (sequential(2), 5), (sequential(2, shared_depths=True), 4), (parallel(3), 2)],
    ids=["fewer", "more", "more of a shared one", "fewer heads"],
)
def test_any_draft_length_gives_the_plain_text(mtp, num_speculative_tokens):
    assert_identical("mla", mtp, num_speculative_tokens)


@pytest.mark.parametrize(
    "conventions",
    [
        {"recycled_hidden": "after_norm", "shared_depths": True},
        {"family": "mimo_v2_flash", "concat_order": "hidden_first"},
    ],
    ids=lambda fields: next(iter(fields.values())),
)
def test_any_convention_gives_the_plain_text(conventions):
    assert_identical("gqa", sequential(2, **conventions), 3)


def test_a_model_with_extra_depths_writes_plainly_what_the_next_token_model_writes():
    prompts, expected = plain("mla")
    for mtp in (sequential(2), parallel(2)):
        found = build(MODELS["mla"], mtp, blocks=0.3).decoder().generate(prompts, NUM_NEW)
        for tokens, wanted in zip(found.tokens, expected, strict=True):
            np.testing.assert_array_equal(tokens, wanted)


def test_drafts_were_kept_at_every_place():
    """Or the tests above would have shown nothing. Random models agree by chance."""
    if len(kept) < 8:
        pytest.skip("only some of this file's tests ran")
    assert all(kept[kind, k] > 0 for kind, most in (("sequential", 4), ("parallel", 1)) for k in range(most)), kept


def test_what_a_model_cannot_draft_is_one_clear_line():
    cases = {
        (None, 1): ["speculative", "mtp.kind=none", "plainly"],
        (parallel(2), 3): ["num_speculative_tokens=3", "2 parallel heads", "at most 2"],
        (sequential(2), -1): ["num_speculative_tokens=-1", "at least 0"],
    }
    for (mtp, num_speculative_tokens), words in cases.items():
        with pytest.raises(UserError) as caught:
            build(MODELS["mla"], mtp).decoder().generate([[1, 2]], 5, num_speculative_tokens=num_speculative_tokens)
        assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
