"""Records become documents of four forms; each record that cannot be used names its origin, cause and remedy."""

import json
import pickle

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data.documents import Chat, Prompt, Text, Tokens, documents
from mtp_jax.data.formats import read_files
from mtp_jax.data.records import BadRecord, Record, needed_columns

USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def made(value, **settings):
    """The documents of one record."""
    return list(documents([Record("PATH line 3", value)], SourceConfig(**settings), "data.mixture[1]."))


def test_text():
    assert made({"text": "x"}) == [Text("x", "PATH line 3")]
    assert made("plain") == [Text("plain", "PATH line 3")]
    assert made({"text": b"\xc3\xa9"}) == [Text("é", "PATH line 3")]
    assert made({"text": ""}) == made("") == made({"text": b""}) == []


def test_names_of_nested_fields():
    assert made({"a": {"b": {"c": "deep"}}}, text_field="a.b.c") == [Text("deep", "PATH line 3")]
    assert made({"a": {"b": "nested"}, "a.b": "literal"}, text_field="a.b") == [Text("literal", "PATH line 3")]
    (bad,) = made({"a": {"c": "x"}, "d": 1}, text_field="a.b")
    assert str(bad) == "PATH line 3: has no field 'a.b', only ['a.c', 'd']; set data.mixture[1].text_field"


def test_chat_in_every_form():
    chat = Chat((USER, ANSWER), origin="PATH line 3")
    sharegpt = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]
    assert made({"messages": [USER, ANSWER]}, records="chat") == [chat]
    assert made({"conversations": sharegpt}, records="chat", messages_field="conversations") == [chat]
    columns = {"role": ["user", "assistant"], "content": ["hi", "hello"]}
    assert made({"messages": columns}, records="chat") == [chat]
    with_null = [{**USER, "tool_calls": None}, {**ANSWER, "tool_calls": None}]
    assert made({"messages": with_null, "tools": None}, records="chat") == [chat]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "weight": 1}
    tools = [{"type": "function"}]
    (found,) = made({"messages": [USER, call], "tools": json.dumps(tools)}, records="chat")
    assert found.messages == (USER, {**call, "content": ""}) and found.tools == ({"type": "function"},)
    assert made({"messages": [USER, call], "tools": tools}, records="chat") == [found]
    assert made({"messages": [USER]}, records="chat", loss_on="all") == [Chat((USER,), origin="PATH line 3")]


def test_prompt():
    assert made({"prompt": "a", "completion": "b"}, records="prompt") == [Prompt("a", "b", "PATH line 3")]
    settings = {"records": "prompt", "prompt_field": "q.text", "completion_field": "r"}
    assert made({"q": {"text": ""}, "r": "b"}, **settings) == [Prompt("", "b", "PATH line 3")]
    assert made({"prompt": "", "completion": ""}, records="prompt") == []
    (chat,) = made({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]}, records="prompt")
    assert chat == Chat((USER, ANSWER, USER, ANSWER), None, 3, "PATH line 3")


def test_tokens():
    (found,) = made({"tokens": [3, 0, 2**31 - 1]}, records="tokens")
    assert found.ids.dtype == np.int32 and found.ids.tolist() == [3, 0, 2**31 - 1] and found.weights is None
    (found,) = made({"tokens": np.uint16([3, 4]), "w": [0, 0.5]}, records="tokens", weights_field="w")
    assert found.weights.dtype == np.float32 and found.weights.tolist() == [0, 0.5]
    (found,) = made({"tokens": [3, 4], "w": [True, False]}, records="tokens", weights_field="w")
    assert found.weights.tolist() == [1, 0]
    assert made({"tokens": []}, records="tokens") == []
    assert isinstance(found, Tokens) and found.origin == "PATH line 3"


ONE = {"prompt": "a", "completion": "b"}
CHAT, PROMPT, IDS = {"records": "chat"}, {"records": "prompt"}, {"records": "tokens"}
WEIGHTED = {"records": "tokens", "weights_field": "w"}
BAD = {
    "null": ({"text": None}, {}, ["field 'text' is null, not a string; set P.text_field, or remove the record"]),
    "a number": ({"text": 3}, {}, ["field 'text' is int, not a string"]),
    "bytes": ({"text": b"\xff"}, {}, ["field 'text' is not UTF-8 (invalid start byte at byte 0)"]),
    "a surrogate": ({"text": "\ud800"}, {}, ["field 'text' holds half a surrogate pair, not text; remove it"]),
    "another name": ({"body": "x"}, {}, ["has no field 'text', only ['body']; set P.text_field"]),
    "a usual name": ({"content": "x"}, {}, ["only ['content']; set P.text_field=content"]),
    "a chat": ({"messages": [USER]}, {}, ["has no field 'text', only ['messages']; set P.records=chat"]),
    "a ShareGPT chat": (
        {"conversations": []},
        {},
        ["only ['conversations']; set P.records=chat and P.messages_field=conversations"],
    ),
    "a prompt": (ONE, {}, ["only ['completion', 'prompt']; set P.records=prompt"]),
    "tokens": ({"input_ids": [1]}, {}, ["set P.records=tokens and P.tokens_field=input_ids"]),
    "a text": ({"text": "x"}, CHAT, ["has no field 'messages', only ['text']; set P.records=text"]),
    "no list": (
        {"messages": "hi"},
        CHAT,
        ["field 'messages' is str, not a list of messages; set P.mess"],
    ),
    "no messages": ({"messages": []}, CHAT, ["field 'messages' has no messages; remove the record"]),
    "null messages": ({"messages": None}, CHAT, ["field 'messages' is null, not a list of messages"]),
    "columns": (
        {"messages": {"role": ["user"], "content": []}},
        CHAT,
        ["has lists of several lengths; give one entry per message"],
    ),
    "no assistant": (
        {"messages": [USER]},
        CHAT,
        ["has no message of the assistant, so no token has a loss; remove the record, or set P.loss_on=all"],
    ),
    "no object": ({"messages": ["hi"]}, CHAT, ["messages[0] is str, not an object; write {"]),
    "no content": (
        {"messages": [USER, {"role": "assistant"}]},
        CHAT,
        ["messages[1] has no content, only ['role']; add content"],
    ),
    "null content": (
        {"messages": [USER, {"role": "assistant", "content": None}]},
        CHAT,
        ["messages[1] has a content that is null, not a string"],
    ),
    "no role": ({"messages": [{"content": "x"}]}, CHAT, ["messages[0] has no role, only ['content']"]),
    "an unknown role": (
        {"messages": [{"from": "narrator", "value": "x"}]},
        CHAT,
        ["messages[0] is from 'narrator', which is no known role; use one of human, gpt, system"],
    ),
    "a surrogate in a chat": (
        {"messages": [USER, {**ANSWER, "calls": [{"x": "\udc00"}]}]},
        CHAT,
        ["field 'messages' holds half a surrogate pair"],
    ),
    "tools": (
        {"messages": [USER, ANSWER], "tools": "x"},
        CHAT,
        ["field 'tools' is a string that is not"],
    ),
    "tools of another type": (
        {"messages": [USER, ANSWER], "tools": [1]},
        CHAT,
        ["not a list of objects"],
    ),
    "no completion": (
        {"prompt": "x"},
        PROMPT,
        ["has no field 'completion', only ['prompt']; set P.compl"],
    ),
    "an empty completion": (
        {"prompt": "x", "completion": ""},
        PROMPT,
        ["field 'completion' is empty, so no token has a loss; remove the record, or set P.loss_on=all"],
    ),
    "a null prompt": ({"prompt": None, "completion": "x"}, PROMPT, ["field 'prompt' is null"]),
    "string and list": (
        {"prompt": "x", "completion": [ANSWER]},
        PROMPT,
        ["field 'prompt' is str and 'completion' is list; give two strings, or two lists of messages"],
    ),
    "a completion without an answer": (
        {"prompt": [USER, ANSWER], "completion": [USER]},
        PROMPT,
        ["field 'completion' has no message of the assistant"],
    ),
    "no list of tokens": (
        {"tokens": "12"},
        IDS,
        ["field 'tokens' is str, not a list of numbers; set P.tok"],
    ),
    "a negative id": (
        {"tokens": [1, -1]},
        IDS,
        ["field 'tokens' holds -1, which is no id; give ids"],
    ),
    "a huge id": ({"tokens": [1, 2**31]}, IDS, ["field 'tokens' holds 2147483648, which is no id"]),
    "a vast id": ({"tokens": [1, 2**70]}, IDS, [f"field 'tokens' holds {2**70}, which is no id"]),
    "a fraction": ({"tokens": [1, 2.5]}, IDS, ["field 'tokens' holds 2.5, which is no id"]),
    "fractions": ({"tokens": np.float32([1])}, IDS, ["field 'tokens' holds 1.0, which is no id"]),
    "a null id": ({"tokens": [1, None]}, IDS, ["field 'tokens' holds None, which is no id"]),
    "words": ({"tokens": ["a"]}, IDS, ["field 'tokens' holds 'a', which is no id"]),
    "nested ids": (
        {"tokens": [[1], [2, 3]]},
        IDS,
        ["field 'tokens' is nested, not a list of numbers"],
    ),
    "no weights": (
        {"tokens": [1]},
        WEIGHTED,
        ["has no field 'w', only ['tokens']; set P.weights_field, or leave it empty"],
    ),
    "null weights": (
        {"tokens": [1], "w": None},
        WEIGHTED,
        ["field 'w' is null, not a list of numbers"],
    ),
    "another length": (
        {"tokens": [1, 2], "w": [1]},
        WEIGHTED,
        ["field 'w' has 1 weights for 2 tokens; give one per token"],
    ),
    "a negative weight": (
        {"tokens": [1, 2], "w": [1, -0.5]},
        WEIGHTED,
        ["field 'w' has the weight -0.5 at token 1; give finite weights of at least 0"],
    ),
    "NaN": ({"tokens": [1], "w": [float("nan")]}, WEIGHTED, ["the weight nan at"]),
    "infinity": ({"tokens": [1], "w": [1e39]}, WEIGHTED, ["the weight inf at"]),
    "a null weight": (
        {"tokens": [1], "w": [None]},
        WEIGHTED,
        ["field 'w' holds None, which is no weight"],
    ),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BAD)
def test_a_record_that_cannot_be_used(name):
    value, settings, words = BAD[name]
    (bad,) = made(value, **settings)
    assert isinstance(bad, BadRecord) and bad.origin == "PATH line 3"
    assert str(bad).startswith("PATH line 3: ") and "\n" not in str(bad)
    for each in words:
        assert each.replace("P.", "data.mixture[1].") in str(bad), str(bad)


def test_plain_text_is_no_chat():
    with pytest.raises(UserError) as caught:
        made("x", records="chat")
    assert not isinstance(caught.value, BadRecord)
    assert str(caught.value).startswith("data.mixture[1].records=chat: PATH line 3 is plain text, which has no fields;")


def test_bad_records_of_a_reader_pass():
    bad = BadRecord("PATH line 1", "not JSON", "correct it")
    assert list(documents([bad, Record("PATH line 2", "x")], SourceConfig())) == [bad, Text("x", "PATH line 2")]


def test_a_bad_record_pickles():
    bad = BadRecord("PATH line 1", "not JSON", "correct it")
    copy = pickle.loads(pickle.dumps(bad))
    assert str(copy) == str(bad) and copy.remedy == "correct it"


def test_columns_that_are_needed():
    def needed(columns, **settings):
        return needed_columns(SourceConfig(**settings), columns)

    assert needed(["image", "text"]) == ["text"]
    assert needed(["image"]) is None
    assert needed(["a", "a.b"], text_field="a.b") == ["a.b"]
    assert needed(["b", "a"], text_field="a.b") == ["a"]
    assert needed(["tools", "messages", "id"], records="chat") == ["tools", "messages"]
    assert needed(["w", "tokens", "id"], records="tokens", weights_field="w") == ["w", "tokens"]
    assert needed(["completion", "prompt", "id"], records="prompt") == ["completion", "prompt"]


def test_chats_are_the_same_from_lines_and_tables(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    rows = [{"messages": [USER, ANSWER], "tools": None}, {"messages": [USER, call], "tools": [{"name": "f"}]}]
    (tmp_path / "x.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    settings = SourceConfig(records="chat")
    lines, table = (
        [(chat.messages, chat.tools) for chat in documents(read_files([str(tmp_path / name)], settings), settings)]
        for name in ("x.jsonl", "x.parquet")
    )
    assert lines == table and len(lines) == 2
