"""`mtp_jax.load` as people use it, on a model trained for a few seconds."""

import dataclasses
import json

import jax
import numpy as np
import pytest

import mtp_jax
from mtp_jax import sharding
from mtp_jax.config import MeshConfig, UserError
from mtp_jax.data import ByteTokenizer, load_tokenizer
from mtp_jax.interop.checkpoint_folder import write_model
from mtp_jax.language_model import LanguageModel, texts
from mtp_jax.mtp import kind_of
from tests import sentencepiece
from tests.data.chat_templates import SPECIAL, TEMPLATES, assistant, user
from tests.data.test_tokenizer import byte_level
from tests.decoding.models import MLA, build, parallel, replace
from tests.decoding.trained import CONTEXT

BOS = 256
PROMPTS = ["the station", "the café is", "Bob"]
NUM_NEW = 60


@pytest.fixture(scope="module")
def lm(small_workdir):
    return mtp_jax.load(small_workdir)


@pytest.fixture(scope="module")
def plain(lm):
    return lm.generate(PROMPTS, NUM_NEW)


def decoded(tokens):
    return bytes(int(t) for t in tokens if t < 256).decode(errors="replace")


def all_logits(lm, rows):
    """[B, T, V] of the main model, T = 1 + CONTEXT, of rows of any lengths."""
    tokens = np.zeros((len(rows), 1 + CONTEXT + kind_of(lm.config).depth), int)
    for row, ids in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return lm.logits(tokens)[:, :, 0]


# ---------------------------------------------------------------------------------------------------------------
# generate


def test_greedy_texts_are_the_argmax_of_the_logits(lm, plain):
    rows = [[BOS, *prompt.encode(), *tokens] for prompt, tokens in zip(PROMPTS, plain.tokens, strict=True)]
    for row, tokens, text, logits in zip(rows, plain.tokens, plain.texts, all_logits(lm, rows), strict=True):
        first = len(row) - len(tokens)
        np.testing.assert_array_equal(logits[first - 1 : len(row) - 1].argmax(-1), tokens)
        assert text == decoded(tokens)
    assert plain.num_forward_passes == max(map(len, plain.tokens)) and plain.acceptance == []
    assert plain.tokens_per_forward == 1


def test_speculated_texts_are_the_plain_ones_in_fewer_passes(lm, plain):
    found = lm.generate(PROMPTS, max_new_tokens=NUM_NEW, temperature=0.0, speculative=True, seed=0)
    assert found.texts == plain.texts
    for one, other in zip(found.tokens, plain.tokens, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len(found.acceptance) == kind_of(lm.config).depth == 2 and min(found.acceptance) > 0.4  # chance: 1 / 261
    assert found.num_forward_passes < 0.7 * plain.num_forward_passes
    assert found.tokens_per_forward == pytest.approx(sum(map(len, found.tokens)) / found.num_speculative_steps.sum())
    # Expected tokens per pass: 1 + a_1 + a_1 a_2, but for the last step of a row, which the limit shortens.
    a_1, a_2 = found.acceptance
    assert found.tokens_per_forward == pytest.approx(1 + a_1 + a_1 * a_2, rel=0.1)


@pytest.mark.parametrize("num_speculative_tokens", [1, 4])
def test_another_draft_length_gives_the_same_texts(lm, plain, num_speculative_tokens):
    found = lm.generate(PROMPTS, NUM_NEW, speculative=True, num_speculative_tokens=num_speculative_tokens)
    assert found.texts == plain.texts and len(found.acceptance) == num_speculative_tokens


def test_prompts_are_texts_or_tokens_and_one_alone_is_a_batch_of_one(lm, plain):
    as_tokens = lm.generate([[BOS, *prompt.encode()] for prompt in PROMPTS], NUM_NEW)
    assert as_tokens.texts == plain.texts
    assert lm.generate(PROMPTS[0], NUM_NEW).texts == plain.texts[:1]
    assert lm.generate([np.array([BOS, *PROMPTS[0].encode()], np.int64)], NUM_NEW).texts == plain.texts[:1]


@pytest.mark.parametrize("speculative", [False, True])
def test_a_text_ends_before_its_stop_string(lm, plain, speculative):
    """Tokens are kept to the one that completes it; letters of several bytes; several strings, the first found."""
    for stops in ("open", "→", ["Ann", "Eve", "Bob"], ["open", "is open"], ["is o", "open"], "é", "not in any of them"):
        found = lm.generate(PROMPTS, NUM_NEW, speculative=speculative, stop=stops)
        stops = [stops] if isinstance(stops, str) else stops
        for text, tokens, whole, all_tokens in zip(found.texts, found.tokens, plain.texts, plain.tokens, strict=True):
            ends = [whole.index(s) for s in stops if s in whole]
            assert text == whole[: min(ends, default=len(whole))]
            np.testing.assert_array_equal(tokens, all_tokens[: len(tokens)])
            assert any(decoded(tokens).endswith(s) for s in stops) == bool(ends)
            assert bool(ends) or len(tokens) == len(all_tokens)
    assert any("→" in text for text in plain.texts) and any("open" in text for text in plain.texts)


@pytest.mark.parametrize("speculative", [False, True])
def test_a_text_ends_at_a_stop_token_which_is_not_of_the_text(lm, plain, speculative):
    stop = ord("o")
    found = lm.generate(PROMPTS, NUM_NEW, speculative=speculative, stop_tokens=[stop, 258])
    for text, tokens, whole in zip(found.texts, found.tokens, plain.tokens, strict=True):
        ends = np.flatnonzero(whole == stop)
        np.testing.assert_array_equal(tokens, whole[: ends[0] + 1] if len(ends) else whole)
        assert text == decoded(whole[: ends[0]] if len(ends) else whole)


class Named(ByteTokenizer):
    """Special tokens with names, one of them beyond what a model writes."""

    def special_id(self, name):
        return {"<end>": ord("o"), "<none>": 10**6}.get(name)


def test_a_stop_string_that_names_a_special_token_is_that_token(lm):
    """`decode` drops it, so no text ever holds it."""
    named = dataclasses.replace(lm, tokenizer=Named())
    found, expected = (
        named.generate(PROMPTS, NUM_NEW, stop=["<none>", "<end>"]),
        lm.generate(PROMPTS, NUM_NEW, stop="o"),
    )
    assert found.texts == expected.texts and any(len(text) < 50 for text in found.texts)


@pytest.fixture(scope="module", params=["llama", "unigram"])
def blanks(request, tmp_path_factory):
    """A random model whose tokenizer takes the first blank off what it decodes."""
    path = tmp_path_factory.mktemp(request.param) / "tokenizer.json"
    getattr(sentencepiece, f"{request.param}_style")().save(str(path))
    tokenizer = load_tokenizer(str(path))
    built = build(replace(MLA, vocab_size=tokenizer.vocab_size), context=64)
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    return LanguageModel(built.config, built.params, built.biases, tokenizer, mesh)


def written_after(lm):
    """Rows enough that some of a random model begin with a blank: one token in twenty does."""
    texts = ["the station", "Bob", "  at 3", "def f(x):\n", "café", "a "]
    befores = [*lm.prompt_ids(texts), [lm.tokenizer.bos_id]]
    return befores * 24


def test_a_text_keeps_the_blank_it_begins_with(blanks):
    """The prompt's text with what was written is the text of all tokens; after a bos alone, which has none, as well."""
    befores, decode = written_after(blanks), blanks.tokenizer.decode
    out = blanks.generate(befores, 6, temperature=3.0, stop_tokens=())
    for before, tokens, text in zip(befores, out.tokens, out.texts, strict=True):
        assert decode(before) + text == decode([*before, *tokens])
    num_kept = sum(text == " " + decode(tokens) for text, tokens in zip(out.texts, out.tokens, strict=True))
    assert num_kept > 2


def test_a_stop_string_is_found_with_the_blank_it_begins_with(blanks):
    befores, options = written_after(blanks), {"temperature": 3.0, "stop_tokens": ()}
    whole = blanks.generate(befores, 6, **options)
    stop = next(text[:2] for text in whole.texts if text[0] == " " and text[1:2].isalpha())
    out = blanks.generate(befores, 6, stop=stop, **options)
    for before, text, tokens, uncut in zip(befores, out.texts, out.tokens, whole.texts, strict=True):
        assert text == uncut.split(stop)[0]
        assert stop not in blanks.tokenizer.decode_after(before, tokens[:-1])  # none more than completes it
    assert "" in out.texts


# ---------------------------------------------------------------------------------------------------------------
# chat


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """An exported Hugging Face folder: random weights, the tokenizer of the training and its chat template."""
    folder = tmp_path_factory.mktemp("chat") / "hf"
    made = byte_level(SPECIAL)
    built = build(replace(MLA, vocab_size=-(-made.get_vocab_size() // 8) * 8), context=256)
    made.save(str(folder.parent / "tokenizer.json"))
    (folder.parent / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    (folder.parent / "chat_template.jinja").write_text(TEMPLATES["chatml"])
    arrays, tokenizer = {"params": built.params, "biases": built.biases}, folder.parent / "tokenizer.json"
    write_model(folder, built.config, arrays, family="deepseek_v3", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def chatting(chat_folder):
    return mtp_jax.load(chat_folder)


def test_special_tokens_of_a_prompt_count_where_they_are_asked_for(chatting):
    as_text, as_tokens = chatting.prompt_ids(["<s>a<|im_end|>"])[0], chatting.prompt_ids(["<s>a<|im_end|>"], True)[0]
    bos, end = chatting.tokenizer.bos_id, chatting.tokenizer.special_id("<|im_end|>")
    assert as_text[0] == bos and bos not in as_text[1:] and end not in as_text and len(as_text) > 8
    assert as_tokens.tolist() == [bos, *chatting.tokenizer.encode("a"), end]
    assert chatting.prompt_ids(["a"], True)[0].tolist() == [bos, *chatting.tokenizer.encode("a")]
    found = chatting.generate("<s>a<|im_end|>", 4, special_tokens=True)
    np.testing.assert_array_equal(found.tokens[0], chatting.generate([as_tokens], 4).tokens[0])


def test_a_chat_goes_on_after_the_text_of_its_template(chatting, chat_folder):
    chats = [[user("Hi <|im_end|>")], [user("a"), assistant("b"), user("é?")]]
    one, several = chatting.chat(chats[0], 8), chatting.chat(chats, 8)
    prompts = [
        f"<|im_start|>system\nYou help.<|im_end|>\n<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
        for text in ("Hi <|im_end|>", "a<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\né?")
    ]
    ids = [chatting.tokenizer.encode(prompt, special_tokens=True) for prompt in prompts]
    expected = chatting.generate(ids, 8)
    for found, tokens in zip([one.tokens[0], *several.tokens], [expected.tokens[0], *expected.tokens], strict=True):
        np.testing.assert_array_equal(found, tokens)
    assert several.texts == expected.texts and one.texts == several.texts[:1] and one.num_forward_passes > 0


def test_an_answer_ends_at_the_mark_of_the_template(chatting):
    chats, options = [[user("Hi")]] * 64, {"temperature": 5.0, "stop_tokens": ()}
    prompt = chatting.chat_template.render(chats[0], add_generation_prompt=True)
    whole = chatting.generate([chatting.tokenizer.encode(prompt, special_tokens=True)] * 64, 48, **options)
    found = chatting.chat(chats, 48, **options)
    end, num_ended = chatting.tokenizer.special_id("<|im_end|>"), 0
    for tokens, text, uncut in zip(found.tokens, found.texts, whole.tokens, strict=True):
        at = np.flatnonzero(uncut == end)
        np.testing.assert_array_equal(tokens, uncut[: at[0] + 1] if len(at) else uncut)
        assert text == chatting.tokenizer.decode(tokens)
        num_ended += len(at) > 0
    assert 2 < num_ended < 64


def test_blanks_and_marks_of_a_template_are_not_of_the_answer(lm, plain, tmp_path):
    """Also where the mark is plain text, as for bytes: what follows "the station" has a blank and then "open"."""
    path = tmp_path / "chat.jinja"
    answer = "{% if m.role == 'assistant' %}{{ ' ' + m.content + 'is op' }}{% else %}{{ m.content }}{% endif %}"
    path.write_text("{% for m in messages %}" + answer + "{% endfor %}")
    config = dataclasses.replace(lm.config, data=dataclasses.replace(lm.config.data, chat_template=str(path)))
    found = dataclasses.replace(lm, config=config).chat([user("the station")], NUM_NEW)
    expected = lm.generate([list(b"the station")], NUM_NEW, stop="is op")
    assert expected.texts[0].startswith(" ") and found.texts[0] == expected.texts[0][1:]
    np.testing.assert_array_equal(found.tokens[0], expected.tokens[0])


def test_chats_that_cannot_be_answered_are_one_clear_line(lm, chatting):
    with pytest.raises(UserError, match="data.tokenizer=bytes: has no chat template.*data.chat_template"):
        lm.chat([user("a")])
    for chat, problem in [([], "there are none"), ("text", "messages"), ([user("a\ud800")], "surrogate")]:
        with pytest.raises(UserError, match=problem) as caught:
            chatting.chat(chat)
        assert "\n" not in str(caught.value)


def test_plain_passes_are_as_many_as_tokens_of_a_truncated_text(lm, plain):
    stop = plain.texts[0][5]
    out = lm.generate(PROMPTS, NUM_NEW, stop=stop)
    assert out.num_speculative_steps.tolist() == [len(tokens) for tokens in out.tokens]
    assert out.tokens_per_forward == 1.0


def test_a_stop_token_inside_a_stop_string_leaves_nothing_of_it(lm, plain):
    text = plain.texts[0]
    stop = text[4:6]
    out = lm.generate(PROMPTS[:1], NUM_NEW, stop=stop, stop_tokens=list(stop[-1].encode())[-1:])
    assert out.texts[0] == lm.generate(PROMPTS[:1], NUM_NEW, stop=[stop, stop[-1]]).texts[0].removesuffix(stop[:-1])


def test_scoring_does_not_copy_the_weights(lm):
    fresh = dataclasses.replace(lm)
    fresh.loglikelihood([("a", "b")])
    assert "decoder" not in vars(fresh)


def test_texts_end_with_the_context(lm):
    found = lm.generate([[BOS, *b"the station is open"], [65] * (CONTEXT - 1)], 500)
    assert [len(tokens) for tokens in found.tokens] == [CONTEXT - 20, 1]


def test_sampling_has_its_temperature_its_limits_and_its_seed(lm, plain):
    def sample(**numbers):
        return lm.generate(PROMPTS, NUM_NEW, speculative=True, **numbers).texts

    assert sample(temperature=1.0, top_k=1) == sample(temperature=3.0, top_p=1e-6) == plain.texts
    texts = sample(temperature=1.0)
    assert texts != plain.texts and texts == sample(temperature=1.0, seed=0) != sample(temperature=1.0, seed=1)
    hot = sample(temperature=30.0)
    assert len(set("".join(hot))) > 2 * len(set("".join(texts)))  # nearly any byte
    assert len(set("".join(sample(temperature=30.0, top_k=2)))) < len(set("".join(hot)))


# ---------------------------------------------------------------------------------------------------------------
# loglikelihood


LONG = "the station is open → Ann comes at 3.\n" * 4
PAIRS = [
    ("the station", " is open"),
    ("the station ", "is open"),  # the blank is read with what follows it
    ("", "the"),
    ("the café is open → ", "Ann comes at 2.\nthe"),
    (LONG, "the library"),  # longer than the context
    ("x", "y"),
]


def test_loglikelihood_is_the_sum_of_the_logits_own(lm):
    rows, starts = [], []
    for context, continuation in PAIRS:
        ids = [BOS, *(context + continuation).encode()]
        num_new = len((context + continuation).encode()) - len(context.rstrip().encode())
        rows.append(ids[-(CONTEXT + 1) :])
        starts.append(len(rows[-1]) - num_new)
    assert len(rows[4]) == CONTEXT + 1 and rows[4][0] != BOS
    logits = all_logits(lm, rows).astype(float)
    for b, (found, is_greedy) in enumerate(lm.loglikelihood(PAIRS)):
        expected, all_best = 0.0, True
        for i in range(starts[b], len(rows[b])):
            at = logits[b, i - 1]
            expected += at[rows[b][i]] - np.log(np.exp(at - at.max()).sum()) - at.max()
            all_best &= int(np.argmax(at)) == rows[b][i]
        assert found == pytest.approx(expected, rel=1e-4), PAIRS[b]
        assert is_greedy is all_best
    assert lm.loglikelihood([]) == []


def test_continuations_of_one_context_score_as_they_do_alone(lm):
    contexts = ["the station is open → ", LONG, "Bob", ""]
    pairs = [(c, e) for c in contexts for e in (" Ann", "Eve comes at", "\n", " Ann")]
    done = []
    found = lm.loglikelihood(pairs, done.append)
    alone = [lm.loglikelihood([pair])[0] for pair in pairs]
    assert [g for _, g in found] == [g for _, g in alone] and sum(done) == len(pairs)
    np.testing.assert_allclose([p for p, _ in found], [p for p, _ in alone], atol=1e-4)


def test_a_continuation_longer_than_the_context_is_read_in_pieces(lm):
    """The first token after all of the context there is, each piece's first after one token."""
    text = (LONG * 3)[: 2 * CONTEXT + 10]
    ids = [BOS, *b"Bob:", *text.encode()]
    starts = [(5 + at) for at in range(0, len(ids) - 5, CONTEXT)]
    pieces = [ids[max(0, min(at + CONTEXT, len(ids)) - CONTEXT - 1) : min(at + CONTEXT, len(ids))] for at in starts]
    assert len(pieces) == 3 and pieces[1][0] == ids[4 + CONTEXT]
    logits, expected = all_logits(lm, pieces).astype(float), 0.0
    for b, (at, piece) in enumerate(zip(starts, pieces, strict=True)):
        num_new = min(at + CONTEXT, len(ids)) - at
        for i in range(len(piece) - num_new, len(piece)):
            expected += logits[b, i - 1][piece[i]] - np.log(np.exp(logits[b, i - 1]).sum())
    found, is_greedy = lm.loglikelihood([("Bob:", text)])[0]
    assert found == pytest.approx(expected, rel=1e-4) and not is_greedy


def test_rolling_scores_each_token_once(lm):
    texts = ["", "the", "x" * CONTEXT, "y" * (CONTEXT + 1), LONG[: 2 * CONTEXT - 1]]
    found = lm.loglikelihood_rolling(texts)
    for text, log_p in zip(texts, found, strict=True):
        ids, expected = [BOS, *text.encode()], 0.0
        for at in range(1, len(ids), CONTEXT):
            end = min(at + CONTEXT, len(ids))
            row = ids[max(0, end - CONTEXT - 1) : end]
            logits = all_logits(lm, [row])[0].astype(float)
            for i in range(len(row) - (end - at), len(row)):
                expected += logits[i - 1][row[i]] - np.log(np.exp(logits[i - 1]).sum())
        assert log_p == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert found[0] == 0.0


def test_what_greedy_decoding_writes_is_called_greedy(lm):
    written = decoded(lm.generate(["the station"], 20).tokens[0])
    assert "\ufffd" not in written
    other = written[:-1] + ("x" if written[-1] != "x" else "y")
    (likely, is_greedy), (unlikely, is_not) = lm.loglikelihood([("the station", written), ("the station", other)])
    assert is_greedy and not is_not and likely > unlikely


# ---------------------------------------------------------------------------------------------------------------
# What cannot be done


UNUSABLE = {
    "empty text": ({"prompts": ["fine", ""]}, ["prompt 1", "empty"]),
    "half a surrogate pair": ({"prompts": ["fine", "ab\ud800"]}, ["prompt 1", "character 2", "'\\ud800'", "remove it"]),
    "half a surrogate pair to stop at": ({"stop": ["a", "\udfff"]}, ["stop", "character 0", "'\\udfff'"]),
    "stop that is no text": ({"stop": [3]}, ["stop: 3 is not a text"]),
    "None": ({"prompts": ["fine", None]}, ["prompt 1", "token ids"]),
    "no token": ({"prompts": [[]]}, ["prompt 0", "empty"]),
    "no prompt": ({"prompts": []}, ["prompts", "none"]),
    "as long as the context": ({"prompts": ["a" * 300]}, ["prompt 0", "301 tokens", f"holds {CONTEXT}", "shorten"]),
    "just as long": ({"prompts": [[1] * CONTEXT]}, ["prompt 0", f"{CONTEXT} tokens", f"at most {CONTEXT - 1}"]),
    "token too large": ({"prompts": [[1, 2], [3, 264]]}, ["prompt 1", "token 264", "vocabulary of 264"]),
    "token below zero": ({"prompts": [[-1]]}, ["prompt 0", "token -1", "vocabulary"]),
    "fractions": ({"prompts": [[0.5, 1.0]]}, ["prompt 0", "float64", "token ids"]),
    "rows within a row": ({"prompts": [[[1, 2]]]}, ["prompt 0", "[1, 2]", "token ids"]),
    "nothing to write": ({"max_new_tokens": 0}, ["max_new_tokens=0", "at least 1"]),
    "negative temperature": ({"temperature": -1.0}, ["temperature=-1.0"]),
    "top_k beside greedy": ({"top_k": 3}, ["top_k=3", "temperature=0"]),
    "top_p too large": ({"temperature": 1.0, "top_p": 2.0}, ["top_p=2.0"]),
    "drafts without speculation": ({"num_speculative_tokens": 2}, ["num_speculative_tokens=2", "speculative=True"]),
    "no drafts": ({"speculative": True, "num_speculative_tokens": 0}, ["num_speculative_tokens=0", "at least 1"]),
    "half a token": ({"max_new_tokens": 3.5}, ["max_new_tokens=3.5", "integer"]),
    "seed below zero": ({"seed": -1}, ["seed=-1", "at least 0"]),
    "seed too large": ({"seed": 2**32}, ["seed=4294967296", "at most"]),
    "half a draft": ({"speculative": True, "num_speculative_tokens": 1.5}, ["num_speculative_tokens=1.5", "integer"]),
    "unknown stop token": ({"stop_tokens": [9999]}, ["stop_tokens=9999", "at most 263"]),
    "empty stop": ({"stop": ""}, ["stop=''", "leave it out"]),
    "empty stop among others": ({"stop": ["a", ""]}, ["stop=''"]),
}


def refusal(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", UNUSABLE)
def test_what_cannot_be_generated_is_one_clear_line(lm, name):
    arguments, words = UNUSABLE[name]
    line = refusal(lm.generate, **{"prompts": ["a"], "max_new_tokens": 5, **arguments})
    assert all(word in line for word in words), line


def test_what_has_no_likelihood_is_one_clear_line(lm):
    assert "pair 1: its continuation is empty" in refusal(lm.loglikelihood, [("a", "b"), ("a", "")])
    for pair in ((None, "b"), ("a", None), ("a", 3)):
        assert "pair 1: " in (line := refusal(lm.loglikelihood, [("a", "b"), pair])) and "is not a text" in line
    for pair in (None, 3, "ab", ("a",)):
        assert "pair 0: " in (line := refusal(lm.loglikelihood, [pair])) and "is not (context, continuation)" in line
    for pair in (("\ud800", "b"), ("a", "\ud800")):
        assert "pair 0: character 0 is '\\ud800', half of a surrogate pair" in refusal(lm.loglikelihood, [pair])
    for text in ("\ud800", None):
        assert "text 1: " in refusal(lm.loglikelihood_rolling, ["a", text])


class Joined:
    """One token for `ab`, as where a tokenizer joins a short context with what follows."""

    bos_id, eos_id = None, 7

    def encode(self, text):
        return np.array([5] if text == "ab" else [ord(c) for c in text], np.int32)


def test_something_comes_before_a_continuation_that_is_joined_to_the_context():
    ids, start = texts.pair(Joined(), Joined().encode, 0, "a", "b")
    assert (ids.tolist(), start) == ([7, 5], 1)
    assert texts.pair(Joined(), Joined().encode, 0, "a", "bc")[0].tolist() == [97, 98, 99]
    none = Joined()
    none.eos_id = None
    assert "pair 3: nothing comes before" in refusal(texts.pair, none, none.encode, 3, "a", "b")


def test_a_model_without_extra_depths_or_with_fewer_heads_is_reported():
    mesh = sharding.make_mesh(MeshConfig(), jax.devices()[:1])
    built = build(MLA)
    none = LanguageModel(built.config, built.params, built.biases, None, mesh)
    assert "mtp.kind=none" in refusal(none.generate, [[1]], speculative=True)
    assert "mtp.kind=none" in refusal(none.generate, [[1]], speculative=True, num_speculative_tokens=2)
    built = build(MLA, parallel(2))
    heads = LanguageModel(built.config, built.params, built.biases, None, mesh)
    assert "at most 2" in refusal(heads.generate, [[1]], speculative=True, num_speculative_tokens=3)


def test_without_a_tokenizer_there_are_tokens_and_no_texts(lm, plain):
    bare = dataclasses.replace(lm, tokenizer=None)
    found = bare.generate([[BOS, *prompt.encode()] for prompt in PROMPTS], NUM_NEW)
    np.testing.assert_array_equal(found.tokens[0], plain.tokens[0])
    assert found.texts == []
    for call in (
        lambda: bare.generate(["text"]),
        lambda: bare.generate([[1]], stop="a"),
        lambda: bare.loglikelihood([("a", "b")]),
    ):
        assert "tokenizer.json" in refusal(call)


def test_logits_of_other_shapes_or_unknown_tokens_are_refused(lm):
    assert "[B, N]" in refusal(lm.logits, [1, 2, 3])
    assert "at least 3 tokens" in refusal(lm.logits, [[1, 2]])
    assert "999 is outside the vocabulary of 264" in refusal(lm.logits, [[1, 2, 999, 4]])
