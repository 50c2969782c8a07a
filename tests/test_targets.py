"""mtp_jax.targets against a loop over each document alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mtp_jax import targets
from tests.reference import targets as reference


@st.composite
def packed_rows(draw):
    """(tokens, segment_ids, depth): rows of packed documents, often of length 1, often with padding at the end."""
    depth = draw(st.integers(0, 4))
    length = draw(st.sampled_from([1, 5, 11])) + 1 + depth  # few shapes: each is compiled
    segment_ids = np.zeros((2, length), np.int32)
    for row in segment_ids:
        end = length - draw(st.integers(0, length))  # what is left is padding
        names = draw(st.permutations(range(1, length + 1)))  # ids need not grow
        start, number = 0, 0
        while start < end:
            size = draw(st.integers(1, end - start))
            row[start : start + size] = names[number]
            start, number = start + size, number + 1
    seed = draw(st.integers(0, 2**16))
    tokens = np.random.default_rng(seed).integers(1, 1000, segment_ids.shape).astype(np.int32)
    return tokens, segment_ids, depth


def row_of(*lengths, padding=0):
    """Segment ids of documents of these lengths, in one row."""
    ids = [number for number, length in enumerate(lengths, 1) for _ in range(length)]
    return np.array([ids + [0] * padding], np.int32)


def shift_step_by_step(segment_ids, depth):
    """MaxText's mistake: shift the mask and the segment ids once a depth and compare neighbours in the shifted row.

    valid_k[i] becomes s[i + k] == s[i + k + 1], which does not depend on document s[i].
    """
    T = segment_ids.shape[1] - 1 - depth
    shifted, out = segment_ids, []
    for _ in range(depth + 1):
        here, there = shifted[:, :-1], shifted[:, 1:]
        out.append(((here == there) & (here != 0))[:, :T])
        shifted = there
    return np.stack(out)


@settings(max_examples=200, deadline=None)
@given(packed_rows())
def test_packed_documents_do_not_leak_into_each_other(rows):
    tokens, segment_ids, depth = rows
    got, expected = targets.build(tokens, segment_ids, depth), reference.build(tokens, segment_ids, depth)
    valid, usable = np.asarray(got.valid), expected.usable
    np.testing.assert_array_equal(valid, expected.valid)
    np.testing.assert_array_equal(np.asarray(got.targets)[valid], expected.targets[valid])
    np.testing.assert_array_equal(np.asarray(got.inputs)[usable], expected.inputs[usable])
    assert not (valid & ~usable).any(), "a depth with a target has its input"


@settings(max_examples=200, deadline=None)
@given(packed_rows())
def test_no_input_of_another_document_is_usable(rows):
    tokens, segment_ids, depth = rows
    expected = reference.build(tokens, segment_ids, depth)
    T = tokens.shape[1] - 1 - depth
    got = np.asarray(targets.input_segments(segment_ids[:, :-1], depth))
    assert got.shape == (depth + 1, len(tokens), T)
    np.testing.assert_array_equal(got, np.where(expected.usable, segment_ids[None, :, :T], 0))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_the_oracle_tells_a_step_by_step_shift_apart(depth):
    segment_ids = row_of(3, 8 + depth, padding=2)
    tokens = np.arange(segment_ids.size, dtype=np.int32)[None]
    expected = reference.build(tokens, segment_ids, depth).valid
    wrong = shift_step_by_step(segment_ids, depth)
    np.testing.assert_array_equal(wrong[0], expected[0])  # the main model looks right, which is how it shipped
    for k in range(1, depth + 1):
        assert wrong[k, 0, 2] and not expected[k, 0, 2], "the first document's last token reads the second document"


def test_each_token_is_the_main_target_once():
    depth, T, stream = 2, 4, np.arange(100, 100 + 3 * 4 + 3, dtype=np.int32)
    rows = np.stack([stream[i * T : i * T + T + 1 + depth] for i in range(3)])  # overlap by 1 + D
    built = targets.build(rows, np.ones_like(rows), depth)
    np.testing.assert_array_equal(np.asarray(built.targets[0]).ravel(), stream[1 : 3 * T + 1])
    assert np.asarray(built.valid).all(), "no depth loses a target at the end of the row"


def test_padding_is_no_document():
    segment_ids = row_of(2, padding=5)
    built = targets.build(np.ones_like(segment_ids), segment_ids, 1)
    assert np.asarray(built.valid).sum() == 1


@pytest.mark.parametrize(
    ("tokens_shape", "segments_shape", "depth"),
    [((2, 5), (2, 6), 1), ((5,), (5,), 1), ((2, 3), (2, 3), 2), ((2, 5), (2, 5), -1)],
)
def test_rows_that_cannot_be_used_are_refused(tokens_shape, segments_shape, depth):
    with pytest.raises(ValueError, match="tokens"):
        targets.build(np.ones(tokens_shape, np.int32), np.ones(segments_shape, np.int32), depth)
