"""Decoding over caches against whole rows without any: main model, drafts, steps, and the distribution of texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mtp_jax.config import LocalConfig, MeshConfig, RopeConfig, UserError, YarnConfig, conventions
from mtp_jax.decoding import drafting
from mtp_jax.decoding import generation as states
from mtp_jax.decoding.generator import Generation, Generator
from mtp_jax.decoding.inference_model import empty_caches, run_main
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.decoding.verify import Verdict
from mtp_jax.kernels.device import pretend
from mtp_jax.layers.attention import attention_of
from mtp_jax.layers.cache import slots_at, write
from mtp_jax.layers.spec import layer_specs
from mtp_jax.mtp import Text
from tests.decoding.models import EXPERTS, GQA, MLA, MOE, WINDOW, build, markov, parallel, prompts_of, sequential
from tests.reference import decoding as oracle

ONE_MOE = replace(MOE, num_layers=1, num_dense_layers=0)  # experts take long to compile
YARN = RopeConfig(theta=100.0, yarn=YarnConfig(factor=4.0, original_length=16, mscale=0.7, mscale_all_dim=1.0))
QWEN = replace(GQA, qk_norm=True, qkv_bias=True, rotary_fraction=0.5)
MODELS = {
    "mla": MLA,
    "mla_q_lora_moe": replace(MOE, q_lora_rank=6),
    "mla_yarn": replace(MLA, rope=YARN),
    "gqa_qwen": QWEN,
    "mla_window": replace(MLA, local=LocalConfig(window=4, sinks=True)),
    "gqa_window": replace(GQA, **WINDOW),
    "gqa_moe_tied": replace(GQA, **EXPERTS, tie_embeddings=True),
}


def assert_close(found, expected, what=None):
    """Within 1e-5 of the largest number."""
    found, expected = np.asarray(found), np.asarray(expected)
    assert found.shape == expected.shape
    assert np.abs(found - expected).max(initial=0) <= 1e-5 * max(1.0, np.abs(expected).max(initial=0)), what


# ---------------------------------------------------------------------------------------------------------------
# The main model over caches


@pytest.mark.parametrize("name", MODELS)
def test_every_step_over_caches_equals_the_row_without_them(name):
    """One token at a time and three at a time, in rows that stand at different positions."""
    built = build(MODELS[name])
    lag_B, length, num_slots = np.array([0, 5, 2]), 18, 32
    tokens = np.array(prompts_of([length] * 3, built.config.model.vocab_size))
    expected, network = built.main_logits(tokens), built.decoder().network

    @jax.jit
    def step(tokens_BT, positions_BT, caches):
        main, caches = run_main(network, tokens_BT, slots_at(positions_BT, num_slots), caches)
        return network.logits(network.final_norm(main.hidden)), caches

    for size in (1, 3):
        caches, _ = empty_caches(built.config.architecture, network, 0, 3, num_slots)
        checked = np.zeros((3, length), bool)
        for first in range(0, length + max(lag_B) + size, size):
            positions = first + np.arange(size) - lag_B[:, None]
            inside = (positions >= 0) & (positions < length)
            at = np.where(inside, positions, 0)
            logits, caches = step(np.take_along_axis(tokens, at, axis=1), positions, caches)
            rows = np.broadcast_to(np.arange(3)[:, None], at.shape)[inside]
            assert_close(np.asarray(logits)[inside], expected[rows, at[inside]], (size, first))
            checked[rows, at[inside]] = True
        assert checked.all()


def test_what_stands_before_the_row_or_beyond_its_room_is_written_nowhere():
    """And never to one slot twice: which of two entries would win is not defined."""
    slots = slots_at(jnp.array([[-2, -1, 0], [3, 4, 5]]), 5).padded(2)
    assert all(len(set(row)) == 5 for row in np.asarray(slots.slots_BT).tolist())
    entries = 1.0 + jnp.arange(10.0).reshape(2, 5, 1)
    written = write(jnp.zeros((2, 5, 1)), entries, slots.slots_BT)[..., 0]
    np.testing.assert_array_equal(written, [[3, 0, 0, 0, 0], [0, 0, 0, 6, 7]])
    assert slots.positions_BT.min() == 0 and slots.num_visible == 5


@pytest.mark.parametrize("platform", ["cpu", "gpu"])  # where the projection is not split
@pytest.mark.parametrize("name", ["mla", "mla_q_lora_moe", "mla_yarn"])
def test_absorbed_and_expanded_latents_give_the_same(name, platform):
    built = build(MODELS[name], seed=3)
    config, attention = built.config.model, built.decoder().network.blocks[0].attention
    rng = np.random.default_rng(0)
    q_BTHQ = rng.normal(size=(2, 3, config.num_heads, config.qk_nope_head_dim + config.qk_rope_head_dim))
    seen_BSW = rng.normal(size=(2, 20, config.kv_lora_rank + config.qk_rope_head_dim))
    last_BT, key_BS = jnp.array([[0, 7, 19], [4, 5, 6]]), jnp.arange(20)[None]
    args = *(jnp.asarray(x, jnp.float32) for x in (q_BTHQ, seen_BSW)), attention.kv_b[...], last_BT, key_BS
    with pretend(platform):
        assert_close(attention._absorbed(*args), attention._expanded(*args))


@pytest.mark.parametrize(
    ("rank", "nope", "rotary", "value"), [(512, 128, 64, 128), (8, 4, 4, 6), (64, 8, 8, 8), (16, 32, 8, 32)]
)
def test_the_cheaper_form_is_taken(rank, nope, rotary, value):
    """By the multiplications for each entry that is seen: a head's scores and values on latents, or the up-projection
    of the entry and then a head's scores and values on that."""
    model = replace(
        *(MLA,), kv_lora_rank=rank, qk_nope_head_dim=nope, qk_rope_head_dim=rotary, v_head_dim=value, num_heads=1
    )
    attention = build_attention(model)
    for num in (1, 2, 5, 20, 100, 170, 171, 500, 5000):
        absorbed = num * ((rank + rotary) + rank)
        expanded = rank * (nope + value) + num * ((nope + rotary) + value)
        assert attention._absorbs(num) == (absorbed <= expanded), num


def build_attention(model):
    """Of the first layer, without weights."""
    spec = layer_specs(model, 1)[0].attention
    return jax.eval_shape(lambda: attention_of(model)(model, spec, nnx.Rngs(params=jax.random.key(0))))


def test_a_single_token_never_expands_the_latents_of_deepseek():
    """That would be H (N + V) numbers for each of the tokens before, and 128 heads."""
    deepseek = replace(MLA, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
    attention = build_attention(deepseek)
    assert attention._absorbs(1) and attention._absorbs(5) and not attention._absorbs(512)


@pytest.mark.parametrize("mtp", [sequential(2), parallel(2)], ids=["sequential", "parallel"])
def test_a_prompt_read_in_pieces_is_the_prompt_read_at_once(mtp, monkeypatch):
    """Caches of the main model and of the depths, and the window of hidden states; at once expands the latents."""
    decoder = build(MOE, mtp).decoder()
    lengths = [19, 2, 40, 1]
    prompts, found = prompts_of(lengths, 16), {}
    for chunk in (7, 64):
        monkeypatch.setattr(states, "PROMPT_CHUNK", chunk)
        found[chunk] = jax.device_get(decoder.start(prompts, 5, num_speculative_tokens=2, seed=0)._replace(keys_B=None))
    pieces, whole = found[7], found[64]
    for b, length in enumerate(lengths):
        for one, other in zip(pieces.caches, whole.caches, strict=True):
            assert_close(one[b, : length - 1], other[b, : length - 1])
        for k, (one, other) in enumerate(zip(pieces.mtp_caches, whole.mtp_caches, strict=True)):
            known = max(0, length - 1 - k) if mtp.kind == "sequential" else length - 1  # the token at i + k is known
            assert_close(one[b, :known], other[b, :known], (b, k))
        window = whole.recent_BWD.shape[1]
        inside = min(window, length - 1)
        assert_close(pieces.recent_BWD[b, window - inside :], whole.recent_BWD[b, window - inside :])
    assert np.abs(whole.caches[0][2, :39]).min(axis=-1).max() > 0  # there is something in them


@pytest.mark.parametrize("chunk", [2, 16])
def test_a_ring_holds_what_the_window_sees_however_a_prompt_is_read(chunk, monkeypatch):
    """Pieces shorter and longer than the window, and longer than the ring; prompts that end at different places."""
    built = build(replace(GQA, **WINDOW), sequential(2, window=5))
    monkeypatch.setattr(states, "PROMPT_CHUNK", chunk)
    decoder, prompts = built.decoder(), prompts_of([40, 1, 19, 33], 16)
    state = decoder.start(prompts, 30, num_speculative_tokens=2)
    near = [cache.k_BSGQ.shape[1] for cache in (state.caches[0], state.caches[2], *state.mtp_caches)]
    assert near == [5 + 2 * 3] * 4 and state.caches[1].k_BSGQ.shape[1] >= 70
    for num_speculative_tokens in (0, 2):
        found = decoder.generate(prompts, 30, num_speculative_tokens=num_speculative_tokens).tokens
        for prompt, tokens in zip(prompts, found, strict=True):
            row = np.concatenate([prompt, tokens])
            logits = built.main_logits(row[None])[0, len(prompt) - 1 : -1]
            best = np.take_along_axis(logits, tokens[:, None], axis=1)[:, 0]
            assert (best >= logits.max(axis=1) - 1e-4).all()


def test_a_row_of_a_batch_is_written_as_it_is_alone():
    """Prompts of unequal lengths: the same tokens, and the same drafts kept."""
    decoder = build(ONE_MOE, sequential(2), seed=1).decoder()
    prompts = prompts_of([3, 30, 1, 11], 16)
    together = decoder.generate(prompts, 30, num_speculative_tokens=2)
    for b, prompt in enumerate(prompts):
        alone = decoder.generate([prompt], 30, num_speculative_tokens=2)
        np.testing.assert_array_equal(together.tokens[b], alone.tokens[0])
        if len(prompt) > 1:  # of one token there is nothing to draft from at first: chance decides
            np.testing.assert_array_equal(together.tested[b], alone.tested[0])
            np.testing.assert_array_equal(together.accepted[b], alone.accepted[0])


# ---------------------------------------------------------------------------------------------------------------
# The drafts


TRAINED = {  # strategy, drafts per step
    "sequential": (sequential(3), 3),
    "hidden first, before norm, chain of the decoder": (
        sequential(3, concat_order="hidden_first", decoder_hidden="before_norm", chain="decoder"),
        3,
    ),
    "main norm, recycled after norm": (sequential(2, output_norm="main", recycled_hidden="after_norm"), 2),
    "fewer drafts than depths": (sequential(3), 2),
    "more drafts than depths": (sequential(2), 4),
    "more drafts than shared depths": (sequential(2, shared_depths=True, recycled_hidden="after_norm"), 4),
    "parallel": (parallel(3), 3),
    "markov": (markov(2), 2),
}
_draft = jax.jit(drafting.draft, static_argnums=(0, 3))


@pytest.mark.parametrize("name", TRAINED)
def test_drafts_equal_the_trained_depths_predictions_after_any_step(name):
    """Depth k at the position before the last, its hidden state from depth k - 1 and the newest draft read: as
    `MTPModel` computes it of the text with its drafts. In every step, after drafts kept and drafts refused."""
    mtp, num_speculative_tokens = TRAINED[name]
    model = replace(MOE, num_dense_layers=0) if name == "sequential" else GQA if name == "parallel" else MLA
    model = replace(model, vocab_size=4, num_layers=2 if mtp.kind == "parallel" else 1)
    built = build(model, mtp, context=60, seed=5)
    decoder, sampler = built.decoder(), make_sampler(1.0)
    prompts = prompts_of([1, 2, 5, 17], 4)  # the last one longer than the window of positions that drafting runs again
    state, num_checked = decoder.start(prompts, 50, num_speculative_tokens=num_speculative_tokens, seed=1), 0
    for turn in range(7):
        keys = jax.random.split(jax.random.key(turn), (len(prompts), num_speculative_tokens))
        with jax.set_mesh(decoder.mesh):
            read = Text(state.tokens_BS, state.length_B - 1, state.recent_BWD)
            drafts = _draft(
                decoder.architecture, decoder.network, sampler, num_speculative_tokens, read, state.mtp_caches, keys
            )
        text, lengths = np.array(state.tokens_BS)[:, :70], np.asarray(state.length_B)
        for row, length, new in zip(text, lengths, np.asarray(drafts.tokens_BK), strict=True):
            row[length : length + num_speculative_tokens] = new
        rows = np.flatnonzero(lengths > 1)  # of one token there is no position before the last
        expected = built.logits(text)[rows, lengths[rows] - 2, 1 : num_speculative_tokens + 1]
        assert_close(drafts.logits_BKV[rows, : mtp.depth], expected, turn)
        num_checked += len(rows)
        state = decoder.write(state, 1, sampler=sampler)
    assert num_checked >= 27
    tested, accepted = np.asarray(state.counts.tested_BK), np.asarray(state.counts.accepted_BK)
    assert (accepted.sum(0)[:2] > 0).all() and (accepted.sum(0)[:2] < tested.sum(0)[:2]).all(), (tested, accepted)


def test_drafts_come_with_what_they_were_drawn_from():
    """Otherwise sampling is not lossless: each draft is possible, and outside the nucleus nothing is."""
    built = build(replace(MLA, vocab_size=8), sequential(2), context=60)
    decoder, sampler = built.decoder(), make_sampler(0.9, None, 0.5)
    state = decoder.start(prompts_of([4] * 64, 8), 10, num_speculative_tokens=3)
    keys = jax.random.split(jax.random.key(0), (64, 3))
    args = Text(state.tokens_BS, state.length_B - 1, state.recent_BWD), state.mtp_caches, keys
    with jax.set_mesh(decoder.mesh):
        drafts = _draft(decoder.architecture, decoder.network, sampler, 3, *args)
        plain = _draft(decoder.architecture, decoder.network, make_sampler(1.0), 3, *args)
    at = np.take_along_axis(np.asarray(drafts.logits_BKV), np.asarray(drafts.tokens_BK)[..., None], axis=-1)
    assert np.isfinite(at).all()
    for found, raw in zip(drafts.logits_BKV[:, 0], plain.logits_BKV[:, 0], strict=True):
        expected = oracle.distribution(np.asarray(raw, float), 0.9, None, 0.5)
        np.testing.assert_allclose(jax.nn.softmax(found), expected, atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------
# Rounds


@pytest.mark.parametrize(
    ("model", "mtp", "num_speculative_tokens"),
    [
        (MOE, sequential(2), 2),
        (MLA, sequential(3, shared_depths=True, concat_order="hidden_first", chain="decoder"), 3),
        (QWEN, markov(2), 2),
    ],
    ids=["sequential", "shared", "markov"],
)
def test_the_oracle_writes_the_same_and_keeps_the_same_drafts(model, mtp, num_speculative_tokens):
    """Float64, no caches, every token from its whole row."""
    built = build(replace(model, vocab_size=5), mtp, seed=5, blocks=0.5)
    prompts = prompts_of([2, 6], 5)
    found = built.decoder().generate(prompts, 14, num_speculative_tokens=num_speculative_tokens)
    for b, prompt in enumerate(prompts):
        args = built.reference, built.config, conventions(mtp), list(prompt), 14
        expected = oracle.speculative_greedy(*args, num_speculative_tokens)
        assert list(found.tokens[b]) == expected.tokens
        assert found.num_speculative_steps[b] == expected.num_speculative_steps
        np.testing.assert_array_equal(found.tested[b], expected.tested)
        np.testing.assert_array_equal(found.accepted[b], expected.accepted)
    assert 0 < found.accepted.sum() < found.tested.sum()
    assert oracle.greedy(built.reference, built.config, conventions(mtp), list(prompts[0]), 14) == list(found.tokens[0])


def test_a_step_keeps_the_accepted_drafts_up_to_limit_and_stop():
    """By hand, K = 3: what is written, what is counted, which rows are done."""
    lengths = np.array([2, 2, 2, 2, 2, 2], np.int32)
    limits = np.array([9, 9, 4, 9, 9, 2], np.int32)
    drafts = np.array([[5, 6, 7], [5, 6, 7], [5, 6, 7], [5, 8, 7], [5, 6, 7], [5, 6, 7]], np.int32)
    verdict = Verdict(jnp.array([0, 3, 3, 2, 2, 3], jnp.int32), jnp.array([9, 9, 9, 9, 8, 9], jnp.int32))
    zero = jnp.zeros((6, 3), jnp.int32)
    state = states.State(
        *(jnp.ones((6, 12), jnp.int32).at[:, 2:].set(0), jnp.asarray(lengths), jnp.asarray(limits)),
        *(jnp.asarray(lengths >= limits), None, None, None, None),
        states.Counts(jnp.zeros(6, jnp.int32), zero, zero),
        jnp.zeros((), jnp.int32),
    )
    state = states._extended(state, jnp.asarray(drafts), verdict, jnp.array([8]))
    rows = [list(map(int, row[2:length])) for row, length in zip(state.tokens_BS, state.length_B, strict=True)]
    # none kept; all kept; all kept, room for two; a stop among the kept; a stop behind them; done before
    assert rows == [[9], [5, 6, 7, 9], [5, 6], [5, 8], [5, 6, 8], []]
    assert not np.asarray(state.tokens_BS)[2, 4:].any()  # nothing behind the end
    assert state.is_done_B.tolist() == [False, False, True, True, True, True]
    assert state.counts.num_steps_B.tolist() == [1, 1, 1, 1, 1, 0]
    assert state.counts.tested_BK.tolist() == [[1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 1], [0, 0, 0]]
    assert state.counts.accepted_BK.tolist() == [[0, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0], [1, 1, 0], [0, 0, 0]]


def test_rates_and_tokens_per_forward_of_counts():
    """Each row has its own counts; a draft that was never judged has no rate."""
    tokens = [np.arange(6), np.arange(3)]
    done = Generation(tokens, np.array([2, 3]), np.array([[2, 2, 0], [2, 0, 0]]), np.array([[2, 1, 0], [1, 0, 0]]), 3)
    assert done.rounds is done.num_speculative_steps  # rounds: the deprecated name
    assert done.tokens_per_forward == pytest.approx(9 / 5)
    assert done.acceptance[:2] == [0.75, 0.5] and np.isnan(done.acceptance[2])


def test_counts_add_up_to_the_text():
    """Every forward pass writes one token and the drafts it keeps."""
    decoder = build(replace(MLA, vocab_size=4), sequential(3), seed=2).decoder()
    found = decoder.generate(prompts_of([4, 7, 2], 4), 40, num_speculative_tokens=3)
    for b, tokens in enumerate(found.tokens):
        num_given = found.num_speculative_steps[b] + found.accepted[b].sum()
        assert num_given - len(tokens) in (0, 1)  # the last token may be a draft
    assert (np.diff(found.tested, axis=1) <= 0).all() and (found.tested[:, 1:] <= found.accepted[:, :-1]).all()
    assert 0 < found.accepted.sum() < found.tested.sum()
    one = decoder.generate(prompts_of([4], 4), 1, num_speculative_tokens=3)
    assert len(one.tokens[0]) == one.num_forward_passes == 1
    assert not np.isnan(one.acceptance[0]) and np.isnan(one.acceptance[1:]).all()


@pytest.mark.parametrize("num_speculative_tokens", [0, 3])
def test_a_text_ends_at_its_stop_its_limit_or_the_context(num_speculative_tokens):
    decoder = build(MLA, sequential(3), context=40, seed=2).decoder()
    prompts = prompts_of([4, 30, 39], 16)
    whole = decoder.generate(prompts, 100, num_speculative_tokens=num_speculative_tokens)
    assert [len(tokens) for tokens in whole.tokens] == [36, 10, 1]
    for num in (7, 8, 9):
        short = decoder.generate(prompts, num, num_speculative_tokens=num_speculative_tokens)
        for one, tokens in zip(short.tokens, whole.tokens, strict=True):
            np.testing.assert_array_equal(one, tokens[:num])
    for stops in ([int(whole.tokens[0][10])], [int(whole.tokens[0][5]), int(whole.tokens[1][3])]):
        ended = decoder.generate(prompts, 100, num_speculative_tokens=num_speculative_tokens, stop_tokens=stops)
        for one, tokens in zip(ended.tokens, whole.tokens, strict=True):
            ends = [i + 1 for i, token in enumerate(tokens) if token in stops]
            np.testing.assert_array_equal(one, tokens[: min(ends, default=len(tokens))])


def test_a_caller_that_sees_the_end_truncates_there():
    """`ends` is evaluated between runs of steps; rows that end late or not at all are not touched by those that did."""
    decoder = build(MLA, sequential(2), seed=2).decoder()
    prompts = prompts_of([4, 7], 16)
    whole = decoder.generate(prompts, 60, num_speculative_tokens=2)

    def ends(row, tokens):
        assert (tokens == whole.tokens[row][: len(tokens)]).all()
        return 13 if row == 0 and len(tokens) >= 20 else None

    ended = decoder.generate(prompts, 60, num_speculative_tokens=2, ends=ends)
    np.testing.assert_array_equal(ended.tokens[0], whole.tokens[0][:13])
    np.testing.assert_array_equal(ended.tokens[1], whole.tokens[1])
    (steps_ended, steps), whole_steps = ended.num_speculative_steps, whole.num_speculative_steps
    assert steps_ended < whole_steps[0] and steps == whole_steps[1]


# ---------------------------------------------------------------------------------------------------------------
# Sampled texts


def test_a_row_is_sampled_whatever_stands_beside_it():
    """Its place in the batch and the seed decide what it draws."""
    decoder, sampler = build(ONE_MOE, sequential(2)).decoder(), make_sampler(1.0, None, 0.9)
    first, second, third, other = prompts_of([5, 8, 3, 20], 16)

    def sample(prompts, seed=0):
        return decoder.generate(prompts, 30, sampler=sampler, num_speculative_tokens=2, seed=seed).tokens

    expected = sample([first, second, third])
    beside = sample([first, other, third])
    for b in (0, 2):
        np.testing.assert_array_equal(expected[b], beside[b])
    for one, again in zip(expected, sample([first, second, third]), strict=True):
        np.testing.assert_array_equal(one, again)
    assert all((one != another).any() for one, another in zip(expected, sample([first, second, third], 1), strict=True))
    twins = sample([first, first, first])
    assert (twins[0] != twins[1]).any() and (twins[1] != twins[2]).any()


@pytest.mark.parametrize("num_speculative_tokens", [0, 2])
@pytest.mark.parametrize("name", ["sequential", "parallel", "window"])
def test_waiting_prompts_replace_texts_that_are_done(name, num_speculative_tokens):
    """Texts and counts are those of all prompts at once; the batch takes fewer steps than one batch after the other."""
    model = replace(MLA, **WINDOW) if name == "window" else MLA
    decoder = build(model, parallel(2) if name == "parallel" else sequential(2), context=40, seed=2).decoder()
    prompts = prompts_of([4, 30, 7, 38, 2, 12, 25, 3, 36], 16)
    options = {"sampler": make_sampler(0.8), "num_speculative_tokens": num_speculative_tokens, "stop_tokens": (5,)}
    ends = lambda b, text: 6 if b % 3 == 0 and len(text) > 6 else None  # noqa: E731
    for each in (options, options | {"ends": ends}):
        expected = decoder.generate(prompts, 24, **each)
        for size in (1, 3, 8):
            found = decoder.generate(prompts, 24, batch_size=size, **each)
            assert [text.tolist() for text in found.tokens] == [text.tolist() for text in expected.tokens]
            if each is options:
                for field in ("num_speculative_steps", "tested", "accepted"):
                    np.testing.assert_array_equal(getattr(found, field), getattr(expected, field))
    done: list[int] = []
    steps = decoder.generate(prompts, 24, batch_size=3, progress=done.append, **options)
    assert sum(done) == len(prompts) and max(done) <= 3
    batches = [steps.num_speculative_steps[at : at + 3].max() for at in (0, 3, 6)]
    assert steps.num_speculative_steps.sum() / 3 <= steps.num_forward_passes < sum(batches)


def test_compiling_beforehand_leaves_nothing_to_compile():
    decoder = build(replace(MLA, ffn_dim=28), sequential(2), context=40).decoder()  # of no other test
    programs = states.begin, states.prefill, states.replace_rows, states.generate
    options = {"num_speculative_tokens": 2, "batch_size": 3, "sampler": make_sampler(0.6)}
    prompts = prompts_of([4, 30, 7, 38, 2], 16)
    before = sum(program._cache_size() for program in programs)
    decoder.compile(prompts, 24, **options)
    compiled = sum(program._cache_size() for program in programs)
    decoder.generate(prompts, 24, **options)
    assert before < compiled == sum(program._cache_size() for program in programs)


def operations(jaxpr, is_in_loop=False):
    """Yields (whether it is in a loop, operation) of a program, those of inner programs too."""
    for eqn in jaxpr.eqns:
        yield is_in_loop, eqn
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            yield from operations(inner, is_in_loop or eqn.primitive.name == "while")


def test_fewer_drafts_than_heads_copy_no_weights_in_the_loop():
    """A part of stacked weights is an array of its own to a GPU kernel: a copy at every step, of 5 % of its time."""
    decoder = build(MLA, parallel(3)).decoder()
    state = decoder.start(prompts_of([4], 16), 8, num_speculative_tokens=2)
    arguments = decoder.network, np.full(1, -1, np.int32), state, np.int32(4)
    traced = states.generate.trace(decoder.architecture, make_sampler(0.0), *arguments)
    weights = {x.shape for x in jax.tree.leaves(decoder.network.mtp.blocks)}
    found = [is_in_loop for is_in_loop, eqn in operations(traced.jaxpr.jaxpr) if is_slice_of(eqn, weights)]
    assert found and not any(found)


def is_slice_of(eqn, shapes):
    return eqn.primitive.name == "slice" and eqn.invars[0].aval.shape in shapes


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, True])
def test_a_batch_size_that_is_none_is_refused(batch_size):
    decoder = build(MLA, sequential(1)).decoder()
    with pytest.raises(UserError, match="batch_size"):
        decoder.generate(prompts_of([3, 4], 16), 4, batch_size=batch_size)


# ---------------------------------------------------------------------------------------------------------------
# Programs, devices, dtypes


def test_programs_are_compiled_once_for_prompts_and_lengths_of_a_size():
    built = build(MLA, sequential(2), seed=7)
    decoder = built.decoder()
    sizes = lambda: (states.begin._cache_size(), states.prefill._cache_size(), states.generate._cache_size())  # noqa: E731
    decoder.generate(prompts_of([5, 20], 16), 40, num_speculative_tokens=2, sampler=make_sampler(0.7))
    before = sizes()
    for lengths, num_new, temperature in (([20, 31], 17, 0.7), ([18, 3], 60, 1.3), ([32, 30], 1, 0.2)):
        sampler = make_sampler(temperature)
        decoder.generate(prompts_of(lengths, 16), num_new, num_speculative_tokens=2, sampler=sampler, seed=lengths[0])
    assert sizes() == before
    again = Generator(built.config, *built_weights(seed=8), decoder.mesh)  # other weights of the same shapes
    again.context = 512
    again.generate(prompts_of([5, 20], 16), 40, num_speculative_tokens=2, sampler=make_sampler(0.7))
    assert sizes() == before


def built_weights(seed):
    built = build(MLA, sequential(2), seed=seed)
    return built.params, built.biases


def test_a_state_is_written_in_place():
    """Its buffers are given up, caches above all: a second copy would double what decoding holds."""
    decoder = build(MLA, sequential(2)).decoder()
    state = decoder.start(prompts_of([5, 20], 16), 40, num_speculative_tokens=2)
    after = decoder.write(state, 1)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.caches, state.mtp_caches, state.tokens_BS)))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(after))
    assert jax.tree.map(jnp.shape, after.caches) == jax.tree.map(jnp.shape, decoder.start([[1]] * 2, 60).caches)


HEADS = {"num_layers": 1, "num_dense_layers": 0, "num_heads": 4, "num_kv_heads": 2}
MESHES = {
    "fsdp expert context": (
        {"data": 1, "fsdp": 2, "expert": 2, "context": 2},
        replace(MOE, **HEADS),
        sequential(1),
        (1, 0),
    ),
    "tensor": ({"data": 2, "expert": 2, "tensor": 2}, replace(GQA, **EXPERTS, **HEADS), parallel(1), (1,)),
}


@pytest.mark.parametrize("name", MESHES)
def test_any_mesh_writes_what_one_device_writes(name):
    """Five prompts on eight devices, three of them at once, drafted and plain: the same tokens in as many steps."""
    sizes, model, mtp, nums_speculative_tokens = MESHES[name]
    built = build(model, mtp, seed=9)
    prompts = prompts_of([4, 17, 1, 9, 2], 16)
    one, many = built.decoder(), built.decoder(MeshConfig(**sizes))
    for num_speculative_tokens in nums_speculative_tokens:
        expected = one.generate(prompts, 16, num_speculative_tokens=num_speculative_tokens)
        found = many.generate(prompts, 16, num_speculative_tokens=num_speculative_tokens, batch_size=3)
        for a, b in zip(expected.tokens, found.tokens, strict=True):
            np.testing.assert_array_equal(a, b)
        np.testing.assert_array_equal(
            found.num_speculative_steps[[0, 1, 3, 4]], expected.num_speculative_steps[[0, 1, 3, 4]]
        )


def test_bfloat16_runs_and_keeps_its_caches_in_bfloat16():
    decoder = build(replace(ONE_MOE, compute_dtype="bfloat16"), sequential(2)).decoder()
    state = decoder.start(prompts_of([4, 20], 16), 20, num_speculative_tokens=2)
    caches = jax.tree.leaves((state.caches, state.mtp_caches, state.recent_BWD))
    assert {leaf.dtype for leaf in caches} == {jnp.dtype("bfloat16")}
    found = decoder.generate(prompts_of([4, 20], 16), 20, num_speculative_tokens=2)
    assert [len(tokens) for tokens in found.tokens] == [20, 20]


@pytest.mark.parametrize(("capability", "mtp"), [("8.0", markov(2)), ("9.0", markov(2)), ("9.0", sequential(2))])
def test_on_a_gpu_texts_are_the_same(capability, mtp):
    """Weights have their contracted dims last there; on Hopper, norms and latent attention are kernels of our own."""
    dims = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16}
    built = build(replace(MLA, num_layers=1, **dims), mtp, blocks=0.1)
    prompts = prompts_of([6], MLA.vocab_size)
    plain = built.decoder().generate(prompts, 24)
    here = built.decoder().generate(prompts, 24, num_speculative_tokens=2)
    jax.clear_caches()
    with pretend("gpu", capability):
        block = built.decoder().network.blocks[0]
        assert block.attention.down.shape[1] == block.ffn.gate.shape[1] == MLA.embed_dim
        for num_speculative_tokens in (0, 2):
            there = built.decoder().generate(prompts, 24, num_speculative_tokens=num_speculative_tokens)
            np.testing.assert_array_equal(there.tokens[0], plain.tokens[0])
    jax.clear_caches()
    np.testing.assert_array_equal(there.accepted, here.accepted)
