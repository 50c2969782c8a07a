"""Local benchmark files, and the messages where they are missing or corrupt."""

import json

import pytest

from mtp_jax.config import UserError
from mtp_jax.evaluation import benchmark_data


@pytest.fixture
def data_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("MTP_DATA_DIR", str(tmp_path))
    return tmp_path


def test_objects_come_in_order_and_separators_inside_strings_are_not_lines(data_dir):
    rows = [{"a": 1, "text": "one\u2028two\x85three"}, {"a": 2, "text": ""}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    (data_dir / "x.jsonl").write_text(text + "\n\n", encoding="utf-8")
    assert benchmark_data.read_jsonl("x.jsonl") == rows


def test_splits_become_datasets():
    datasets = pytest.importorskip("datasets")
    splits = benchmark_data.dataset(test=[{"a": 1}, {"a": 2}], validation=[{"a": 3}])
    assert list(splits) == ["test", "validation"] and isinstance(splits["test"], datasets.Dataset)
    assert splits["test"]["a"][:] == [1, 2]


@pytest.mark.parametrize("value", [None, "", "no/such/folder", __file__])
def test_without_a_folder_the_variable_is_named(monkeypatch, value):
    monkeypatch.delenv("MTP_DATA_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("MTP_DATA_DIR", value)
    with pytest.raises(UserError, match="^MTP_DATA_DIR.*(is not set|is not a folder); set it to"):
        benchmark_data.folder()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "MTP_DATA_DIR=.*has no x.jsonl; put"),
        (b"", "x.jsonl: is empty"),
        (b'{"a": 1}\n{"a":', "x.jsonl:2: is not JSON"),
        (b'{"a": 1}\n[1]', "x.jsonl:2: is not a JSON object"),
        (b'{"a": 1}\n\n{"b": 1}', "x.jsonl:3: has no field 'a'"),
        (b"\xff\xfe", "x.jsonl: cannot be read"),
    ],
)
def test_a_missing_or_corrupt_file_is_one_line_that_names_it(data_dir, content, says):
    if content is not None:
        (data_dir / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=says) as error:
        benchmark_data.read_jsonl("x.jsonl", fields=["a"])
    assert "\n" not in str(error.value)
