"""Arrays of a checkpoint that are read and written in parts, so that a checkpoint may be larger than memory.

orbax stores each array in zarr format under its name, in an OCDBT database in the folder; both formats are those of
tensorstore, which reads them here. On writing, a handler is registered for the type of the leaves.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from mtp_jax.training import checksums
from mtp_jax.typing import Index, JsonObject, PyTree, ReadableArray

CHUNK_BYTES = 64 * 2**20


class StoredArray:
    """An array of a checkpoint, read on indexing (ints, slices, ...)."""

    def __init__(self, store: ts.TensorStore):
        self._store = store
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype = store.dtype.numpy_dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return self._store[index].read().result()

    def sums(self) -> checksums.Sums:
        """Returns the checksum; reads one stored chunk at a time."""
        sums = _Sums(self.shape)
        for block in _blocks(self.shape, [int(n or 1) for n in self._store.chunk_layout.read_chunk.shape or ()]):
            sums.add(self[block], block)
        return sums.total()


def open_array(directory: epath.Path, path: checksums.Path) -> StoredArray:
    """Opens one array of the checkpoint item in `directory`.

    Raises:
      ValueError: it does not exist or cannot be read.
    """
    return StoredArray(ts.open(_spec(directory, ".".join(path)), open=True, read=True).result())


def save(
    directory: epath.Path, tree: PyTree, progress: Callable[[int], None] = lambda num_elements: None
) -> list[checksums.Leaf]:
    """Writes `tree` into `directory` in orbax's format. On failure the caller removes what was written.

    Args:
      directory: the folder to write.
      tree: nested dicts of leaves with `shape`, `dtype` and `[slices] -> array`; numpy arrays too. A leaf may have
        `split_order`, the order in which its dims are split into chunks (default: from the first on).
      progress: called with the number of elements of each chunk written.

    Returns:
      The leaves with the checksums of what was written.

    Raises:
      The errors of tensorstore, such as a full disk, and those of the leaves.
    """
    sources = jax.tree.map(_Source, tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    registry = type_handlers.create_type_handler_registry(
        (_Source, _Writer(progress)), (jax.Array, type_handlers.ArrayHandler())
    )  # orbax warns of registries that cannot handle jax arrays
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(type_handler_registry=registry)) as checkpointer:
        checkpointer.save(directory, args=ocp.args.PyTreeSave(sources))
    return [
        checksums.Leaf(path, leaf.shape, leaf.dtype.name, leaf.sums.total())
        for path, leaf in checksums.flatten(sources).items()
    ]


class _Source:
    """A leaf to save, of any type that can be indexed.

    Attributes:
      chunk: shape of the largest block within CHUNK_BYTES that splits as few dims as possible.
      sums: of the blocks written so far.
    """

    def __init__(self, array: ReadableArray):
        self.array, self.shape, self.dtype = array, tuple(array.shape), np.dtype(array.dtype)
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        self.nbytes = self.size * self.dtype.itemsize
        self.chunk = [max(n, 1) for n in self.shape]
        for dim in getattr(array, "split_order", range(self.ndim)):
            rest = self.dtype.itemsize * int(np.prod(self.chunk)) // self.chunk[dim]
            if rest * self.chunk[dim] <= CHUNK_BYTES:
                break
            self.chunk[dim] = max(1, CHUNK_BYTES // rest)
        self.sums = _Sums(self.shape)


class _Writer(type_handlers.NumpyHandler):
    """Saves `_Source`s as ordinary arrays, one block after the other; a block is read while the last one is written."""

    def __init__(self, progress: Callable[[int], None]):
        super().__init__()
        self._progress = progress

    async def serialize(
        self,
        values: Sequence[_Source],
        infos: Sequence[type_handlers.ParamInfo],
        args: Sequence[ocp.SaveArgs] | None = None,
    ) -> Sequence[Any]:
        writing = None
        for value, info in zip(values, infos, strict=True):
            metadata = {"shape": value.shape, "chunks": value.chunk, "compressor": {"id": "zstd", "level": 1}}
            spec = _spec(info.parent_dir, info.name) | {"dtype": value.dtype.name, "metadata": metadata}
            store = await ts.open(spec, create=True, context=info.ts_context)
            for block in _blocks(value.shape, value.chunk):
                part = np.asarray(value.array[block])
                value.sums.add(part, block)
                if writing is not None:
                    await writing
                writing = store[block].write(part, can_reference_source_data_indefinitely=True)
                self._progress(part.size)
        if writing is not None:
            await writing
        return []


class _Sums:
    """Sum of the checksums of an array's blocks."""

    def __init__(self, shape: tuple[int, ...]):
        self._shape, self._first, self._second = shape, 0, 0

    def add(self, part: np.ndarray, block: tuple[slice, ...]) -> None:
        first, second, _ = checksums.block_sums(part, [each.start for each in block], self._shape)
        self._first, self._second = self._first + int(first), self._second + int(second)

    def total(self) -> checksums.Sums:
        return self._first % 2**32, self._second % 2**32


def _blocks(shape: Sequence[int], chunk: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yields the slices of every chunk of an array."""
    for corner in np.ndindex(*(-(-n // c) for n, c in zip(shape, chunk, strict=True))):
        starts = [i * c for i, c in zip(corner, chunk, strict=True)]
        yield tuple(slice(s, min(s + c, n)) for s, c, n in zip(starts, chunk, shape, strict=True))


def _spec(directory: epath.Path, name: str) -> JsonObject:
    """Returns tensorstore's spec of an array in the folder of a checkpoint item."""
    folder = os.fspath(directory).rstrip("/") + "/"
    base = folder if "://" in folder else {"driver": "file", "path": folder}
    return {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name + "/"}}
