"""Mixtures of sources: the order in which rows are drawn, its shares, and how a run continues in it."""

import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mtp_jax.config import MixtureConfig, UserError, ValidationConfig
from mtp_jax.data import prepare
from mtp_jax.data.mixture import Mixture

WEIGHTS = st.sampled_from([0.1, 0.3, 0.7, 1.0, 2.5, 13.0])
LIMITS = st.none() | st.integers(1, 60)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(WEIGHTS, LIMITS), min_size=1, max_size=5))
def test_every_row_of_every_source_is_drawn_in_order(sources):
    weights, limits = zip(*sources, strict=True)
    mixture = Mixture(weights, limits)
    assert (mixture.num_rows is None) == (None in limits)
    drawn = [0] * len(weights)
    for n in range(300 if mixture.num_rows is None else mixture.num_rows):
        assert mixture.counts(n) == drawn
        source, row = mixture[n]
        assert row == drawn[source]
        drawn[source] += 1
        assert limits[source] is None or drawn[source] <= limits[source]
        if limits == (None,) * len(limits):  # evenly distributed at every moment
            shares = np.array(weights) / sum(weights)
            assert (np.abs(np.array(drawn) - (n + 1) * shares) < len(weights)).all()
    if mixture.num_rows is not None:
        assert drawn == list(limits)
        with pytest.raises(IndexError):
            mixture[mixture.num_rows]


def test_sources_that_are_left_keep_their_proportions():
    mixture = Mixture([1.0, 2.0, 1.0], [10, None, None])
    before, after = np.array(mixture.counts(40)), np.array(mixture.counts(40 + 300))
    assert before.tolist() == [10, 20, 10]
    assert (after - before).tolist() == [0, 200, 100]


def test_weights_are_exact_decimals():
    assert Mixture([0.3, 0.7], [None, None]).counts(10**9) == [3 * 10**8, 7 * 10**8]


@pytest.fixture
def mixed(make_config, with_data, tmp_path):
    """Makes the corpus of three sources whose documents name their source, with weights 0.5, 0.3, 0.2."""
    for name, size in [("a", 400), ("b", 150), ("c", 60)]:
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name * 40} {i}"}}\n' for i in range(size)))

    def make(changes=(), num_steps=1000, lookahead=0, **data):
        sources = [
            MixtureConfig(name=name, source="text_files", files=str(tmp_path / f"{name}.jsonl"), weight=weight)
            for name, weight in [("a", 0.5), ("b", 0.3), ("c", 0.2)]
        ]
        for i, change in dict(changes).items():
            sources[i] = dataclasses.replace(sources[i], **change)
        config = with_data(make_config(), source="python_source", synthetic_documents=2000, mixture=tuple(sources))
        config = with_data(config, **{"validation_fraction": 0.0, "batch_size": 4} | data)
        return prepare(
            dataclasses.replace(config, training=dataclasses.replace(config.training, num_steps=num_steps)), lookahead
        )

    return make


def sources_of(batch):
    """The source of each row, a letter. Every row is of one source."""
    texts = [bytes(i for i in row if i < 256).decode() for row in batch["tokens"].tolist()]
    found = [set(text) & set("abc") for text in texts]
    assert all(len(letters) == 1 for letters in found)
    return [letters.pop() for letters in found]


def test_the_shares_drawn_are_the_weights(mixed):
    corpus = mixed()
    batches = corpus.batches("train")
    drawn = collections.Counter(letter for step in range(250) for letter in sources_of(batches.batch_at(step)))
    counts = np.array([drawn[letter] for letter in "abc"])
    assert stats.chisquare(counts, 1000 * np.array([0.5, 0.3, 0.2])).pvalue > 0.05
    logged = corpus.drawn(250)
    for letter, count in zip("abc", counts, strict=True):
        share, epochs = logged[letter]
        assert share == count / 1000
        assert epochs == count / len(corpus.rows("train", "abc".index(letter)))
    assert logged["c"][1] > 1  # and the smallest source was repeated


@pytest.mark.parametrize("num_processes", [1, 2, 4])
def test_a_mixture_continues_at_any_step_on_any_number_of_processes(mixed, num_processes):
    corpus = mixed({2: {"max_epochs": 2}}, lookahead=2)
    whole = corpus.batches("train")
    size = 4 // num_processes
    for step in np.random.default_rng(0).choice(400, 100, replace=False).tolist():
        expected = whole.batch_at(step)
        for process in range(num_processes):
            part = slice(process * size, (process + 1) * size)
            batches = mixed({2: {"max_epochs": 2}}, lookahead=2) if step % 50 == 0 else corpus  # a new start
            with iter(batches.batches("train", step, (part.start, part.stop))) as iterator:
                batch = next(iterator)
            for name, rows in batch.items():
                np.testing.assert_array_equal(rows, expected[name][part])


def test_a_source_leaves_after_its_epochs_and_a_run_that_needs_more_is_refused(mixed):
    corpus = mixed({2: {"max_epochs": 1}})
    rows = len(corpus.rows("train", 2))
    drawn = [letter for step in range(1000) for letter in sources_of(corpus.batches("train").batch_at(step))]
    assert drawn.count("c") == rows and "c" not in drawn[len(drawn) // 2 :]
    assert corpus.drawn(1000)["c"][1] == 1.0
    limited = {i: {"max_epochs": 1} for i in range(3)}
    num_steps = sum(len(corpus.rows("train", i)) for i in range(3)) // 4
    assert mixed(limited, num_steps=num_steps).batches("train").num_batches == num_steps
    with pytest.raises(UserError, match=f"training.num_steps={num_steps + 1}: .*after {num_steps} steps; .*max_epochs"):
        mixed(limited, num_steps=num_steps + 1)


def test_held_out_documents_and_sets_of_their_own_have_names(mixed, tmp_path):
    (tmp_path / "new.txt").write_text("a new text\n\n" * 200)
    own = ValidationConfig(name="new", source="text_files", files=str(tmp_path / "new.txt"), max_document_chars=100)
    corpus = mixed(validation_fraction=0.3, validation=(own,), batch_size=2)
    assert list(corpus.validation_sets) == ["a", "b", "c", "new"]
    for name in "abc":
        assert set(sources_of(corpus.batches(name).batch_at(0))) == {name}
    text = bytes(i for i in corpus.batches("new").batch_at(0)["tokens"][0].tolist() if i < 256).decode()
    assert text.startswith("a new text")
    train = mixed(batch_size=2).num_tokens("train")
    held_out = sum(corpus.num_tokens(name) for name in "abc")
    assert corpus.num_tokens("train") + held_out == train  # the set of its own takes nothing away


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"source": "text_files"}, ["data.source='text_files'", "of no effect beside data.mixture"]),
        ({"packing": "whole"}, ["data.packing='whole'", "data.mixture"]),
        ({"changes": {1: {"name": "a"}}}, ["data.mixture[1].name='a'", "another source"]),
        ({"changes": {1: {"name": ""}}}, ["data.mixture[1].name=''", "must be a word"]),
        ({"changes": {0: {"files": "none.txt"}}}, ["data.mixture[0].files=none.txt", "matches no file"]),
        (
            {"changes": {0: {"records": "chat", "packing": "contiguous"}}},
            ["data.mixture[0].packing=contiguous", "whole"],
        ),
        ({"changes": {0: {"weights_field": "w"}}}, ["data.mixture[0].weights_field='w'", "records=tokens"]),
        (
            {"changes": {0: {"packing": "whole"}}, "fim_rate": 0.5},
            ["data.fim_rate=0.5", "data.mixture[0].packing=whole"],
        ),
        ({"sequence_length": 60_000}, ["data.mixture[0].source=text_files: its train split", "0 rows"]),
    ],
)
def test_what_cannot_be_mixed_is_refused(mixed, changes, words):
    with pytest.raises(UserError) as error:
        mixed(**changes)
    assert all(word in str(error.value) for word in words), error.value
