"""Paths, files and folders on a local disk and in an object store."""

import logging
import os

import pytest

from mtp_jax import storage
from mtp_jax.errors import UserError, first_line
from mtp_jax.storage import read_json, write_text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "cannot be read as JSON (.*No such file or directory.*)"),
        (b"{", "cannot be read as JSON (Expecting property name .*)"),
        (b"\xff{}", "cannot be read as JSON ('utf-8' codec .*)"),
        (b"[" * 100_000, "is nested deeper than 32 levels"),
        (b'{"a": 1, "a": 2}', "cannot be read as JSON ('a' occurs twice)"),
        (b"[1]", "holds a list, not a JSON object"),
    ],
)
def test_a_file_that_is_no_json_object_is_one_line(tmp_path, content, says):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    says = says.replace("(", r"\(").replace(")", r"\)")
    for name, options in ((str(path), ()), ("--config=x", ("--config=x",))):
        with pytest.raises(UserError, match=f"^{name}: {says}; fetch it again$") as error:
            read_json(path, "fetch it again", *options)
        assert "\n" not in str(error.value)


@pytest.fixture(params=["local", "gs"])
def folder(request, tmp_path):
    """A folder that does not exist yet, on each kind of storage."""
    if request.param == "local":
        return storage.path(tmp_path / "run[1]")
    return storage.path(request.getfixturevalue("bucket").url + "/run[1]")


def test_a_local_path_is_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for text in ("a/b", tmp_path / "a" / "b", "./a/b"):
        assert os.fspath(storage.path(text)) == str(tmp_path / "a" / "b")
    assert storage.is_local(storage.path("x:y/z")) and storage.path("x:/y").name == "y"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ftp://host/x", "ftp:// is not supported; use a local path, gs:// or s3://"),
        ("file:///x", "file:// is not supported; use a local path, gs:// or s3://"),
        ("gs:/bucket/x", "is not a URL of a bucket; write gs://BUCKET/NAME"),
        ("gs:///x", "is not a URL of a bucket; write gs://BUCKET/NAME"),
    ],
)
def test_a_url_that_cannot_be_served_is_refused(text, message):
    with pytest.raises(UserError) as error:
        storage.path(text, "--workdir")
    assert str(error.value) == f"--workdir={text}: {message}"


def test_a_scheme_whose_package_is_missing_names_it(monkeypatch):
    monkeypatch.setitem(storage.PACKAGES, "s3", "no_such_package")
    with pytest.raises(UserError, match="^s3://b/x: s3:// needs a package: pip install no_such_package$"):
        storage.path("s3://b/x")


def test_files_are_written_read_listed_and_removed(folder):
    assert storage.names(folder) == [] and not storage.exists(folder)
    storage.make_folder(folder / "sub")
    for text in ('{"a": "\u00e9"}', '{"a": 1}\n'):
        write_text(folder / "x.json", text)
        assert storage.read_text(folder / "x.json") == text
    before = storage.version(folder / "x.json")
    write_text(folder / "x.json", '{"a": 2}\n')
    assert storage.version(folder / "x.json") != before
    storage.write_bytes(folder / "sub" / "y", bytes(range(10)))
    assert storage.read_bytes(folder / "sub" / "y", 3, 5) == b"\3\4" and storage.size(folder / "sub" / "y") == 10
    assert storage.read_bytes(folder / "sub" / "y", 5, 5) == b""
    assert storage.names(folder) == ["sub", "x.json"] and read_json(folder / "x.json", "") == {"a": 2}
    assert storage.is_dir(folder / "sub") and storage.is_file(folder / "x.json") and not storage.is_file(folder)
    assert storage.copy(folder / "sub" / "y", folder / "z", most=10)
    assert not storage.copy(folder / "sub" / "y", folder / "z2", most=9)
    storage.remove(folder / "sub")
    storage.remove(folder / "none")
    storage.remove(folder / "x")  # which is the beginning of a name
    assert storage.names(folder) == ["x.json", "z"]


def test_a_file_is_there_when_it_is_complete(folder):
    storage.make_folder(folder)
    with pytest.raises(KeyError), storage.writing(folder / "a") as file:
        file.write(b"1" * (1 + 16 * 2**20))  # more than one block
        raise KeyError
    if not storage.is_local(folder):
        assert storage.names(folder) == []
    with storage.writing(folder / "b") as file:
        for part in (b"1" * (1 + 16 * 2**20), b"2"):
            file.write(part)
    assert storage.read_bytes(folder / "b") == b"1" * (1 + 16 * 2**20) + b"2"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_text(tmp_path / "x.json", "{}")
    (tmp_path / ".x.json.partial").mkdir()
    with pytest.raises(OSError):
        write_text(tmp_path / "x.json", "[]")
    assert (tmp_path / "x.json").read_text() == "{}"


def test_a_fresh_folder_is_complete_or_not_there(folder):
    with pytest.raises(KeyError), storage.fresh_folder(folder) as partial:
        write_text(partial / "a", "1")
        raise KeyError
    assert storage.names(folder) == []
    with storage.fresh_folder(folder) as partial:
        write_text(partial / "a", "1")
        write_text(partial / "config.json", "{}")
    assert storage.names(folder) == ["a", "config.json"]
    with pytest.raises(UserError, match="exists already"), storage.fresh_folder(folder):
        pass


def test_what_a_killed_process_left_in_an_object_store_is_named(bucket):
    target = storage.path(bucket.url) / "x"
    write_text(target / "model.safetensors", "1")
    with pytest.raises(UserError, match="was left by a process that was killed .it has no config.json.; remove it"):
        storage.refuse_existing(target)


@pytest.mark.parametrize("kind", ["429", "500", "503", "closed_before", "closed_after"])
def test_a_fault_of_the_store_is_retried(bucket, kind):
    path = storage.path(bucket.url) / "x"
    for match in ("POST", "GET"):
        bucket.inject(kind, match=match)
        write_text(path, kind + match)
        assert storage.read_text(path) == kind + match


def test_a_store_that_refuses_is_one_line(bucket):
    path = storage.path(bucket.url) / "x"
    bucket.inject("400", times=None)
    with pytest.raises(storage.StorageError, match=f"^{path}: injected, 400$"):
        write_text(path, "1")
    with pytest.raises(FileNotFoundError) as error:
        write_text("gs://no-such-bucket/x", "1")
    assert storage.reason(error.value) == "no such bucket"


@pytest.mark.parametrize(
    ("error", "line"),
    [(ValueError("\n  \n one \ntwo"), "one"), (ValueError(), "ValueError"), (KeyError("a"), "'a'")],
)
def test_the_first_line_of_an_exception(error, line):
    assert first_line(error) == line


def test_a_failing_store_is_one_error_and_no_record_of_its_client(bucket):
    path = storage.path(f"{bucket.url}/a")
    bucket.inject("400", times=None)
    records = []
    handler = logging.Handler()
    handler.emit = records.append  # pytest's own fixture also listens to loggers that pass nothing on
    logging.getLogger().addHandler(handler)
    try:
        with pytest.raises(storage.StorageError, match="/a: "):
            storage.size(path)
    finally:
        logging.getLogger().removeHandler(handler)
    assert not records
    assert len(logging.getLogger("gcsfs").handlers) < 5  # one more for each path would be a leak
