"""Loss masks of chats and prompts in rows, at every depth, against a loop over each conversation alone."""

import json
import re

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mtp_jax import targets
from mtp_jax.config import UserError
from mtp_jax.data import Row, prepare
from tests.data.chat_templates import CHATML

TURN = st.text("abc ", min_size=1, max_size=12).map(str.strip).filter(bool)
CHAT = st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3)


@pytest.fixture
def chats(make_config, with_data, tmp_path):
    """Makes the corpus of some conversations, each a list of (question, answer)."""
    (tmp_path / "chatml.jinja").write_text(CHATML)

    def make(conversations, **data):
        lines = [
            {
                "messages": [
                    m for q, a in turns for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
                ]
            }
            for turns in conversations
        ]
        path = tmp_path / f"{abs(hash(str(lines)))}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        own = {"source": "text_files", "files": str(path), "records": "chat", "validation_fraction": 0.0}
        config = with_data(make_config(), **own, chat_template=str(tmp_path / "chatml.jinja"), batch_size=1)
        return prepare(with_data(config, **data), lookahead=4)

    return make


def conversation(turns):
    """The characters of a conversation, and which of them the assistant writes."""
    text = "<|im_start|>system\nYou help.<|im_end|>\n"
    answers = [0] * len(text)
    for question, answer in turns:
        for prompt, written in [
            (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", f"{answer}<|im_end|>\n")
        ]:
            text += prompt + written
            answers += [0] * len(prompt) + [1] * len(written)
    return text.encode(), answers


def expected(documents, rows, length, depth):
    """Weights [rows, depth + 1, T]; `rows` has the (document, offset) of each token, None for padding."""
    out = np.zeros((len(rows), depth + 1, length), np.float32)
    for r, k, i in np.ndindex(*out.shape):
        here, there = rows[r][i], rows[r][i + 1 + k]
        if here is not None and there is not None and here[0] == there[0]:
            out[r, k, i] = documents[there[0]][1][there[1]]
    return out


def weights_of(rows, depth):
    """Weights [rows, depth + 1, T]; computed for 32 rows at a time, so that few shapes are compiled."""
    fields = [
        np.stack([getattr(rows[r % len(rows)], name) for r in range(-(-len(rows) // 32) * 32)]) for name in Row._fields
    ]
    out = []
    for start in range(0, len(rows), 32):
        tokens, segments, positions, mask = (x[start : start + 32] for x in fields)
        out.append(np.asarray(targets.rows(tokens, segments, positions, depth, 4, mask).weight_KBT).swapaxes(0, 1))
    return np.concatenate(out)[: len(rows)]


relaxed = settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@relaxed
@given(st.lists(CHAT, min_size=3, max_size=6), st.sampled_from([16, 45]))
def test_packed_rows(chats, conversations, length):
    documents = [conversation(turns) for turns in conversations]
    corpus = chats(conversations, shuffle=False, sequence_length=length)
    stream = [(d, i) for d, (text, _) in enumerate(documents) for i in range(len(text))]
    rows = corpus.rows("train")
    origins = [stream[r * length : r * length + length + 5] for r in range(len(rows))]
    for r, origin in enumerate(origins):
        assert rows[r].tokens.tolist() == [documents[d][0][i] for d, i in origin]
    for depth in range(1, 5):
        found = weights_of(rows, depth)
        np.testing.assert_array_equal(found, expected(documents, origins, length, depth))


@relaxed
@given(st.lists(CHAT, min_size=3, max_size=6), st.sampled_from([110, 150]))
def test_rows_of_whole_conversations(chats, conversations, length):
    documents = [conversation(turns) for turns in conversations]
    corpus = chats(conversations, packing="whole", sequence_length=length)
    rows, origins = corpus.rows("train"), []
    left = list(range(len(documents)))
    for r in range(len(rows)):
        row, origin = rows[r], []
        for segment in range(1, row.segment_ids.max() + 1):
            ids = bytes(row.tokens[row.segment_ids == segment].tolist())
            number = next(d for d in left if documents[d][0][: length + 1] == ids)  # none is split
            left.remove(number)
            origin += [(number, i) for i in range(len(ids))]
        origins.append(origin + [None] * (length + 5 - len(origin)))
    assert left == []
    for depth in range(1, 5):
        found = weights_of(rows, depth)
        np.testing.assert_array_equal(found, expected(documents, origins, length, depth))


def test_with_the_loss_on_all_tokens_there_is_no_mask(chats):
    corpus = chats([[("a question", "an answer")]] * 5, loss_on="all", sequence_length=16)
    assert "loss_mask" not in corpus.batches("train").batch_at(0)


def test_answers_of_a_prompt_of_messages_are_not_trained(chats, with_data, tmp_path):
    question, one, two = (
        {"role": "user", "content": "q"},
        *({"role": "assistant", "content": n} for n in ("one", "two")),
    )
    line = {"prompt": [question, one, question], "completion": [two]}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    base = chats([[("a", "b")]] * 3, sequence_length=16).config
    corpus = prepare(
        with_data(base, files=str(tmp_path / "pairs.jsonl"), records="prompt", packing="whole", sequence_length=200)
    )
    row = corpus.rows("train")[0]
    assert bytes(row.tokens[row.loss_mask > 0].tolist()) == b"two<|im_end|>\n"


def test_a_chat_that_the_template_refuses_is_named_or_skipped(chats):
    (template := chats([[("a", "b")]] * 3, sequence_length=16).config.data.chat_template)
    with open(template, "a") as file:
        file.write("{% if messages[0].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}")
    conversations = [[("good", "x")], [("bad", "y")], [("good", "z")]]
    with pytest.raises(
        UserError, match=r"data.files: .*jsonl line 2: .*no bad words.*; or set data.on_bad_record=skip"
    ):
        chats(conversations, sequence_length=16)
    corpus = chats(conversations, sequence_length=16, on_bad_record="skip")
    assert len(corpus.sources[0].store) == 2


@pytest.mark.parametrize(
    "change, words", [({"packing": "contiguous"}, "see another"), ({"chat_template": ""}, "no chat template")]
)
def test_settings_that_chats_refuse(chats, change, words):
    with pytest.raises(UserError, match=words):
        chats([[("a", "b")]] * 5, sequence_length=16, **change)


def test_rows_without_a_loss_are_refused_and_truncated_documents_noted(chats, capfd):
    """Of conversations that are longer than a row, the first tokens are those of the prompt."""
    conversations = [[(f"question {i}", "an answer")] for i in range(6)]
    with pytest.raises(
        UserError, match=r"data.source=text_files: no token of its training rows has .*; use longer rows"
    ):
        chats(conversations, packing="whole", sequence_length=40)
    assert "6 of its training documents are longer than a row of data.sequence_length=40" in capfd.readouterr().err
    corpus = chats([*conversations, [("a", "b" * 200)]], packing="whole", sequence_length=149)
    assert "1 of its training documents are longer" in capfd.readouterr().err
    assert max(corpus.sources[0].store.lengths) > 150


def test_the_fraction_that_fills_a_batch_of_whole_conversations_does(chats):
    conversations = [[("q", f"{i} " + "long " * 300)] for i in range(40)]  # of which a row holds only the beginning
    settings = {"packing": "whole", "sequence_length": 120, "batch_size": 8, "validation_fraction": 0.01}
    with pytest.raises(UserError, match="fewer than the data.batch_size=8") as error:
        chats(conversations, **settings)
    fraction = float(re.search(r"use data.validation_fraction=([\d.]+)", str(error.value))[1])
    assert len(chats(conversations, **{**settings, "validation_fraction": fraction}).rows("validation")) >= 8
