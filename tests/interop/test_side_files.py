"""Side files stay in their folder, and folders in an object store are read and written like local ones."""

import os

import numpy as np
import pytest

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.interop import checkpoint_folder
from mtp_jax.interop.tensorfiles import TensorFolder, write_folder


def copied(source, target):
    target.mkdir()
    checkpoint_folder._copy_sides(source, storage.path(target))
    return sorted(path.name for path in target.iterdir())


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (tmp_path / "private").write_text("secret")
    return folder


def test_a_link_out_of_the_folder_is_refused(source, tmp_path):
    (source / "vocab.txt").symlink_to("../private")
    with pytest.raises(UserError, match=f"vocab.txt: is a link to {tmp_path}/private, outside its folder; replace it"):
        copied(source, tmp_path / "target")
    assert not (tmp_path / "target" / "vocab.txt").exists()


@pytest.mark.parametrize("device", ["/dev/zero", "fifo"])
def test_what_is_no_file_is_refused(source, tmp_path, device):
    if device == "fifo":
        os.mkfifo(source / "vocab.txt")
    else:
        (source / "vocab.txt").symlink_to(device)
    with pytest.raises(UserError, match="outside its folder" if device != "fifo" else "is not a regular file"):
        copied(source, tmp_path / "target")


def test_links_inside_the_folder_and_a_download_cache_are_followed(source, tmp_path):
    (source / "vocab.txt").symlink_to("tokenizer.json")
    assert copied(source, tmp_path / "target") == ["tokenizer.json", "vocab.txt"]
    model = tmp_path / "models--x"
    (model / "blobs").mkdir(parents=True)
    (model / "snapshots" / "rev").mkdir(parents=True)
    (model / "blobs" / "abc").write_text("{}")
    (model / "snapshots" / "rev" / "tokenizer.json").symlink_to("../../blobs/abc")
    assert copied(model / "snapshots" / "rev", tmp_path / "target2") == ["tokenizer.json"]


def test_a_file_that_grows_while_it_is_copied_is_counted(source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_folder, "_LARGEST_SIDE_FILE", 10)
    (source / "large.txt").write_text("x" * 11)
    assert copied(source, tmp_path / "target") == ["tokenizer.json"]


def test_tensors_of_an_object_store_are_read_by_ranges(bucket):
    arrays = {f"t{i}": np.arange(i * 60_000, (i + 1) * 60_000, dtype=np.float32).reshape(300, 200) for i in range(4)}
    specs = {name: ("F32", array.shape) for name, array in arrays.items()}
    write_folder(bucket.url + "/model", specs, arrays.items(), shard_bytes=500_000)
    names = storage.names(bucket.url + "/model")
    assert names == [
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    folder = TensorFolder(bucket.url + "/model")
    before = len(bucket.requests())
    np.testing.assert_array_equal(folder.read("t2", slice(10, 12)), arrays["t2"][10:12])
    for name, array in arrays.items():
        np.testing.assert_array_equal(folder.read(name), array)
    assert len(bucket.requests()) - before < 30
    storage.write_bytes(bucket.url + "/model/" + names[0], storage.read_bytes(bucket.url + "/model/" + names[0])[:-1])
    with pytest.raises(UserError, match="changed since its header was read"):
        folder.read("t0")
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        TensorFolder(bucket.url + "/model")
