"""Batches: what is read at step n is a pure function of (config, seed, n).

There is no iterator state to save. A run resumes, on any number of processes, by asking for the step it stopped at.
"""

import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager

import grain
import numpy as np

from mtp_jax.data.packing import Rows, random_bits

Batch = dict[str, np.ndarray]

_MAX_THREADS = 4  # more only wait for each other: a batch is mostly NumPy calls too short to release the interpreter


def num_batches_held(prefetch: int, num_workers: int) -> int:
    """Batches in memory at one time: those ready, one being read per thread or worker, that of the step twice."""
    return prefetch + (num_workers or min(prefetch, _MAX_THREADS)) + 2


class Batches:
    """The batches of one split, by step or in order.

    The rows of an epoch are shuffled anew in each one (grain's index shuffle, which needs no table of the order); a
    batch may hold the end of one epoch and the start of the next, so that no row is left out.
    """

    def __init__(
        self,
        rows: Rows,
        batch_size: int,
        *,
        shuffle_seed: int | None,
        endless: bool,
        start_step: int = 0,
        row_slice: tuple[int, int] | None = None,
        num_workers: int = 0,
        prefetch: int = 4,
    ):
        """
        Args:
          rows: of one epoch, at least one.
          batch_size: B, rows a step over all processes.
          shuffle_seed: of the order of rows; None keeps their own.
          endless: repeat for ever; else one epoch, without its last partial batch.
          start_step: where iteration begins.
          row_slice: (low, high), the rows of each global batch that this process reads; None: all.
          num_workers: processes that read; 0: threads of this one.
          prefetch: batches read ahead.

        Raises:
          ValueError: a row slice outside the batch, or a step outside the batches.
        """
        low, high = row_slice or (0, batch_size)
        if not 0 <= low < high <= batch_size:
            raise ValueError(f"row_slice=({low}, {high}): must be a part of the batch_size={batch_size} rows")
        self._rows = rows
        self._batch_size = batch_size
        self._slice = range(low, high)
        self.start_step = start_step
        self.num_batches: int | None = None if endless else len(rows) // batch_size
        self._num_workers = num_workers
        self._prefetch = prefetch
        if start_step < 0 or start_step > self._end:
            raise ValueError(f"start_step={start_step}: there are {self._end} batches")
        order = grain.MapDataset.range(len(rows))
        if shuffle_seed is not None:
            # grain adds the epoch to the seed, so that seed 1 would repeat seed 0 one epoch later: scatter them first
            order = order.shuffle(seed=int(random_bits(shuffle_seed, "row order", np.zeros(1))[0] >> np.uint64(32)))
        self._order = order.repeat()

    @property
    def _end(self) -> int:
        return sys.maxsize if self.num_batches is None else self.num_batches

    def batch_at(self, step: int) -> Batch:
        """The batch of a step.

        Returns:
          {"tokens", "segment_ids", "positions"}: int32[B, T + 1 + D], B the rows of this process. See `packing.Row`.

        Raises:
          IndexError: a step outside the batches.
        """
        if not 0 <= step < self._end:
            raise IndexError(f"batch {step} of {self._end}")
        first = int(step) * self._batch_size
        rows = [self._rows[self._order[first + i]] for i in self._slice]
        return {name: np.stack([getattr(row, name) for row in rows]) for name in rows[0]._fields}

    def __iter__(self) -> "BatchIterator":
        """The batches from start_step on, read ahead."""
        return BatchIterator(self._dataset(), self.start_step)

    def _dataset(self) -> grain.IterDataset:
        steps = grain.MapDataset.range(self.start_step, self._end).map(self.batch_at)
        if not self._num_workers:
            threads = min(self._prefetch, _MAX_THREADS)
            return steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch))
        _mark_flags_as_parsed()
        ahead = -(-self._prefetch // self._num_workers)
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=ahead)
        return steps.to_iter_dataset(one_thread).mp_prefetch(workers)


class BatchIterator(Iterator[Batch], AbstractContextManager["BatchIterator"]):
    """Batches in order; a context manager. Its threads or processes end with it, or with the program."""

    def __init__(self, dataset: grain.IterDataset, start_step: int):
        self.step = start_step  # of the batch that comes next
        self._iterators = [iter(dataset)]  # a list, for the finalizer to empty: it must hold no reference to self
        self._finalizer = weakref.finalize(self, _close_all, self._iterators)  # also at exit, which workers would hang

    def __next__(self) -> Batch:
        if not self._iterators:
            raise ValueError("this iterator is closed")
        batch = next(self._iterators[0])
        self.step += 1
        # what a worker hands over lies in shared memory, which would have to be released by whoever keeps the batch
        return {name: np.array(value) for name, value in batch.items()}

    def close(self) -> None:
        """End the threads or processes; no more batches."""
        self._finalizer()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _mark_flags_as_parsed() -> None:
    """grain's workers are handed absl's flags, which must have been parsed; in a notebook or a test nobody has."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
