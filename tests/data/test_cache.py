"""Cache entries are complete, are what was written, and fail for their true cause."""

import errno
import os

import pytest

from mtp_jax.config import DataConfig, UserError
from mtp_jax.data import cache
from mtp_jax.errors import warn_once


def fill(folder):
    (folder / "sub").mkdir()
    (folder / "a").write_bytes(bytes(range(256)) * 4)
    (folder / "sub" / "b").write_bytes(b"b")


def content(folder):
    return (folder / "a").read_bytes() + (folder / "sub" / "b").read_bytes()


def refuse(folder):
    pytest.fail("is built again")


def flip(path, at):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_an_entry_is_built_once(tmp_path):
    entry = cache.entry(tmp_path / "tokens", "k", fill)
    assert cache.entry(tmp_path / "tokens", "k", refuse) == entry


@pytest.mark.parametrize("change", ["flip", "truncate", "remove", "add", "empty", "sums"])
def test_a_corrupt_entry_is_reported_and_built_again(tmp_path, change, capsys):
    entry = cache.entry(tmp_path / "tokens", "k", fill)
    good = content(entry)
    if change == "flip":
        flip(entry / "a", 700)
    elif change == "truncate":
        (entry / "a").write_bytes(b"1")
    elif change == "remove":
        (entry / "sub" / "b").unlink()
    elif change == "add":
        (entry / "c").write_text("")
    else:
        (entry / cache.CHECKSUMS).write_text("{}" if change == "empty" else "[" * 100_000)
    warn_once.cache_clear()
    assert content(cache.entry(tmp_path / "tokens", "k", fill)) == good
    assert "is corrupt (" in capsys.readouterr().err and (tmp_path / "tokens" / "k.corrupt").is_dir()
    cache.entry(tmp_path / "tokens", "k", refuse)


def test_a_large_file_is_sampled_and_read_whole_on_demand(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "_ALL_BYTES", 512)
    monkeypatch.setattr(cache, "_SAMPLE", 64)
    entry = cache.entry(tmp_path / "tokens", "k", fill)
    flip(entry / "a", 100)  # between the samples 0..63 and 128..191
    cache.entry(tmp_path / "tokens", "k", refuse)
    monkeypatch.setenv("MTP_JAX_VERIFY_CACHE", "1")
    warn_once.cache_clear()
    cache.entry(tmp_path / "tokens", "k", fill)
    assert (tmp_path / "tokens" / "k.corrupt").is_dir()
    flip(entry / "a", 140)
    monkeypatch.delenv("MTP_JAX_VERIFY_CACHE")
    cache.entry(tmp_path / "tokens", "k", fill)
    cache.entry(tmp_path / "tokens", "k", refuse)


def test_an_error_of_the_source_keeps_its_cause(tmp_path):
    def too_many(folder):
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), "/data/x.txt")

    with pytest.raises(OSError, match="Too many open files: '/data/x.txt'") as error:
        cache.entry(tmp_path / "tokens", "k", too_many)
    assert not isinstance(error.value, UserError)


def test_a_cache_that_cannot_be_written_is_named(tmp_path):
    def full(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "file").write_text("")
    for folder, build, reason in (
        (tmp_path / "tokens", full, "No space left on device"),
        (tmp_path / "file" / "tokens", fill, "Not a directory"),
    ):
        with pytest.raises(UserError, match=f"^data.cache_dir={folder.parent}: cannot be written .{reason}.; name"):
            cache.entry(folder, "k", build)
    assert [path.name for path in (tmp_path / "tokens").iterdir()] == [".k.lock"]


def test_a_url_is_refused():
    with pytest.raises(UserError, match="^data.cache_dir=gs://b/cache: .* needs a local folder; name one$"):
        cache.root(DataConfig(cache_dir="gs://b/cache"))
