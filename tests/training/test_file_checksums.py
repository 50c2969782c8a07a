"""Checkpoints of an earlier version, which have checksums of their files."""

import pathlib
import tarfile

import pytest
from etils import epath

from mtp_jax.training import file_checksums

RECORDED = pathlib.Path(__file__).parent.parent / "golden" / "checkpoints" / "sequential.tar.xz"


@pytest.mark.parametrize("damage", ["", "flip", "missing", "empty"])
def test_files_that_differ_from_their_checksums_are_found(tmp_path, damage):
    with tarfile.open(RECORDED) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "checkpoints"
    data = max((folder / "2").rglob("*"), key=lambda path: path.is_file() and path.stat().st_size)
    if damage == "flip":
        content = bytearray(data.read_bytes())
        content[len(content) // 2] ^= 1
        data.write_bytes(content)
    elif damage == "missing":
        data.unlink()
    elif damage == "empty":
        (folder / "2.checksums.json").write_text("{}")
    listed = lambda: file_checksums.list_leaves(epath.Path(folder), 2, epath.Path(folder / "2" / "state"))  # noqa: E731
    if damage:
        with pytest.raises(ValueError, match="not what was written|is missing|list no files"):
            listed()
    else:
        assert {leaf.path[0] for leaf in listed()} >= {"params", "opt_state", "step"}
