"""mtp_jax.load of a released folder computes what torch computes, at every position and depth."""

import numpy as np
import pytest

import mtp_jax
from tests.interop import hf_models
from tests.interop.hf_models import CASES, tokens_of

TOLERANCE = 2e-5  # absolute, fp32 against fp32; the logits go up to 6, and each side is 1e-5 from float64
ROPE_IN_TWO_STYLES = ["deepseek_v3", "deepseek_v2", "glm4_moe", "mimo", "llama3_tied", "llama_linear"]
STYLES = [(name, "released") for name in CASES] + [(name, "new") for name in ROPE_IN_TWO_STYLES]


@pytest.fixture(scope="module", autouse=True)
def torch_is_there():
    hf_models.needs_torch()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(reference, our model) by the arguments of `build`, each made once."""
    cache = {}

    def get(name, **how):
        how = {"style": "released"} | how
        key = (name, *sorted(how.items()))
        if key not in cache:
            reference = hf_models.build(name, tmp_path_factory.mktemp(name), **how)
            cache[key] = reference, mtp_jax.load(str(reference.folder), compute_dtype="float32")
        return cache[key]

    return get


def worst(ours, theirs):
    """Largest difference a depth."""
    return np.abs(np.asarray(ours) - theirs).max((0, 1, 3))


@pytest.mark.parametrize("name, style", STYLES)
def test_logits(built, name, style):
    reference, lm = built(name, style=style)
    tokens = tokens_of(name)
    ours, theirs = np.asarray(lm.logits(tokens)), reference.logits(tokens)
    assert ours.shape == theirs.shape and ours.dtype == np.float32
    difference = worst(ours, theirs)
    assert (difference < TOLERANCE).all(), f"largest difference of depth 0, 1, ...: {difference}"


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens(built, name):
    """Both continue two prompts with the same twelve tokens. Ours is padded to one length, which compiles once."""
    reference, lm = built(name)
    text, length = tokens_of(name), 9
    prompts = text[:, :length].copy()
    text[:, length:] = 0
    for i in range(length, length + 12):
        text[:, i] = np.asarray(lm.logits(text))[:, i - 1, 0].argmax(-1)
    for prompt, row in zip(prompts, text, strict=True):
        assert row[length : length + 12].tolist() == reference.greedy(prompt, 12)


@pytest.mark.parametrize("name", ["deepseek_v3", "mimo"])
def test_sharded_folder(built, name):
    """Files in three parts, neighbouring tensors in different ones, are the same model to the last bit."""
    (_, whole), (_, parts) = built(name), built(name, shards=3)
    tokens = tokens_of(name)
    np.testing.assert_array_equal(np.asarray(whole.logits(tokens)), np.asarray(parts.logits(tokens)))


@pytest.mark.parametrize("name", ["deepseek_v3", "qwen2_tied"])
def test_bfloat16_folder(built, name):
    """Read in bfloat16 and computed in float32, it is the model of the rounded weights, not a rounded model."""
    reference, lm = built(name, dtype="bfloat16")
    tokens = tokens_of(name)
    difference = worst(lm.logits(tokens), reference.logits(tokens))
    assert (difference < TOLERANCE).all(), f"largest difference of depth 0, 1, ...: {difference}"


@pytest.mark.parametrize("name", ["moonlight", "llama3_tied", "mimo"])
def test_bfloat16_compute(built, name):
    """The folder's own dtype, which load takes by default, stays within what 8 bits of mantissa allow.

    The median over the positions: rounding sends a few tokens to other experts, and those are far off. So does torch's.
    """
    reference, _ = built(name, dtype="bfloat16")
    lm, tokens = mtp_jax.load(str(reference.folder)), tokens_of(name)
    ours, theirs = np.asarray(lm.logits(tokens)), reference.logits(tokens)
    assert lm.config.model.compute_dtype == "bfloat16" and ours.dtype == np.float32
    assert lm.decoder.context == lm.config.data.sequence_length == 128  # of the folder, not a default of ours
    error = np.linalg.norm(ours - theirs, axis=-1) / np.linalg.norm(theirs, axis=-1)
    median = np.median(error, (0, 1))
    assert (median > 1e-3).all() and (median < 0.03).all(), f"relative error of depth 0, 1, ...: {median}"


@pytest.mark.parametrize("mistake", [{"swap_halves": True}, {"output_norm": False}], ids=lambda m: next(iter(m)))
@pytest.mark.parametrize("name", ["deepseek_v3", "moonlight", "glm4_moe", "mimo", "mimo_v2_flash"])
def test_a_mistake_would_be_seen(built, name, mistake):
    """Against a reference with the mistake, depth 0 agrees and every other depth is far off."""
    reference, lm = built(name)
    tokens = tokens_of(name)
    difference = worst(lm.logits(tokens), reference.logits(tokens, **mistake))
    assert difference[0] < TOLERANCE and (difference[1:] > 1000 * TOLERANCE).all(), difference


def test_recycled_hidden_state(built):
    """Depth 2 reads depth 1's state before its output norm, as training passes it on; serving engines differ."""
    reference, lm = built("moonlight")
    tokens = tokens_of("moonlight")
    difference = worst(lm.logits(tokens), reference.logits(tokens, recycled="after_norm"))
    assert (difference[:2] < TOLERANCE).all() and difference[2] > 1000 * TOLERANCE, difference


def test_speculative_text_beyond_the_window_is_the_plain_text(built):
    """Texts of twelve windows, drafted by every depth, are what the main model writes alone and what torch writes."""
    name = "mimo_v2_flash"
    reference, lm = built(name)
    prompts = [tokens_of(name)[0, :3].tolist(), tokens_of(name)[1].tolist()]
    plain = lm.generate(prompts, max_new_tokens=60, temperature=0.0, speculative=False)
    drafted = lm.generate(prompts, max_new_tokens=60, temperature=0.0, speculative=True)
    assert len(drafted.acceptance) == reference.case.depth and plain.acceptance == []
    for prompt, alone, found in zip(prompts, plain.tokens, drafted.tokens, strict=True):
        assert len(alone) == 60 and found.tolist() == alone.tolist()
        assert alone[:30].tolist() == reference.greedy(prompt, 30)


def test_other_batches_and_lengths(built):
    """One row is computed as in a batch, and a prefix as in the whole text."""
    _, lm = built("deepseek_v3")
    tokens = tokens_of("deepseek_v3")
    whole, part = np.asarray(lm.logits(tokens)), np.asarray(lm.logits(tokens[1:, :15]))
    assert part.shape == (1, 14, 2, 96)
    np.testing.assert_allclose(part[0], whole[1, :14], atol=TOLERANCE, rtol=0)
