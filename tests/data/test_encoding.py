"""Documents to ids and loss weights, in this process and in others."""

import numpy as np
import pytest

from mtp_jax.config import UserError
from mtp_jax.data import encoding
from mtp_jax.data.documents import Prompt, Text, Tokens
from mtp_jax.data.encoding import Encoder, encode
from mtp_jax.data.records import BadRecord
from mtp_jax.data.tokenizer import ByteTokenizer


def same(a, b):
    """Asserts that two lists of encoded documents are equal; returns True."""
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        if isinstance(x, BadRecord):
            assert str(x) == str(y)
            continue
        assert x.key == y.key and x.num_bytes == y.num_bytes and (x.weights is None) == (y.weights is None)
        np.testing.assert_array_equal(x.ids, y.ids)
        if x.weights is not None:
            np.testing.assert_array_equal(x.weights, y.weights)
    return True


def test_the_order_is_that_of_the_documents_also_among_processes(monkeypatch):
    monkeypatch.setattr(encoding, "_BATCH_SIZE", 100)
    monkeypatch.setattr(encoding, "_BATCHES_HERE", 2)
    documents = [
        BadRecord(f"record {i}", "is null", "remove it")
        if i % 7 == 0
        else Prompt("q" * (i % 30), f"answer {i}")
        if i % 3 == 0
        else Text(f"text {i} " * (i % 20))
        for i in range(400)
    ]
    alone = encode(documents, ByteTokenizer())
    assert same(list(Encoder("bytes").encode(documents)), alone)
    assert 300 < len(alone) < 400  # empty texts are left out


def test_an_error_of_a_process_is_raised_here(monkeypatch, tmp_path):
    monkeypatch.setattr(encoding, "_BATCHES_HERE", 0)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a readable tokenizer.json"):
        list(Encoder(str(tmp_path / "tokenizer.json")).encode([Text("text")]))


def test_a_prompt_has_no_weight_and_its_completion_and_end_have():
    (answer,) = encode([Prompt("1+1=", "2")], ByteTokenizer())
    assert answer.ids.tolist() == [256, *b"1+1=2", 257]
    assert answer.weights.tolist() == [0, 0, 0, 0, 0, 1, 1]
    (whole,) = encode([Prompt("1+1=", "2")], ByteTokenizer(), loss_on="all")
    assert whole.weights is None and whole.ids.tolist() == answer.ids.tolist()
    (other,) = encode([Prompt("1+1", "=2")], ByteTokenizer())
    assert len({answer.key, whole.key, other.key}) == 3  # other weights are other data


def test_ids_keep_their_weights_and_stay_in_the_vocabulary():
    ids, weights = np.array([5, 256, 97], np.int32), np.array([0.5, 0, 2], np.float32)
    good, bad = encode([Tokens(ids, weights), Tokens(ids + 200, origin="record 2")], ByteTokenizer())
    assert good.ids.tolist() == ids.tolist() and good.weights.tolist() == weights.tolist() and good.num_bytes == 2
    assert str(bad).startswith("record 2: has the id 456, and the ids of data.tokenizer are below 261; ")
    other = encode([Tokens(ids, weights * 2)], ByteTokenizer())[0]
    assert other.key != good.key  # other weights are other data
