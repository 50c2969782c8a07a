"""Checkpoints written and read in parts are checkpoints like any other."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mtp_jax.training import chunked_checkpoint
from mtp_jax.training.checkpoint import CheckpointError, Checkpoints, write_streamed


class Counted:
    """An array that records which parts of it were read."""

    def __init__(self, array, split_order=None):
        self._array, self.shape, self.dtype, self.read = array, array.shape, array.dtype, []
        if split_order is not None:
            self.split_order = split_order

    def __getitem__(self, index):
        self.read.append(index)
        return self._array[index]


def tree():
    rng = np.random.default_rng(0)
    return {
        "params": {
            "a": rng.standard_normal((3, 5, 7)).astype(ml_dtypes.bfloat16),
            "b": {"c": rng.standard_normal((4, 6)).astype(np.float32), "d": np.float32(3.0).reshape(())},
        },
        "biases": {"e": np.arange(5, dtype=np.float32)},
    }


@pytest.mark.parametrize("num_bytes", [8, 60, 1 << 20])
def test_a_streamed_checkpoint_restores_as_arrays_and_opens_lazily(monkeypatch, tmp_path, num_bytes):
    monkeypatch.setattr(chunked_checkpoint, "CHUNK_BYTES", num_bytes)
    counts, state = [], tree()
    write_streamed(tmp_path, 3, state, counts.append)
    assert sum(counts) == sum(leaf.size for leaf in jax.tree.leaves(state))
    with Checkpoints(tmp_path) as saved:
        assert saved.steps() == [3]
        abstract = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
        step, restored = saved.restore_part(None, abstract)
        assert step == 3
        jax.tree.map(np.testing.assert_array_equal, restored, state)
        step, opened = saved.open_part(("params", "biases", "opt_state"))
        assert step == 3 and opened["opt_state"] == {}
        leaf = opened["params"]["a"]
        assert (
            isinstance(leaf, chunked_checkpoint.StoredArray)
            and leaf.shape == (3, 5, 7)
            and leaf.dtype == ml_dtypes.bfloat16
        )
        np.testing.assert_array_equal(leaf[1, 2:4], state["params"]["a"][1, 2:4])
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[...], b), opened["params"], state["params"])


def test_parts_are_read_once_and_no_larger_than_a_chunk(monkeypatch, tmp_path):
    monkeypatch.setattr(chunked_checkpoint, "CHUNK_BYTES", 4 * 12)
    array = np.arange(4 * 6 * 5, dtype=np.float32).reshape(4, 6, 5)
    leaf = Counted(array, split_order=[0, 2, 1])
    write_streamed(tmp_path, 0, {"params": {"a": leaf}})
    parts = [array[index] for index in leaf.read]
    assert len(parts) == 4 * 3 and all(part.shape[:2] == (1, 6) and part.size <= 12 for part in parts)
    np.testing.assert_array_equal(np.sort(np.concatenate([p.ravel() for p in parts])), np.arange(array.size))
    with Checkpoints(tmp_path) as saved:
        np.testing.assert_array_equal(saved.open_part(("params",))[1]["params"]["a"][...], array)


def test_what_a_leaf_raises_is_reported_and_nothing_stays(tmp_path, capfd):
    class Failing(Counted):
        def __getitem__(self, index):
            raise OSError("the file is gone")

    state = {"params": {"a": np.ones(3, np.float32), "b": Failing(np.ones(3, np.float32))}}
    with pytest.raises(CheckpointError, match="cannot save step 0: the file is gone"):
        write_streamed(tmp_path, 0, state)
    assert Checkpoints(tmp_path).steps() == [] and "Traceback" not in capfd.readouterr().err


def test_a_corrupt_newest_step_is_passed_over(tmp_path, capfd):
    for step in (1, 2):
        write_streamed(tmp_path, step, {"params": {"a": np.full(3, step, np.float32)}})
    data = max((tmp_path / "2").rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with Checkpoints(tmp_path) as saved:
        step, opened = saved.open_part(("params",))
    assert step == 1 and jnp.array_equal(opened["params"]["a"][...], jnp.ones(3))
    assert "2 is corrupt" in capfd.readouterr().err


def test_a_folder_whose_name_is_a_pattern(tmp_path, monkeypatch):
    (tmp_path / "run[1]").mkdir()
    monkeypatch.chdir(tmp_path / "run[1]")
    write_streamed("checkpoints", 0, tree())
    with Checkpoints("checkpoints") as saved:
        _, opened = saved.open_part(("params", "biases"))
        jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[...], b), opened, tree())
        _, restored = saved.restore_part(None, saved.saved_part(("params",)))
        jax.tree.map(np.testing.assert_array_equal, restored["params"], tree()["params"])
    assert [p.name for p in (tmp_path / "run[1]" / "checkpoints").iterdir()] == ["0"]
