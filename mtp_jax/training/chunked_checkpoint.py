"""Checkpoints larger than memory, written and read in orbax's format one chunk at a time.

orbax dispatches on the type of a leaf. The two handlers here take leaves that can be read in parts: on saving, each
chunk is read and handed to tensorstore in turn; on restoring, the stored array is opened and not read. The result is an
ordinary checkpoint, which any other code restores as arrays.
"""

import asyncio
import pathlib
from collections.abc import Callable, Iterable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from orbax.checkpoint import type_handlers

from mtp_jax.typing import Index, JsonObject, PyTree, ReadableArray

CHUNK_BYTES = 64 * 2**20
_IN_FLIGHT = 2  # chunks read and not yet written


class StoredArray:
    """An array of a checkpoint, read on indexing (ints, slices, ...)."""

    def __init__(self, store: ts.TensorStore):
        self._store = store
        self.shape: tuple[int, ...] = tuple(store.shape)
        self.dtype = store.dtype.numpy_dtype

    def __getitem__(self, index: Index) -> np.ndarray:
        return self._store[index].read().result()


def save(directory: pathlib.Path, tree: PyTree, progress: Callable[[int], None] = lambda num_elements: None) -> None:
    """Writes `tree` into `directory` in orbax's format. On failure the caller removes what was written.

    Args:
      directory: the folder to write.
      tree: nested dicts of leaves with `shape`, `dtype` and `[slices] -> array`; numpy arrays too. A leaf may have
        `split_order`, the order in which its dims are split into chunks (default: from the first on).
      progress: called with the number of elements of each chunk written.

    Raises:
      The errors of tensorstore, such as a full disk.
    """
    leaves = jax.tree.map(_Source, tree, is_leaf=lambda leaf: hasattr(leaf, "shape"))
    writer = _Writer(progress)
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=_registry(_Source, writer))
    with ocp.Checkpointer(handler) as checkpointer:
        try:
            checkpointer.save(epath.Path(directory), args=ocp.args.PyTreeSave(leaves))
        except ValueError:  # orbax reports missing arrays; the writer has the cause
            if writer.error is None:
                raise
    if writer.error is not None:
        raise writer.error


def open_arrays(directory: pathlib.Path, abstract: PyTree) -> PyTree:
    """Returns the stored arrays under the names of `abstract`, as `StoredArray`s.

    Args:
      directory: a checkpoint in orbax's format.
      abstract: nested dicts with the names of the arrays to open; the leaves are ignored.
    """
    arguments = ocp.args.PyTreeRestore(
        item=abstract,
        restore_args=jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=StoredArray), abstract),
        partial_restore=True,
    )
    return ocp.PyTreeCheckpointHandler(type_handler_registry=_registry(StoredArray, _Opener())).restore(
        epath.Path(directory), args=arguments
    )


def _registry(kind: type, handler: type_handlers.TypeHandler) -> type_handlers.TypeHandlerRegistry:
    """Returns a registry for one type. orbax warns of registries that cannot handle jax arrays."""
    return type_handlers.create_type_handler_registry((kind, handler), (jax.Array, type_handlers.ArrayHandler()))


class _Source:
    """A leaf to save, of any type that can be indexed."""

    def __init__(self, array: ReadableArray):
        self.array, self.shape, self.dtype = array, tuple(array.shape), np.dtype(array.dtype)
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape))
        self.nbytes = self.size * self.dtype.itemsize
        self.chunk = _chunk_shape(self.shape, self.dtype.itemsize, getattr(array, "split_order", range(self.ndim)))

    def blocks(self) -> Iterator[tuple[slice, ...]]:
        """Yields the slices of every chunk."""
        num_chunks = tuple(-(-n // c) for n, c in zip(self.shape, self.chunk, strict=True))
        for corner in np.ndindex(num_chunks):
            starts = [i * c for i, c in zip(corner, self.chunk, strict=True)]
            yield tuple(slice(s, min(s + c, n)) for s, c, n in zip(starts, self.chunk, self.shape, strict=True))


def _chunk_shape(shape: tuple[int, ...], itemsize: int, split_order: Iterable[int]) -> list[int]:
    """Returns the largest block within CHUNK_BYTES that splits as few dims as possible."""
    chunk = [max(n, 1) for n in shape]
    for dim in split_order:
        rest = itemsize * int(np.prod(chunk)) // chunk[dim]
        if rest * chunk[dim] <= CHUNK_BYTES:
            break
        chunk[dim] = max(1, CHUNK_BYTES // rest)
    return chunk


class _Writer(type_handlers.NumpyHandler):
    """Saves `_Source`s as ordinary arrays."""

    def __init__(self, progress: Callable[[int], None]):
        super().__init__(deepcopy_host_arrays=False)
        self._progress = progress
        self.error: Exception | None = None  # raised when orbax is done: its thread would print a traceback
        self._free: asyncio.Semaphore | None = None

    async def _open_and_write(self, value: _Source, tspec: JsonObject, ts_context: ts.Context) -> None:
        try:
            await self._write(value, tspec, ts_context)
        except Exception as error:
            self.error = self.error or error

    async def _write(self, value: _Source, tspec: JsonObject, ts_context: ts.Context) -> None:
        self._free = self._free or asyncio.Semaphore(_IN_FLIGHT)
        tspec["metadata"]["chunks"] = value.chunk
        store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
        for block in value.blocks():
            async with self._free:
                if self.error is not None:
                    return
                part = np.asarray(value.array[block])
                await store[block].write(part, can_reference_source_data_indefinitely=True)
                self._progress(part.size)


class _Opener(type_handlers.NumpyHandler):
    """Restores leaves as `StoredArray`s."""

    async def deserialize(self, infos, args=None):
        specs = [ts.Spec(type_handlers.get_json_tspec_read(info, use_ocdbt=info.is_ocdbt_checkpoint)) for info in infos]
        opening = [ts.open(s, open=True, context=info.ts_context) for s, info in zip(specs, infos, strict=True)]
        return [StoredArray(store) for store in await asyncio.gather(*opening)]
