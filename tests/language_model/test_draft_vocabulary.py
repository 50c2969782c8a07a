"""The choice of a draft vocabulary, and its file."""

import json

import numpy as np
import pytest

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.language_model import draft_vocabulary
from mtp_jax.language_model.draft_vocabulary import choose
from mtp_jax.training.init_from import copy_sides


def test_the_most_frequent_tokens_are_chosen():
    counts = np.array([5, 9, 0, 9, 5, 5, 1, 0])
    assert choose(counts, 1).tolist() == [1]
    assert choose(counts, 2).tolist() == [1, 3]
    assert choose(counts, 4).tolist() == [0, 1, 3, 4]  # the smaller of three equal ones
    assert choose(counts, 7).tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert choose(counts, 4).dtype == np.int32


def test_end_tokens_are_among_the_chosen():
    counts = np.array([5, 9, 0, 9, 5, 5, 1, 0])
    assert choose(counts, 3, end_tokens=(7,)).tolist() == [1, 3, 7]
    assert choose(counts, 3, end_tokens=(7, 2, 7)).tolist() == [1, 2, 7]
    assert choose(counts, 3, end_tokens=(3,)).tolist() == [0, 1, 3]
    assert choose(counts, 3, end_tokens=(8, 100)).tolist() == [0, 1, 3]  # not of the model


@pytest.mark.parametrize(
    ("size", "end_tokens", "message"),
    [
        (0, (), "size=0: must be at least 1"),
        (-3, (), "size=-3: must be at least 1"),
        (1, (2, 5), "size=1: must be at least 2, the number of end-of-text ids [2, 5]"),
        (8, (), "size=8: must be below the model's vocabulary of 8"),
        (9, (), "size=9: must be below the model's vocabulary of 8"),
    ],
)
def test_unusable_sizes_are_refused(size, end_tokens, message):
    with pytest.raises(UserError) as caught:
        choose(np.arange(8), size, end_tokens)
    assert str(caught.value) == message


def test_the_file_of_a_workdir_is_in_its_folder_of_side_files(tmp_path):
    (tmp_path / "config.json").write_text('{"model": {}}')
    made = draft_vocabulary.from_counts(tmp_path, np.array([2, 0, 0, 5, 1, 2]), 2, end_tokens=[1])
    assert made.ids.tolist() == [1, 3] and made.num_tokens_counted == 10 and made.coverage == 0.5
    written = json.loads((tmp_path / "hf" / "draft_vocabulary.json").read_text())
    assert written == {"ids": [1, 3], "num_tokens_counted": 10, "coverage": 0.5}
    found = draft_vocabulary.read(tmp_path / "hf", 6)
    assert found.tolist() == [1, 3] and found.dtype == np.int32
    assert draft_vocabulary.read(tmp_path, 6) is None
    assert draft_vocabulary.remove(tmp_path) and not draft_vocabulary.remove(tmp_path)
    assert draft_vocabulary.read(tmp_path / "hf", 6) is None


def test_the_file_may_be_in_an_object_store(bucket):
    """Also where it is the only side file of a workdir from which another one starts."""
    first, second = f"{bucket.url}/first", f"{bucket.url}/second"
    storage.write_text(f"{first}/config.json", "{}")
    draft_vocabulary.from_counts(first, np.arange(6), 2)
    copy_sides(first, second)
    assert bucket.objects()["second/hf/draft_vocabulary.json"] == bucket.objects()["first/hf/draft_vocabulary.json"]
    assert draft_vocabulary.read(f"{second}/hf", 6).tolist() == [4, 5]
    assert draft_vocabulary.remove(second) and not draft_vocabulary.remove(second)


def test_the_file_of_a_hugging_face_folder_is_in_the_folder(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    draft_vocabulary.from_counts(tmp_path, np.arange(6), 2)
    assert draft_vocabulary.read(tmp_path, 6).tolist() == [4, 5]


def test_counts_without_a_token_are_refused(tmp_path):
    with pytest.raises(UserError, match="no tokens were counted for draft_vocabulary.json; give texts"):
        draft_vocabulary.from_counts(tmp_path, np.zeros(6, int), 2)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "hf").write_text("a file")
    with pytest.raises(UserError, match=r"hf/draft_vocabulary.json: cannot be written .*; make its folder writable"):
        draft_vocabulary.from_counts(tmp_path, np.arange(6), 2)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("{", "cannot be read as JSON"),
        ("[1, 2]", "holds a list, not a JSON object"),
        ('{"coverage": 1.0}', "field 'ids' is missing"),
        ('{"ids": []}', "field 'ids'=[] must be a list of one or more integers"),
        ('{"ids": 3}', "field 'ids'=3 must be a list of one or more integers"),
        ('{"ids": [1, 2.0]}', "field 'ids'=[1, 2.0] must be a list of one or more integers"),
        ('{"ids": [true, 2]}', "field 'ids'=[True, 2] must be a list of one or more integers"),
        ('{"ids": [1, 4, 4]}', "field 'ids' has 4 after 4 and must increase"),
        ('{"ids": [4, 1]}', "field 'ids' has 1 after 4 and must increase"),
        ('{"ids": [4, 6]}', "field 'ids' has 6, outside the model's vocabulary of 6"),
        ('{"ids": [-1, 4]}', "field 'ids' has -1, outside the model's vocabulary of 6"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, content, problem):
    path = tmp_path / "draft_vocabulary.json"
    path.write_text(content)
    with pytest.raises(UserError) as caught:
        draft_vocabulary.read(tmp_path, 6)
    message = str(caught.value)
    assert message.startswith(f"{path}: {problem}") and "\n" not in message
    assert message.endswith("; make it again with mtp_jax.tools.draft_vocabulary, or remove it")
