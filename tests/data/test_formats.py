"""Files of every format give the same records; a file of another format, or a damaged one, is refused by name."""

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os

import numpy as np
import pyarrow as pa
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from hypothesis import assume, given
from hypothesis import strategies as st
from pyarrow import feather, ipc, parquet

from mtp_jax import storage
from mtp_jax.config import DataConfig, SourceConfig, UserError
from mtp_jax.data import documents
from mtp_jax.data.formats import json_values, read_files
from mtp_jax.data.records import BadRecord

ROWS = [
    {"text": "first é\r\nline", "n": 1},
    {"text": "a \u2028 b", "n": 2},
    {"text": "", "n": 3},
    {"text": '{"x": 1}\n' * 50, "n": 4},
    {"text": "last\n\n", "n": 5},
]
TEXTS = [row["text"] for row in ROWS if row["text"]]


def _lines(rows):
    return "".join(json.dumps(row, ensure_ascii=row["n"] % 2 == 0) + "\n" for row in rows).encode()


def _stream(path, table):
    with ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _ipc(path, table):
    with ipc.new_file(path, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def _array_record(path, contents):
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for content in contents:
        writer.write(content)
    writer.close()


COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": lambda content: pa.Codec("zstd").compress(content).to_pybytes(),
    ".GZ": lambda content: gzip.compress(content[:7]) + gzip.compress(content[7:]),  # two members
}


def _csv(rows, delimiter):
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, ["text", "n"], delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


CONTENTS = {
    "x.csv": _csv(ROWS, ","),
    "x.TSV": b"\xef\xbb\xbf" + _csv(ROWS, "\t"),
    "x.jsonl": _lines(ROWS),
    "x.JSONL": b"\xef\xbb\xbf\n" + _lines(ROWS).replace(b"\n", b"\r\n"),
    "x.v1.ndjson": _lines(ROWS).rstrip(),
    "lines.json": b"\n \n" + _lines(ROWS),
    "array.json": json.dumps(ROWS).encode(),
    "pretty.Json": b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n",
    "values.json": "\n".join(json.dumps(row, indent=1) for row in ROWS).encode(),
}
WRITERS = {
    "x.parquet": lambda path, table: parquet.write_table(table, path, row_group_size=2),
    "x.PARQUET": lambda path, table: parquet.write_table(table, path, compression="zstd"),
    "binary.parquet": lambda path, table: parquet.write_table(_as_binary(table), path),
    "x.arrow": _ipc,
    "stream.arrow": _stream,
    "x.feather": lambda path, table: feather.write_feather(table, path, chunksize=2),
    "x.arrayrecord": lambda path, table: _array_record(path, [json.dumps(row).encode() for row in table.to_pylist()]),
    "x.array_record-00000-of-00001": lambda path, table: _array_record(
        path, [json.dumps(row).encode() for row in table.to_pylist()]
    ),
}


def _as_binary(table):
    return table.set_column(0, "text", table["text"].cast(pa.binary()))


def write(path, content):
    path.write_bytes(content)
    return str(path)


def texts(paths, **settings):
    settings = SourceConfig(**settings)
    return [document.text for document in documents.documents(read_files(paths, settings), settings)]


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("compression", COMPRESSORS)
def test_json_in_every_form_and_compression(tmp_path, name, compression):
    path = write(tmp_path / f"{name}{compression}", COMPRESSORS[compression](CONTENTS[name]))
    found = list(read_files([path], SourceConfig()))
    is_csv = name.lower().endswith(("csv", "tsv"))
    assert [record.value for record in found] == [row | {"n": str(row["n"])} if is_csv else row for row in ROWS]
    assert texts([path]) == TEXTS
    assert all(record.origin.startswith(f"{path} ") for record in found)


@pytest.mark.parametrize("name", WRITERS)
def test_tables_and_array_records(tmp_path, name):
    WRITERS[name](str(tmp_path / name), pa.Table.from_pylist(ROWS))
    path = str(tmp_path / name)
    assert texts([path]) == TEXTS
    found = list(read_files([path], SourceConfig()))
    assert [record.origin for record in found] == [f"{path} record {i}" for i in range(1, 6)]
    is_table = "array" not in name
    assert all(("n" in record.value) != is_table for record in found)  # other columns of tables are not read
    found = list(read_files([path], SourceConfig(text_field="body")))
    assert all("n" in record.value for record in found)  # but where a field is missing, to name those that are there


@pytest.mark.parametrize("compression", COMPRESSORS)
@pytest.mark.parametrize("name", ["a.txt", "b.md", "c.py", "LICENSE", "e.unknown"])
def test_plain_text_in_every_compression(tmp_path, name, compression):
    content = "one\r\ntwo\n\n\u2028three é\rfour\n".encode() * 5
    path = write(tmp_path / f"{name}{compression}", COMPRESSORS[compression](content))
    parts = texts([path], max_document_chars=30)
    assert "".join(parts).encode() == content and len(parts) > 3
    marked = write(tmp_path / "marked.txt", b"\xef\xbb\xbf" + content)
    assert texts([marked], max_document_chars=30) == parts  # without the byte order mark


def test_texts_of_array_records(tmp_path):
    contents = ["first\nline", "{not json", "", "é"]
    _array_record(tmp_path / "a.arrayrecord", [text.encode() for text in contents])
    assert texts([str(tmp_path / "a.arrayrecord")]) == [text for text in contents if text]
    _array_record(tmp_path / "b.arrayrecord", [b"fine", b"\xff", b"too"])
    found = list(read_files([str(tmp_path / "b.arrayrecord")], SourceConfig()))
    assert [isinstance(record, BadRecord) for record in found] == [False, True, False]
    assert "b.arrayrecord record 2: not UTF-8" in str(found[1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.dictionaries(st.text(), JSON, max_size=4), min_size=1, max_size=6),
    st.sampled_from([None, 1]),
    st.sampled_from(["array", "values", "lines"]),
    st.integers(1, 40),
)
def test_json_round_trip(tmp_path_factory, rows, indent, form, chunk):
    """Arrays, objects and lines, read in chunks that end anywhere, also inside a character."""
    assume(form != "values" or all(rows))  # a file that begins with the line {} is one of lines
    folder = tmp_path_factory.getbasetemp() / "json"
    folder.mkdir(exist_ok=True)
    if form == "array":
        text = json.dumps(rows, indent=indent, ensure_ascii=False)
    else:
        text = "\n".join(
            json.dumps(row, indent=indent if form == "values" else None, ensure_ascii=False) for row in rows
        )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_values, "_CHUNK", chunk)
        path = write(folder / "x.json", text.encode("utf-8", "surrogatepass"))
        assert [record.value for record in read_files([path], SourceConfig())] == rows


def test_a_line_that_cannot_be_used_does_not_end_the_file(tmp_path):
    bad = [b'{"text": 1', b"[1]", b"\xff", b'{"text": ' + b"[" * 100_000 + b"}", b'{"text": %s}' % (b"9" * 5000)]
    content = b"".join(b'{"text": "fine"}\n%s\n' % line for line in bad)
    for name in ("x.jsonl", "x.json"):
        path = write(tmp_path / name, content)
        found = list(read_files([path], SourceConfig()))
        problems = ("not JSON (", "not a JSON object", "not UTF-8 (", "nested too deeply", "too many digits")
        assert [isinstance(record, BadRecord) for record in found] == [False, True] * 5
        for i, problem in enumerate(problems):
            assert str(found[2 * i + 1]).startswith(f"{path} line {2 * i + 2}: ") and problem in str(found[2 * i + 1])


def test_rows_of_a_csv_that_cannot_be_used(tmp_path):
    (tmp_path / "x.csv").write_text('text,label\n"two\nlines",1\nshort\n\na,b,c\n"x, y",2\n')
    found = list(read_files([str(tmp_path / "x.csv")], SourceConfig()))
    assert [each.origin.removeprefix(f"{tmp_path}/") for each in found] == [f"x.csv line {n}" for n in (2, 4, 6, 7)]
    assert [each.value for each in (found[0], found[3])] == [
        {"text": "two\nlines", "label": "1"},
        {"text": "x, y", "label": "2"},
    ]
    assert "has 1 values for 2 columns; quote values" in str(found[1]) and "has 3 values" in str(found[2])


def test_elements_that_are_no_objects(tmp_path, monkeypatch):
    monkeypatch.setattr(json_values, "_CHUNK", 1)
    found = list(read_files([write(tmp_path / "x.json", b'[12, {"text": "fine"}, 345]')], SourceConfig()))
    assert [isinstance(record, BadRecord) for record in found] == [True, False, True]
    assert 'record 3: not a JSON object; write {"text": ...}, or remove it' in str(found[2])


def test_a_first_line_that_cannot_be_used(tmp_path):
    path = write(tmp_path / "x.json", b'{"text": oops}\n{"text": "fine"}\n')
    first, second = read_files([path], SourceConfig())
    assert "line 1: not JSON" in str(first) and second.value == {"text": "fine"}


def test_text_in_a_table_that_is_not_utf8(tmp_path):
    values = pa.array([b"fine", b"\xff", b"too"]).view(pa.string())
    parquet.write_table(pa.table({"text": values}), tmp_path / "x.parquet")
    found = list(read_files([str(tmp_path / "x.parquet")], SourceConfig()))
    assert "record 2: not UTF-8" in str(found[1]) and [found[0].value, found[2].value] == [
        {"text": "fine"},
        {"text": "too"},
    ]


TABLE = pa.Table.from_pylist(ROWS * 100)


def _bytes_of(write_table, suffix, tmp_path):
    path = tmp_path / f"whole{suffix}"
    write_table(str(path), TABLE)
    content = path.read_bytes()
    path.unlink()
    return content


PARQUET = WRITERS["x.parquet"]
MANY = _lines(ROWS) * 200
BAD_FILES = {  # name -> content, or (writer of a table, change of its bytes), and words of the message
    "a.txt": (lambda tmp: _bytes_of(PARQUET, ".parquet", tmp), "is Parquet, not text; rename it to end in .parquet"),
    "b.txt": (lambda tmp: _bytes_of(_ipc, ".arrow", tmp), "is Arrow, not text; rename it to end in .arrow"),
    "b.md": (lambda tmp: _bytes_of(_stream, ".arrow", tmp), "is Arrow, not text; rename it to end in .arrow"),
    "c.jsonl": (lambda tmp: _bytes_of(PARQUET, ".parquet", tmp), "is Parquet, not text"),
    "d.json": (lambda tmp: gzip.compress(MANY), "is gzip, not text; rename it to end in .gz"),
    "e.txt": (lambda tmp: bz2.compress(MANY), "is bzip2, not text; rename it to end in .bz2"),
    "f.txt": (lambda tmp: lzma.compress(MANY), "is xz, not text"),
    "g.txt": (lambda tmp: COMPRESSORS[".zst"](MANY), "is Zstandard, not text; rename it to end in .zst"),
    "h.txt": (lambda tmp: b"text\n" * 10 + b"\0", "is binary: it has null bytes"),
    "i.txt": (lambda tmp: b"text\n" * 50_000 + b"\0\n", "line 50001 has a null character"),
    "j.txt": (lambda tmp: "text".encode("utf-16"), "is UTF-16, not text"),
    "k.txt": (lambda tmp: b"PK\x03\x04 and so on", "is zip, not text; convert it, or leave it out"),
    "l.txt.gz": (lambda tmp: b"plain", "is not compressed, although its name ends in .gz; rename it"),
    "m.jsonl.bz2": (lambda tmp: gzip.compress(MANY), "is gzip, although its name ends in .bz2; rename it"),
    "n.json.zst": (lambda tmp: b"", "is empty, although its name ends in .zst; compress it again"),
    "o.txt.gz": (lambda tmp: gzip.compress(gzip.compress(MANY)), "holds, inside its .gz, gzip, not text"),
    "p.parquet.gz": (lambda tmp: gzip.compress(b"PAR1"), "a compressed .parquet file is not read; decompress it"),
    "q.parquet": (lambda tmp: MANY, "is not Parquet, although its name ends in .parquet"),
    "r.parquet": (lambda tmp: _bytes_of(_ipc, ".arrow", tmp), "is Arrow, although its name ends in .parquet"),
    "s.parquet": (
        lambda tmp: _bytes_of(PARQUET, ".parquet", tmp)[:-9],
        "is a truncated or corrupt Parquet file (",
    ),
    "t.arrow": (lambda tmp: _bytes_of(_ipc, ".arrow", tmp)[:-99], "is a truncated or corrupt Arrow file ("),
    "u.arrow": (lambda tmp: _bytes_of(_stream, ".arrow", tmp)[:-99], "is a truncated or corrupt Arrow file ("),
    "v.feather": (lambda tmp: b"FEA1 and so on", "is Feather V1, although its name"),
    "w.arrayrecord": (lambda tmp: MANY, "is not an ArrayRecord file, or a truncated one"),
    "x.tfrecord-00000-of-00001": (lambda tmp: b"", "TFRecord files are not read; give a TFDS dataset by its folder"),
    "y.json": (lambda tmp: json.dumps(ROWS).encode()[:-1], "not JSON after record 5 (The array has no end); give"),
    "z.json": (lambda tmp: b'[{"text": "x"} {"text": "y"}]', "not JSON after record 1 (Expecting ',' delimiter)"),
    "z2.json": (lambda tmp: b'[{"text": "x"}]\n[{"text": "y"}]', "not JSON after record 1 (Text after the end"),
    "z3.json": (lambda tmp: b'[{"text": "\xff"}]', "not UTF-8 (invalid start byte); convert it or leave it out"),
    "z4.json": (lambda tmp: b'{\n"text": ' + b"[" * 100_000, "of record 1 are nested too deeply"),
    "z6.csv": (lambda tmp: b"", "has no first row with the names of its columns; add one"),
    "z7.csv": (lambda tmp: b"a,a\n1,2\n", "has two columns of the name 'a'; rename one"),
    "z8.csv": (lambda tmp: b'a\n"x\n', "line 2 is not valid (unexpected end of data); correct its quotes"),
    "z5.json": (lambda tmp: b'[{}, {"n": %s}]' % (b"9" * 5000), "a number of record 2 has too many digits"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_not_what_its_name_states(tmp_path, name):
    make, words = BAD_FILES[name]
    path = write(tmp_path / name, make(tmp_path))
    with pytest.raises(UserError) as caught:
        list(read_files([path], SourceConfig(), prefix="data.mixture[1]."))
    message = str(caught.value)
    assert message.startswith(f"data.mixture[1].files: {path}: ") and words in message and "\n" not in message
    assert not isinstance(caught.value, BadRecord)  # never skipped


@pytest.mark.parametrize("compression", [suffix for suffix in COMPRESSORS if suffix])
@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.txt", "x.json"])
def test_a_damaged_archive_is_named_with_its_cause(tmp_path, compression, damage, name):
    content = COMPRESSORS[compression](np.random.default_rng(0).bytes(30_000).hex().encode())
    middle = len(content) // 2
    content = content[:middle] if damage == "truncated" else content[:12] + b"\xaa" * 64 + content[76:]
    path = write(tmp_path / f"{name}{compression}", content)
    with pytest.raises(UserError, match="is a truncated or corrupt (gzip|bzip2|xz|Zstandard) file \\(.+\\); compress"):
        list(read_files([path], SourceConfig()))


def test_a_damaged_table_is_named_with_its_cause(tmp_path):
    whole = _bytes_of(PARQUET, ".parquet", tmp_path)
    path = write(tmp_path / "x.parquet", whole[:100] + b"\xaa" * 400 + whole[500:])
    with pytest.raises(UserError, match="x.parquet: is a truncated or corrupt Parquet file"):
        list(read_files([path], SourceConfig()))
    _array_record(tmp_path / "x.arrayrecord", [os.urandom(100).hex().encode() for _ in range(2000)])
    content = bytearray((tmp_path / "x.arrayrecord").read_bytes())
    content[150_000] ^= 255
    path = write(tmp_path / "x.arrayrecord", content)
    with pytest.raises(UserError, match="x.arrayrecord: is a corrupt ArrayRecord file"):
        list(read_files([path], SourceConfig()))


def test_text_that_begins_like_another_format(tmp_path):
    for i, text in enumerate(["PAR1 is a gene\n", "ARROW1 left the harbour\n", "BZh9 and more\n", "FEA is a method\n"]):
        path = write(tmp_path / f"{i}.txt", text.encode())
        assert texts([path]) == [text]


def test_array_records_of_tfds_are_refused(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    _array_record(tmp_path / "x-train.array_record-00000-of-00001", [b"x"])
    with pytest.raises(UserError, match=f"is part of a TFDS dataset; give .* data.source={tmp_path}$"):
        list(read_files([str(tmp_path / "x-train.array_record-00000-of-00001")], SourceConfig()))
    _array_record(tmp_path.parent / "protos.arrayrecord", [b"\n\x1d\n\x1b\n\x04text\x12\x13"])
    with pytest.raises(UserError, match="records are binary, neither JSON nor text"):
        list(read_files([str(tmp_path.parent / "protos.arrayrecord")], SourceConfig()))


def test_files_are_read_as_they_are_needed(tmp_path):
    """The first records of a large array or table come before the rest of it is read."""

    class Counted:
        def __init__(self, path):
            self.file, self.count = open(path, "rb"), 0

        def read(self, size=-1):
            content = self.file.read(size)
            self.count += len(content)
            return content

        def readline(self, size=-1):
            content = self.file.readline(size)
            self.count += len(content)
            return content

    rows = [{"text": "x" * 1000}] * 10_000
    with open(write(tmp_path / "x.json", json.dumps(rows).encode()), "rb"):
        file = Counted(tmp_path / "x.json")
    assert len(list(itertools.islice(json_values.read("x.json", file, SourceConfig()), 1500))) == 1500
    assert file.count < 4 * 2**20 < os.path.getsize(tmp_path / "x.json")
    file.file.close()


def test_a_file_in_an_object_store(bucket):
    root = storage.path(bucket.url)
    storage.write_bytes(root / "x.jsonl.gz", gzip.compress(_lines(ROWS)))
    storage.write_bytes(root / "x.json.zst", COMPRESSORS[".zst"](json.dumps(ROWS).encode()))
    sink = pa.BufferOutputStream()
    parquet.write_table(pa.Table.from_pylist(ROWS), sink)
    storage.write_bytes(root / "x.parquet", sink.getvalue().to_pybytes())
    assert texts([f"{bucket.url}/x.jsonl.gz", f"{bucket.url}/x.json.zst", f"{bucket.url}/x.parquet"]) == 3 * TEXTS
    storage.write_bytes(root / "x.txt", sink.getvalue().to_pybytes())
    with pytest.raises(UserError, match=f"{bucket.url}/x.txt: is Parquet, not text"):
        texts([f"{bucket.url}/x.txt"])
    storage.write_bytes(root / "x.arrayrecord", b"x")
    with pytest.raises(UserError, match="read from local disks only"):
        texts([f"{bucket.url}/x.arrayrecord"])


def test_a_store_that_fails_while_a_file_is_read(bucket):
    storage.write_bytes(storage.path(bucket.url) / "x.jsonl", MANY)
    bucket.inject("400", times=None, match="GET .*x.jsonl.*alt=media|GET /download")
    with pytest.raises(storage.StorageError, match="x.jsonl"):
        texts([f"{bucket.url}/x.jsonl"])


def test_settings_of_a_run_are_settings_of_a_source(tmp_path):
    path = write(tmp_path / "x.jsonl", b'{"body": "x"}\n')
    settings = DataConfig(text_field="body")
    assert [document.text for document in documents.documents(read_files([path], settings), settings)] == ["x"]
