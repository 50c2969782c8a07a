"""Batches: the batch of step n is a pure function of (config, seed, n).

There is no iterator state to save. A run resumes, on any number of processes, from the number of the next step.
"""

import contextlib
import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from multiprocessing import resource_tracker

import grain
import numpy as np

from mtp_jax import signals
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.packing import Row, Rows, random_bits

Batch = dict[str, np.ndarray]

_MAX_THREADS = 4  # more threads wait for each other: the NumPy calls of a batch are too short to release the GIL


def num_batches_held(prefetch: int, num_workers: int) -> int:
    """Returns the number of batches in memory: those ready, one being read per thread or worker, the step's twice."""
    return prefetch + (num_workers or min(prefetch, _MAX_THREADS)) + 2


class Batches:
    """The batches of one split, by step or in order.

    The rows of a source are shuffled anew in each epoch (grain's index shuffle, which needs no table of the order); a
    batch may hold the end of one epoch and the start of the next, so that no row is left out.
    """

    def __init__(
        self,
        sources: Sequence[Rows],
        batch_size: int,
        *,
        mixture: Mixture | None = None,
        shuffle_seed: int | None,
        endless: bool,
        start_step: int = 0,
        row_slice: tuple[int, int] | None = None,
        num_workers: int = 0,
        prefetch: int = 4,
    ):
        """Batches of some rows.

        Args:
          sources: the rows of one epoch of each source, at least one row.
          batch_size: B, rows per step over all processes.
          mixture: order in which rows are drawn from the sources; None: there is one source.
          shuffle_seed: seed of the order of rows; None: the given order.
          endless: repeat until the mixture ends; else one epoch of the one source, without its last partial batch.
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
        self._sources = sources
        self._mixture = mixture or Mixture([1.0], [None])
        self._batch_size = batch_size
        self._slice = range(low, high)
        self.start_step = start_step
        num_rows = self._mixture.num_rows if endless else len(sources[0])
        self.num_batches: int | None = None if num_rows is None else num_rows // batch_size
        self._num_workers = num_workers
        self._prefetch = prefetch
        if start_step < 0 or start_step > self._end:
            raise ValueError(f"start_step={start_step}: there are {self._end} batches")
        self._has_weights = any(rows.has_weights for rows in sources)
        self._orders = [_order(len(rows), shuffle_seed, i) for i, rows in enumerate(sources)]

    @property
    def _end(self) -> int:
        return sys.maxsize if self.num_batches is None else self.num_batches

    def batch_at(self, step: int) -> Batch:
        """Returns the batch of a step.

        Returns:
          {"tokens", "segment_ids", "positions"}: int32[B, T + 1 + D], B the rows of this process, and with
          "loss_mask": float32[B, T + 1 + D] if some source has loss weights. See `packing.Row`.

        Raises:
          IndexError: a step outside the batches.
        """
        if not 0 <= step < self._end:
            raise IndexError(f"batch {step} of {self._end}")
        first = int(step) * self._batch_size
        rows = [self._row(first + i) for i in self._slice]
        if self._has_weights:
            rows = [row if row.loss_mask is not None else row._replace(loss_mask=_ones(row)) for row in rows]
        fields = {name: [getattr(row, name) for row in rows] for name in Row._fields}
        return {name: np.stack(values) for name, values in fields.items() if values[0] is not None}

    def _row(self, n: int) -> Row:
        source, i = self._mixture[n]
        return self._sources[source][self._orders[source][i]]

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


def _order(num_rows: int, shuffle_seed: int | None, source: int) -> grain.MapDataset:
    """Returns the rows of a source in the order in which they are drawn, without an end."""
    order = grain.MapDataset.range(num_rows)
    if shuffle_seed is not None:
        # grain adds the epoch to the seed, so that seed 1 would repeat seed 0 one epoch later: hash it first
        bits = random_bits(shuffle_seed, "row order", np.array([source]))[0]
        order = order.shuffle(seed=int(bits >> np.uint64(32)))
    return order.repeat()


def _ones(row: Row) -> np.ndarray:
    return np.ones(row.tokens.shape, np.float32)


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
