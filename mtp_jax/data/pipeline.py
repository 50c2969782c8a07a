"""Batches: the batch of step n is a pure function of (config, seed, n).

There is no iterator state to save. A run resumes, on any number of processes, from the number of the next step.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager
from multiprocessing import resource_tracker

import grain
import numpy as np

from mtp_jax import signals
from mtp_jax.data.packing import Rows, random_bits

Batch = dict[str, np.ndarray]

_MAX_THREADS = 4  # more threads wait for each other: the NumPy calls of a batch are too short to release the GIL


def num_batches_held(prefetch: int, num_workers: int) -> int:
    """Returns the number of batches in memory: those ready, one being read per thread or worker, the step's twice."""
    return prefetch + (num_workers or min(prefetch, _MAX_THREADS)) + 2


class Batches:
    """The batches of one split, by step or in order.

    The rows are shuffled anew in each epoch (grain's index shuffle, which needs no table of the order); a batch may
    hold the end of one epoch and the start of the next, so that no row is left out.
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
        """Batches of some rows.

        Args:
          rows: the rows of one epoch, at least one.
          batch_size: B, rows per step over all processes.
          shuffle_seed: seed of the order of rows; None: the given order.
          endless: repeat for ever; else one epoch, without its last partial batch.
          start_step: the step at which iteration begins.
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
            # grain adds the epoch to the seed, so that seed 1 would repeat seed 0 one epoch later: hash it first
            order = order.shuffle(seed=int(random_bits(shuffle_seed, "row order", np.zeros(1))[0] >> np.uint64(32)))
        self._order = order.repeat()

    @property
    def _end(self) -> int:
        return sys.maxsize if self.num_batches is None else self.num_batches

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a step.

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
        """Returns the batches from start_step on, read ahead."""
        return BatchIterator(self._dataset(), self.start_step)

    def _dataset(self) -> grain.IterDataset:
        steps = grain.MapDataset.range(self.start_step, self._end).map(self.batch_at)
        if not self._num_workers:
            threads = min(self._prefetch, _MAX_THREADS)
            return steps.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=self._prefetch))
        _mark_flags_as_parsed()
        with signals.blocked():  # the tracker ignores SIGINT and SIGTERM only
            resource_tracker.ensure_running()  # where a worker is the first to need it, its start unblocks signals
        ahead = -(-self._prefetch // self._num_workers)
        one_thread = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        workers = grain.MultiprocessingOptions(num_workers=self._num_workers, per_worker_buffer_size=ahead)
        return steps.to_iter_dataset(one_thread).mp_prefetch(workers)


class BatchIterator(Iterator[Batch], AbstractContextManager["BatchIterator"]):
    """Batches in order; a context manager. Its threads or processes end with it, or with the program."""

    def __init__(self, dataset: grain.IterDataset, start_step: int):
        self.step = start_step  # that of the next batch
        with signals.blocked():
            # a list that the finalizer empties: it must hold no reference to self
            self._iterators = [iter(dataset)]
        self._is_started = False
        self._finalizer = weakref.finalize(self, _close_all, self._iterators)  # also at exit, where workers would hang

    def __next__(self) -> Batch:
        if not self._iterators:
            raise ValueError("this iterator is closed")
        with contextlib.nullcontext() if self._is_started else signals.blocked():  # the first starts the workers
            batch = next(self._iterators[0])
        self._is_started = True
        self.step += 1
        # arrays of a worker are in shared memory, which the owner of the batch would have to release
        return {name: np.array(value) for name, value in batch.items()}

    def close(self) -> None:
        """Ends the threads or processes; no batch follows."""
        self._finalizer()

    def __exit__(self, *exception: object) -> None:
        self.close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def _mark_flags_as_parsed() -> None:
    """Marks absl's flags as parsed, which grain's workers require; notebooks and tests do not parse them."""
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
