"""Hugging Face datasets from folders, saved and of data files; and every error as one line."""

import importlib.util
import json

import datasets
import pytest

from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data import prepare
from mtp_jax.data.documents import Chat, documents
from mtp_jax.data.huggingface import hf_records

ROWS = [
    {"text": f"{i} é\n", "meta": {"title": f"title {i}"}, "messages": [{"role": "assistant", "content": str(i)}]}
    for i in range(600)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three folders: one dataset, one of two splits, both saved; and one of data files."""
    root = tmp_path_factory.mktemp("hf")
    datasets.disable_progress_bars()
    whole = datasets.Dataset.from_list(ROWS)
    whole.save_to_disk(root / "one")
    datasets.DatasetDict(train=whole, test=whole.select(range(5, 1, -1))).save_to_disk(root / "two")
    (root / "files").mkdir()
    for name, rows in (("train", ROWS), ("test", ROWS[:4])):
        (root / "files" / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    datasets.enable_progress_bars()
    return root


def values(source, **settings):
    return [record.value for record in hf_records(SourceConfig(source=source, **settings)).read()]


@pytest.mark.parametrize("name", ["one", "two", "files"])
def test_records_in_order_with_the_needed_columns(folder, name):
    source = f"hf:{folder / name}"
    assert values(source) == [{"text": row["text"]} for row in ROWS]
    assert values(source, text_field="meta.title") == [{"meta": row["meta"]} for row in ROWS]
    assert values(source, text_field="body") == ROWS  # all columns, for the message
    dataset = hf_records(SourceConfig(source=source))
    assert [record.origin for record in dataset.read()][::599] == [f"data.source={source} record {i}" for i in (1, 600)]
    assert len(list(dataset.read())) == 600  # again
    settings = SourceConfig(source=source, records="chat")
    chats = list(documents(hf_records(settings).read(), settings))
    assert chats[7] == Chat(tuple(ROWS[7]["messages"]), origin=f"data.source={source} record 8") and len(chats) == 600


def test_splits(folder):
    assert [row["text"][0] for row in values(f"hf:{folder}/two", split="test")] == ["5", "4", "3", "2"]
    assert len(values(f"hf:{folder}/files", split="test")) == 4
    assert len(values(f"hf:{folder}/files", split="train+test")) == 604


def test_keys_change_with_the_content(folder, tmp_path):
    keys = []
    for i, name in enumerate(("one", "two", "files")):
        source = f"hf:{folder / name}"
        keys.append(hf_records(SourceConfig(source=source)).key)
        assert json.dumps(keys[-1]) == json.dumps(hf_records(SourceConfig(source=source)).key)
        if i:
            keys.append(hf_records(SourceConfig(source=source, split="test")).key)
    datasets.Dataset.from_list(ROWS[1:]).save_to_disk(tmp_path / "one")
    keys.append(hf_records(SourceConfig(source=f"hf:{tmp_path / 'one'}")).key)
    (tmp_path / "files").mkdir()
    for _ in range(2):
        (tmp_path / "files" / "train.jsonl").write_text(json.dumps(ROWS[0]))
        keys.append(hf_records(SourceConfig(source=f"hf:{tmp_path / 'files'}")).key)
    assert keys[0] == keys[1]  # the same content
    assert len({json.dumps(key) for key in keys}) == len(keys) - 1 == 7


def test_corpus_of_a_saved_dataset(make_config, folder, capfd):
    corpus = prepare(make_config(source=f"hf:{folder}/one"))
    texts = [corpus.tokenizer.decode(corpus.sources[0].store.document(i)) for i in range(len(corpus.sources[0].store))]
    assert texts == [row["text"] for row in ROWS]
    assert capfd.readouterr() == ("", "")


def error(read=False, **settings):
    with pytest.raises(UserError) as caught:
        dataset = hf_records(SourceConfig(**settings), "data.mixture[1].")
        if read:
            list(dataset.read())
    message = str(caught.value)
    assert "\n" not in message and message.startswith("data.mixture[1].")
    return message.removeprefix("data.mixture[1].")


def test_errors(folder, tmp_path, monkeypatch, capfd):
    assert error(source="hf:") == "source=hf:: names no dataset; write hf:OWNER/NAME or hf:FOLDER"
    assert error(source="hf:/none/x").startswith("source=hf:/none/x: no such folder; give one, or hf:OWNER/NAME")
    for name in ("two", "files"):
        message = error(source=f"hf:{folder / name}", split="x")
        assert message == f"split=x: not a split of hf:{folder / name}; it has train, test"
    assert error(source=f"hf:{folder}/one", split="test").endswith("/one; it has train")
    assert error(source=f"hf:{folder}/one", subset="en").startswith("subset=en: a saved dataset has no subsets")
    message = error(source=f"hf:{folder}/files", subset="en")
    assert message.startswith("subset=en: not one of hf:") and "'default'" in message
    (tmp_path / "empty").mkdir()
    assert error(source=f"hf:{tmp_path}/empty").startswith(f"source=hf:{tmp_path}/empty: no such dataset, or one that")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "train.jsonl").write_text('{"text": "x"}\n' * 5 + "{oops\n")
    assert "cannot be " in error(source=f"hf:{tmp_path}/bad", read=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "state.json").write_text("{")
    (tmp_path / "damaged" / "dataset_info.json").write_text("{")
    assert "damaged: cannot be read (" in error(source=f"hf:{tmp_path}/damaged")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = error(source="hf:owner/name")
    assert message.startswith("source=hf:owner/name: cannot be reached (") and "run `hf download owner/name" in message
    assert capfd.readouterr() == ("", "")
    assert not datasets.are_progress_bars_disabled()  # as before


def test_without_the_package(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    assert error(source="hf:x/y") == "source=hf:x/y: hf: needs a package: pip install datasets"
