"""Texts that are read from files, and the places where they are split."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_jax import storage
from mtp_jax.config import DataConfig, UserError
from mtp_jax.data import documents, files, synthetic
from mtp_jax.data.formats import read_files
from mtp_jax.data.formats.text import split_lines


@given(st.lists(st.text("ab \n\r", max_size=30)), st.integers(1, 40))
def test_pieces_of_a_text_lose_nothing(pieces, max_chars):
    lines = "\n\n".join(pieces).splitlines(keepends=True)
    split = list(split_lines(lines, max_chars))
    assert "".join(split) == "".join(lines)
    assert all(split)
    for document in split:  # only a single line may be longer
        assert len(document) <= max_chars or len(document.splitlines()) == 1


def test_splits_are_at_blank_lines_first():
    text = "one\ntwo\n\nthree\nfour\n\nfive\nsix\n"
    assert list(split_lines(text.splitlines(keepends=True), 16)) == [
        "one\ntwo\n\n",
        "three\nfour\n\n",
        "five\nsix\n",
    ]


def test_real_text_is_split_without_loss(real_data, tmp_path):
    path = real_data("text/tinyshakespeare.txt")
    with open(path, "rb") as file:
        content = file.read()
    unix_style = b"\r\n" + content.replace(b"\n", b"\r\n")[:300_000] + "é\u2028".encode()
    (tmp_path / "dos.txt").write_bytes(unix_style)
    for name, whole in [(path, content), (str(tmp_path / "dos.txt"), unix_style)]:
        texts = [record.value for record in read_files([name], DataConfig(max_document_chars=4000))]
        assert "".join(texts).encode() == whole
        assert max(map(len, texts)) <= 4000
        assert sum(text.endswith(("\n\n", "\r\n\r\n")) for text in texts[:-1]) == len(texts) - 1


def test_globs(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt", "deep/er/c.txt", "deep/d.md", "odd[1].txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    monkeypatch.chdir(tmp_path)
    deep = os.path.join("deep", "er", "c.txt")
    assert files.match_files("*.txt") == ["a.txt", "b.txt", "odd[1].txt"]
    assert files.match_files("b.txt, *.txt ,deep/**") == ["b.txt", "a.txt", "odd[1].txt", "deep/d.md", deep]
    assert files.match_files("('a.txt', '**/*.md')") == ["a.txt", "deep/d.md"]
    assert files.match_files("['odd[1].txt']") == ["odd[1].txt"]
    for pattern, problem in [
        ("", "data.files is empty"),
        (" , ", "data.files is empty"),
        ("*.rst", r"data.files=\*.rst: matches no file"),
        ("a.txt,gone.txt", "data.files=gone.txt: matches no file"),
        ("deep", "data.files=deep: is a folder"),
        ("('a.txt'", "not a tuple of strings"),
        ("(1, 2)", "not a tuple of strings"),
    ]:
        with pytest.raises(UserError, match=problem):
            files.match_files(pattern)


def test_json_lines(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes('\ufeff{"body": "first \u2028 line"}\r\n\n{"body": ""}\n{"body": "last", "n": 1}'.encode())
    settings = DataConfig(text_field="body")
    found = list(documents.documents(read_files([str(path)], settings), settings))
    assert found == [
        documents.Text("first \u2028 line", f"{path} line 1"),
        documents.Text("last", f"{path} line 4"),
    ]


def test_synthetic_documents_are_a_function_of_the_seed():
    first, again, other = (list(synthetic.synthetic_documents(50, seed)) for seed in (0, 0, 1))
    assert first == again != other
    assert list(synthetic.synthetic_documents(20, 0)) == first[:20]
    assert len(set(first)) == 50
    kinds = ("copy ", "reverse ", "count: ", " + ")
    assert all(any(kind in "".join(first) for kind in kinds) for kind in kinds)
    for line in "".join(first).splitlines():
        if " + " in line and " = " in line:
            a, _, b, _, c = line.split()
            assert int(a) + int(b) == int(c)


def test_files_in_an_object_store(bucket):
    root = storage.path(bucket.url) / "books"
    for name, text in (("a.txt", "one\r\n"), ("sub/b.txt", "two\n"), ("c.jsonl", '{"text": "three"}\n')):
        storage.write_text(root / name, text)
    paths = files.match_files(f"{bucket.url}/books/**/*.txt,{bucket.url}/books/c.jsonl")
    assert paths == [f"{bucket.url}/books/{name}" for name in ("a.txt", "sub/b.txt", "c.jsonl")]
    found = documents.documents(read_files(paths, DataConfig()), DataConfig())
    assert [document.text for document in found] == ["one\r\n", "two\n", "three"]
    with pytest.raises(UserError, match=f"data.files={bucket.url}/books: matches no object; for a folder, write"):
        files.match_files(f"{bucket.url}/books")
    with pytest.raises(UserError, match="ftp:// is not supported"):
        files.match_files("ftp://x/*")
