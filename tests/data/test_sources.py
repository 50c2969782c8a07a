"""Sources through real TFDS builders, and every error as one line."""

import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import tensorflow_datasets as tfds

from mtp_jax.config import DataConfig, UserError
from mtp_jax.data import documents, prepare, sources, tfds_source


class TinyTexts(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set prepared outside of mtp_jax."""

    name = "tiny_texts"
    VERSION = tfds.core.Version("1.2.0")
    code_path = None

    def _info(self):
        features = {"text": tfds.features.Text(), "label": tfds.features.ClassLabel(names=["no", "yes"])}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(80), "extra": self._generate_examples(30)}

    def _generate_examples(self, num):
        for i in range(num):
            yield i, {"text": f"{num} tiny text number {i} é\n" * 3, "label": i % 2}


class TinyForms(TinyTexts, skip_registration=True):
    """Records with features of several parts."""

    name = "tiny_forms"

    def _info(self):
        message = {"role": tfds.features.Text(), "content": tfds.features.Text()}
        features = {
            "messages": tfds.features.Sequence(message),
            "ids": tfds.features.Sequence(np.int64),
            "doc": {"body": tfds.features.Text(), "label": tfds.features.Scalar(np.float32)},
        }
        info = tfds.core.DatasetInfo(
            builder=self, features=tfds.features.FeaturesDict(features), disable_shuffling=True
        )
        return info

    def _generate_examples(self, num):
        for i in range(num):
            messages = [{"role": "user", "content": f"é {i}"}, {"role": "assistant", "content": str(i)}]
            yield i, {"messages": messages, "ids": [i, 2, 3], "doc": {"body": f"body {i}", "label": 0.5}}


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tfds")
    tfds.disable_progress_bar()
    for builder in (TinyTexts, TinyForms):
        builder(data_dir=folder, file_format="array_record").download_and_prepare()
    return folder


def error_of(config):
    with pytest.raises(UserError) as caught:
        prepare(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_tfds_dataset_by_name(make_config, tfds_dir):
    corpus = prepare(make_config(source="tiny_texts", tfds_dir=str(tfds_dir), split="extra"))
    found = {corpus.tokenizer.decode(corpus.sources[0].store.document(i)) for i in range(len(corpus.sources[0].store))}
    assert found == {f"30 tiny text number {i} é\n" * 3 for i in range(30)}
    half = prepare(make_config(source="tiny_texts", tfds_dir=str(tfds_dir), split="train[:50%]", batch_size=2))
    assert len(half.sources[0].store) == 40


def test_tfds_records_of_every_form(tfds_dir):
    def made(**settings):
        settings = DataConfig(source="tiny_forms", **settings)
        return list(documents.documents(tfds_source.tfds_records(settings, str(tfds_dir)).read(), settings))

    texts = made(text_field="doc.body")
    assert texts[79] == documents.Text("body 79", "data.source=tiny_forms record 80") and len(texts) == 80
    chats = made(records="chat")
    assert [chat.messages[0] for chat in chats] == [{"role": "user", "content": f"é {i}"} for i in range(80)]
    assert [tokens.ids.tolist() for tokens in made(records="tokens", tokens_field="ids")][::79] == [
        [0, 2, 3],
        [79, 2, 3],
    ]
    (first, *_) = tfds_source.tfds_records(DataConfig(source="tiny_forms", text_field="doc.body"), str(tfds_dir)).read()
    assert first.value["doc"] == {"body": "body 0", "label": 0.5}
    with pytest.raises(UserError, match="data.x.text_field=doc.label: is not text; the features are "):
        settings = DataConfig(source="tiny_forms", text_field="doc.label")
        tfds_source.tfds_records(settings, str(tfds_dir), "data.x.")


def test_tfds_dataset_by_folder(make_config, tfds_dir):
    (info,) = (tfds_dir / "tiny_texts").rglob("dataset_info.json")
    assert len(prepare(make_config(source=str(info.parent))).sources[0].store) == 80


def test_tfds_errors(make_config, tfds_dir):
    def error(**data):
        return error_of(make_config(**{"source": "tiny_texts", "tfds_dir": str(tfds_dir)} | data))

    message = error(text_field="body")
    assert message.startswith("data.text_field=body: is not a feature of tiny_texts; the features are ")
    assert "text (Text)" in message and "label (ClassLabel)" in message
    assert "data.text_field=label: is not text" in error(text_field="label")
    assert error(split="test").startswith("data.split=test: not a split of tiny_texts; it has ")
    message = error(source="no_such_dataset")
    assert message.startswith("data.source=no_such_dataset: no such source") and "python_source" in message
    message = error(source="not a name")
    assert message.startswith("data.source=not a name: ")


def test_tfds_dataset_in_a_format_without_random_access(make_config, tfds_dir, tmp_path):
    (info,) = (tfds_dir / "tiny_texts").rglob("dataset_info.json")
    folder = tmp_path / "tiny_texts" / "1.2.0"
    folder.mkdir(parents=True)
    (folder / "features.json").write_text((info.parent / "features.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps(json.loads(info.read_text()) | {"fileFormat": "tfrecord"}))
    message = error_of(make_config(source="tiny_texts", tfds_dir=str(tmp_path)))
    assert message.startswith("data.source=tiny_texts: prepared as tfrecord in ") and "array_record" in message


def test_tfds_dataset_that_cannot_be_prepared(make_config, monkeypatch, tmp_path):
    class Offline(TinyTexts, skip_registration=True):
        name = "offline"

        def _split_generators(self, dl_manager):
            raise ConnectionError("no route to host\nmore")

    monkeypatch.setattr(tfds, "builder", lambda name, data_dir: Offline(data_dir=data_dir))
    message = error_of(make_config(source="offline", tfds_dir=str(tmp_path)))
    assert "not prepared in" in message and "no route to host" in message and "tfds build offline" in message


def test_python_source_is_the_standard_library(make_config):
    corpus = prepare(make_config(source="python_source", validation_fraction=0.05))
    texts = [corpus.tokenizer.decode(corpus.sources[0].store.document(i)) for i in range(len(corpus.sources[0].store))]
    with open(os.__file__, encoding="utf-8", newline="") as file:
        assert file.read() in texts
    assert len(texts) > 300 and sum(map(len, texts)) > 5e6
    assert not any("import pytest" in text[:2000] for text in texts)
    assert corpus.sources[0].store.num_bytes.sum() == sum(len(t.encode()) for t in texts)
    tokens = corpus.sources[0].store.tokens
    assert corpus.tokenizer.token_bytes[tokens].sum() == corpus.sources[0].store.num_bytes.sum()
    batch = corpus.batches("train").batch_at(0)
    assert batch["tokens"].shape == (8, 33) and batch["tokens"].min() >= 0


def test_text_files_come_back_in_order_and_whole(make_config, tmp_path):
    paragraphs = ["".join(f"line {j} of {i} é\n" for j in range(i % 7 + 1)) + "\n" for i in range(300)]
    (tmp_path / "a.txt").write_text("".join(paragraphs[:150]))
    (tmp_path / "b.txt").write_text("".join(paragraphs[150:]))
    config = make_config(source="text_files", files=str(tmp_path / "*.txt"), max_document_chars=300)
    corpus = prepare(config)
    texts = [corpus.tokenizer.decode(corpus.sources[0].store.document(i)) for i in range(len(corpus.sources[0].store))]
    assert "".join(texts) == "".join(paragraphs)
    assert len(texts) > 50


def test_real_json_lines(make_config, real_data):
    path = real_data("text/wikitext2_raw_test_pages.jsonl")
    with open(path, encoding="utf-8") as file:
        pages = [json.loads(line)["page"] for line in file]
    corpus = prepare(make_config(source="text_files", files=path, text_field="page"))
    assert [
        corpus.tokenizer.decode(corpus.sources[0].store.document(i)) for i in range(len(corpus.sources[0].store))
    ] == pages


def test_changed_files_are_read_anew(make_config, tmp_path):
    path = tmp_path / "a.txt"
    settings = {"source": "text_files", "files": str(path), "max_document_chars": 50}
    config = make_config(validation_fraction=0.0, sequence_length=4, **settings)
    path.write_text("first\n\n" * 200)
    first = prepare(config)
    path.write_text("other\n\n" * 200)
    os.utime(path, ns=(1, 1))
    other = prepare(config)
    assert b"first" in bytes(first.sources[0].store.document(0)[1:-1].astype(np.uint8))
    assert b"other" in bytes(other.sources[0].store.document(0)[1:-1].astype(np.uint8))
    assert first.fingerprint != other.fingerprint


def test_records_that_are_skipped(make_config, tmp_path, capfd):
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "line {i}"}}\n{{"body": 1}}\n' for i in range(100)))
    files = {"source": "text_files", "files": str(tmp_path / "a.jsonl"), "batch_size": 2}
    corpus = prepare(make_config(on_bad_record="skip", **files))
    assert len(corpus.sources[0].store) == 100
    (line,) = capfd.readouterr().err.splitlines()
    skipped = (
        f"note: data.files={tmp_path}/a.jsonl: 100 of 200 records skipped: {tmp_path}/a.jsonl line 2: has no field"
    )
    assert skipped in line
    message = error_of(make_config(on_bad_record="stop", **files))
    assert message.startswith(f"data.files: {tmp_path}/a.jsonl line 2: has no field 'text', only ['body']; set ")
    assert message.endswith("; or set data.on_bad_record=skip")
    (tmp_path / "a.jsonl").write_text('{"body": 1}\n' * 3)
    assert "none of its 3 records can be used" in error_of(make_config(on_bad_record="skip", **files))


def test_a_text_file_that_is_not_utf8_is_skipped(make_config, tmp_path, capfd):
    (tmp_path / "a.txt").write_text("first\n\n" * 2000)
    (tmp_path / "b.txt").write_bytes("café\n\n".encode("latin-1") * 200)
    files = {"source": "text_files", "files": f"{tmp_path}/*.txt", "max_document_chars": 100, "batch_size": 2}
    corpus = prepare(make_config(on_bad_record="skip", **files))
    documents = corpus.sources[0].store
    assert all(b"first" in bytes(documents.document(i)[1:-1].astype(np.uint8)) for i in range(len(documents)))
    assert f"records skipped: {tmp_path}/b.txt: not UTF-8 (" in capfd.readouterr().err
    message = error_of(make_config(on_bad_record="stop", **files))
    assert message.startswith(f"data.files: {tmp_path}/b.txt: not UTF-8 (")
    assert message.endswith("; convert it or leave it out; or set data.on_bad_record=skip")


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("a.txt", b"fine\n" * 10 + b"\xff", "not UTF-8"),
        ("a.txt", b"", "holds no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "line 2: not JSON"),
        ("a.jsonl", b"\xff\n", "line 1: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"body": "y"}\n', "line 3: has no field 'text', only ['body']"),
        ("a.jsonl", b'{"text": 3}\n', "line 1: field 'text' is int, not a string"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half a surrogate pair"),
        ("a.jsonl", b"[1]\n", "line 1: not a JSON object"),
        ("a.txt", b"short\n", "use a shorter sequence_length or more text"),
        ("a.txt", b"one document\n" * 300, "only one document; set data.max_document_chars="),
        ("a.txt", (b"same\n" * 10 + b"\n") * 300, "documents, all the same"),
    ],
)
def test_unusable_files_surface_as_one_error(make_config, tmp_path, name, content, problem):
    (tmp_path / name).write_bytes(content)
    size = 5000 if b"one" in content else 51
    config = make_config(source="text_files", files=str(tmp_path / name), max_document_chars=size)
    message = error_of(config)
    assert problem in message
    if "line" in problem or "UTF-8" in problem:
        assert str(tmp_path / name) in message
    left = [p for p in os.listdir(os.path.join(config.data.cache_dir, "tokens")) if p[0] == "." and p[-5:] != ".lock"]
    assert left == []  # nothing half-made stays behind


def test_dangling_link_is_named(make_config, tmp_path):
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    message = error_of(make_config(source="text_files", files=str(tmp_path / "*.txt")))
    assert "gone.txt: cannot be read (No such file or directory)" in message


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_file_without_permission_is_named(make_config, tmp_path):
    (tmp_path / "secret.txt").write_text("x")
    (tmp_path / "secret.txt").chmod(0)
    message = error_of(make_config(source="text_files", files=str(tmp_path / "secret.txt")))
    assert "secret.txt: cannot be read (Permission denied)" in message


def test_cache_that_cannot_be_written(make_config, tmp_path):
    (tmp_path / "file").write_text("")
    message = error_of(make_config(cache_dir=str(tmp_path / "file")))
    assert message.startswith(f"data.cache_dir={tmp_path / 'file'}: cannot be written")


def test_fim_needs_a_tokenizer_with_fim_tokens(make_config, monkeypatch, bare_tokenizer):
    monkeypatch.setattr("mtp_jax.data.tokenizer.load", lambda name: bare_tokenizer)
    assert error_of(make_config(fim_rate=0.5)).startswith("data.fim_rate=0.5: data.tokenizer=bytes has no FIM tokens")


def test_counts_that_cannot_be(make_config):
    assert error_of(make_config(num_workers=-1)) == "data.num_workers=-1: must be at least 0"
    assert error_of(make_config(synthetic_documents=0)) == "data.synthetic_documents=0: must be at least 1"


def test_what_the_machine_cannot_hold_or_run(make_config, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert error_of(make_config(num_workers=9)).endswith("too many for the 2 CPUs of this machine; use at most 8")
    huge = make_config(batch_size=2**24, sequence_length=2**20)
    assert error_of(huge).startswith("data.batch_size=16777216: with data.sequence_length=1048576")
    with pytest.raises(UserError, match="fewer than the data.batch_size|has .* tokens, 0 rows"):
        prepare(huge, num_processes=2**24)  # each of them holds one row


@pytest.mark.parametrize("source", ["python_source", "text_files", "synthetic"])
def test_a_split_of_a_source_without_splits(make_config, source):
    assert error_of(make_config(source=source, split="x")).startswith(f"data.split=x: data.source={source} has no")


def test_too_small_validation_names_a_fraction_that_works(make_config):
    settings = {"sequence_length": 64, "batch_size": 16}
    message = error_of(make_config(validation_fraction=0.001, **settings))
    assert "fewer than the data.batch_size=16 of one batch" in message
    fraction = float(message.split("data.validation_fraction=")[1].split(",")[0])
    assert prepare(make_config(validation_fraction=fraction, **settings)).batches("validation").num_batches >= 1
    assert "use smaller batches" in error_of(make_config(batch_size=100_000))


def test_warm_start_needs_no_tfds(make_config):
    config = make_config(source="python_source", validation_fraction=0.05)
    prepare(config)
    program = f"""
        import sys
        from mtp_jax.config import from_dict
        from mtp_jax.data import prepare
        prepare(from_dict({{"data": {config.data.__dict__!r}}}, "test"))
        assert not {{"tensorflow_datasets", "tokenizers", "pyarrow", "datasets"}} & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=60)


def test_opening_tfds_is_quiet(make_config, tfds_dir, capfd, tmp_path):
    prepare(make_config(source="tiny_texts", tfds_dir=str(tfds_dir), cache_dir=str(tmp_path)))
    (tmp_path / "a.txt").write_text("".join(f"some text {i}\n\n" for i in range(500)))
    files = {"source": "text_files", "files": str(tmp_path / "a.txt"), "max_document_chars": 100, "batch_size": 2}
    prepare(make_config(cache_dir=str(tmp_path), **files))
    assert capfd.readouterr() == ("", "")


def test_key_depends_on_what_decides_the_documents(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}')
    base = DataConfig(source="text_files", files=str(tmp_path / "a.jsonl"))
    keys = {sources.open_source(base, base, 0).key, sources.open_source(base, base, 1).key}
    assert len(keys) == 1
    for change in ({"text_field": "body"}, {"max_document_chars": 7}):
        keys.add(sources.open_source(DataConfig(**{**base.__dict__, **change}), base, 0).key)
    synthetic = DataConfig(source="synthetic")
    keys |= {sources.open_source(synthetic, synthetic, seed).key for seed in (0, 1)}
    assert len(keys) == 5
