"""Whole texts, sampled and speculated, have the distribution of the main model alone."""

from dataclasses import replace

import numpy as np
import pytest

from mtp_jax.decoding.samplers import make_sampler
from tests.decoding.models import MLA, build, parallel, sequential
from tests.decoding.statistics import LIKELY, count_rows, p_value
from tests.reference import decoding as oracle

NUM_BATCHES, NUM_ROWS = 2, 10_000

SMALLEST = replace(
    MLA,
    **{"vocab_size": 4, "num_layers": 1, "embed_dim": 8, "num_heads": 1, "kv_lora_rank": 4, "qk_rope_head_dim": 2},
    **{"qk_nope_head_dim": 2, "v_head_dim": 4, "ffn_dim": 8},
)


@pytest.mark.parametrize(
    ("mtp", "num_speculative_tokens", "numbers"),
    [
        (sequential(2), 2, (1.0, None, None)),
        (sequential(1), 3, (1.0, None, 0.8)),
        (parallel(2), 2, (0.7, 3, None)),
    ],
    ids=["sequential", "drafts beyond the depth", "parallel"],
)
def test_speculated_texts_have_the_distribution_of_the_main_model(mtp, num_speculative_tokens, numbers):
    """64 texts of three tokens, their exact probabilities from whole rows, 2 x 10^4 of them sampled."""
    built = build(SMALLEST, mtp, seed=6)
    prompt = [1, 3, 0]
    exact = np.ones((4, 4, 4))
    prefixes = np.array([[*prompt, a, b] for a in range(4) for b in range(4)])
    logits = built.main_logits(prefixes)[:, 2:].astype(float)
    probs = np.array([[oracle.distribution(row, *numbers) for row in rows] for rows in logits])
    for a, b, c in np.ndindex(4, 4, 4):
        of = probs[4 * a + b]
        exact[a, b, c] = of[0, a] * of[1, b] * of[2, c]
    decoder, sampler, counts, kept = built.decoder(), make_sampler(*numbers), np.zeros((4, 4, 4)), 0
    for seed in range(NUM_BATCHES):
        found = decoder.generate(
            [prompt] * NUM_ROWS, 3, sampler=sampler, num_speculative_tokens=num_speculative_tokens, seed=seed
        )
        counts += count_rows(np.array(found.tokens), 4)
        kept += found.accepted.sum(0) / found.tested.sum(0) / NUM_BATCHES
    assert (exact > 0).sum() > 8 and (kept[:2] > 0.05).all() and (kept[:2] < 0.95).all()
    assert p_value(counts, exact) > LIKELY
    assert p_value(counts, (exact + 0.05 / 64) / 1.05) < LIKELY  # a mistake of 5 % of the mass is seen
