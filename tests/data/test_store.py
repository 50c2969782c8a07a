"""The token store and its splits; several processes at once."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mtp_jax.config import UserError
from mtp_jax.data import prepare, store


def test_documents_come_back(make_store, bare_tokenizer):
    texts = ["a", "é" * 5000, "漢字\n", "a"]
    marked, bare = make_store(texts), make_store(texts, bare_tokenizer)
    assert len(marked) == len(bare) == 4
    for i, text in enumerate(texts):
        assert marked.document(i).tolist() == [256, *text.encode(), 257]
        assert bare.document(i).tolist() == list(text.encode())
        assert marked.num_bytes[i] == len(text.encode())
    assert marked.hashes[0] == marked.hashes[3] != marked.hashes[1]
    assert marked.tokens.dtype == np.uint16


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=30), st.floats(0, 1))
def test_splits_are_disjoint_complete_and_keep_equal_documents_together(hashes, fraction):
    hashes = np.array(hashes + hashes[:3], np.uint64)
    train, validation = store.split_documents(hashes, fraction)
    assert sorted([*train, *validation]) == list(range(len(hashes)))
    assert not set(hashes[train]) & set(hashes[validation])
    if 0 < fraction < 1:
        assert len(train)
        assert len(validation) or len(set(hashes.tolist())) == 1
    if fraction == 0:
        assert not len(validation)


def test_split_has_about_its_fraction_and_grows_with_it(make_store):
    hashes = make_store([f"text {i}" for i in range(5000)]).hashes
    small, large = (set(store.split_documents(hashes, f)[1].tolist()) for f in (0.02, 0.1))
    assert small < large
    assert abs(len(small) / 5000 - 0.02) < 0.01 and abs(len(large) / 5000 - 0.1) < 0.02


def test_equal_documents_land_in_the_same_split(make_config, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "this is document {i % 100}"}}\n' for i in range(400)))
    corpus = prepare(make_config(source="text_files", files=str(tmp_path / "a.jsonl"), batch_size=2))
    texts = [
        {corpus.sources[0].store.document(i).tobytes() for i in split}
        for split in (corpus.sources[0].train, corpus.sources[0].validation)
    ]
    assert all(texts) and not texts[0] & texts[1]
    assert len(corpus.sources[0].train) + len(corpus.sources[0].validation) == 400


def test_fingerprint_is_that_of_the_content(make_config, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "document {i}"}}\n' for i in range(200)))
    a, b = (prepare(make_config(source="text_files", files=str(tmp_path / f"{n}.jsonl"), batch_size=2)) for n in "ab")
    assert a.sources[0].store.directory != b.sources[0].store.directory
    assert a.fingerprint == b.fingerprint != prepare(make_config()).fingerprint


def test_empty_source_is_refused(make_store):
    with pytest.raises(UserError, match="test: holds no text"):
        make_store([])


def test_damaged_store_names_its_folder(make_store):
    made = make_store(["some text"])
    (made.directory / "tokens.bin").write_bytes(b"")
    with pytest.raises(UserError, match=f"{made.directory} is damaged .*remove that folder"):
        store.TokenStore(made.directory)


def test_processes_that_prepare_at_once_agree(make_config, tmp_path):
    lines = "".join(f'{{"text": "document {i} {"word " * (i % 50)}"}}\n' for i in range(3000))
    (tmp_path / "a.jsonl").write_text(lines)
    config = make_config(source="text_files", files=str(tmp_path / "a.jsonl"), cache_dir=str(tmp_path / "cache"))
    program = textwrap.dedent(f"""
        from mtp_jax.config import from_dict
        from mtp_jax.data import prepare
        corpus = prepare(from_dict({{"data": {config.data.__dict__!r}}}, "test"))
        print(len(corpus.sources[0].store), corpus.fingerprint)
    """)
    run = [sys.executable, "-c", program]
    processes = [subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    done = [process.communicate(timeout=60) for process in processes]
    assert {out for out, _ in done} == {f"3000 {prepare(config).fingerprint}\n"}, done
    entries = [p.name for p in (tmp_path / "cache" / "tokens").iterdir() if not p.name.endswith(".lock")]
    assert len(entries) == 1


def test_one_process_building_does_not_disturb_another_without_locks(make_config, tmp_path, monkeypatch):
    """Without locks of the file system, the entry that is renamed first stays."""
    import fcntl

    from mtp_jax.data import cache

    def refuse(*arguments):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)

    def build(folder):
        (folder / "which").write_text("outer")
        if not (tmp_path / "key").exists():
            cache.entry(tmp_path, "key", lambda f: (f / "which").write_text("inner") and None)

    assert (cache.entry(tmp_path, "key", build) / "which").read_text() == "inner"
    assert sorted(p.name for p in tmp_path.iterdir()) == [".key.lock", "key"]
