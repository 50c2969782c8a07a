"""The rows of the documents of a source: random access, no state.

`WholeRows` keeps each document whole. `StreamRows` splits the stream, the concatenation of the documents in a fixed
order. With N tokens in it and T positions per row, row r is

    stream[r T : r T + T + 1 + D],    r < R = (N - 1 - MAX_DEPTH) // T,

so consecutive rows overlap by 1 + D tokens, each of stream[1 : R T + 1] is the depth-0 target exactly once, and no row
needs padding. R does not depend on D: models of different depths read the same rows in the same order.
"""

import bisect
import dataclasses
import hashlib
from typing import NamedTuple, Protocol

import numpy as np

from mtp_jax.config import MAX_DEPTH
from mtp_jax.data.store import TokenStore
from mtp_jax.data.tokenizer import FIMTokens


class Row(NamedTuple):
    """One row, [T + 1 + lookahead] each. Segment 0 is padding (`targets.PADDING`): positions without a document.

    tokens: int32, the ids.
    segment_ids: int32, 1, 2, 3 .. for each document in the row; all 1 in contiguous rows.
    positions: int32, 0, 1, 2 .. from the start of each document or of the row; of the row alone in contiguous rows.
    loss_mask: float32, weight of each token as a target; None: 1.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    loss_mask: np.ndarray | None = None


class Rows(Protocol):
    """The rows of one epoch of a source: a sequence of `Row`s.

    has_weights: whether rows have a loss mask.
    """

    has_weights: bool

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> Row: ...


@dataclasses.dataclass(frozen=True)
class FIM:
    """Fill-in-the-middle of 2207.14255 in DeepSeek-V3's order, with boundaries between any two tokens:

        [bos] <prefix> prefix <suffix> suffix <middle> middle [eos]

    The rearranged documents and their boundaries are a pure function of (seed, document index).
    """

    rate: float
    tokens: FIMTokens
    seed: int

    def chosen(self, documents: np.ndarray) -> np.ndarray:
        """Returns bool[n], true for the documents that are rearranged."""
        return random_bits(self.seed, "fim", documents) < self.rate * 2.0**64

    def split_points(self, documents: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns int64[n] a <= b: the middle is tokens[a:b] of the `lengths` tokens between bos and eos."""
        one = random_bits(self.seed, "fim first cut", documents) % (lengths + 1).astype(np.uint64)
        two = random_bits(self.seed, "fim second cut", documents) % (lengths + 1).astype(np.uint64)
        return np.minimum(one, two).astype(np.int64), np.maximum(one, two).astype(np.int64)


class Stream:
    """The documents of a store, concatenated in a given order."""

    def __init__(self, store: TokenStore, documents: np.ndarray, fim: FIM | None = None):
        """Stream of some documents.

        Args:
          store: the tokens.
          documents: int64[n], indices into the store, in the order of the stream.
          fim: rearranges some of them; each grows by three tokens.
        """
        self._store = store
        self.has_weights = store.weights is not None
        self._documents = documents
        self._fim = fim if fim is not None and fim.rate > 0 else None
        lengths = store.lengths[documents]
        if self._fim is not None:
            lengths = lengths + 3 * self._fim.chosen(documents)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])  # int64[n + 1], in the stream

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> "Span":
        """Reads the tokens [start, stop) of the stream."""
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        last = int(np.searchsorted(self._starts, stop, "left"))
        counts = np.diff(np.clip(self._starts[first : last + 1], start, stop))
        ranks = np.repeat(np.arange(first, last), counts)
        offsets = np.arange(start, stop) - self._starts[ranks]
        bases = np.repeat(self._store.offsets[self._documents[first:last]], counts)
        if self._fim is None:
            return Span(self._store.ids(bases + offsets), ranks, offsets, self._store.loss_weights(bases + offsets))
        sources, marks = self._rearranged(self._fim, first, last, counts, offsets)
        tokens = np.where(marks >= 0, marks, self._store.ids(bases + sources))
        return Span(tokens, ranks, offsets, None)

    def _rearranged(
        self, fim: FIM, first: int, last: int, counts: np.ndarray, offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the index of each token in its document as stored, and int32 FIM marks, -1 for other tokens."""
        documents = self._documents[first:last]
        lengths = self._store.lengths[documents] - self._store.has_bos - self._store.has_eos
        a, b = fim.split_points(documents, lengths)
        chosen, lengths, a, b = (np.repeat(x, counts) for x in (fim.chosen(documents), lengths, a, b))
        i = offsets - self._store.has_bos  # index in the rearranged document, 0 for the prefix mark
        suffix, middle = a + 1, a + 2 + lengths - b  # indices of the other two marks
        inner = np.select(
            [i < 1, i <= suffix, i <= middle, i < lengths + 3],
            [i, i - 1, i - suffix - 1 + b, i - middle - 1 + a],
            i - 3,
        )
        marks = np.select([i == 0, i == suffix, i == middle], fim.tokens, -1)
        marks = np.where(chosen, marks, -1).astype(np.int32)
        sources = np.where(chosen, inner + self._store.has_bos, offsets)
        return np.where(marks >= 0, 0, sources), marks


class Span(NamedTuple):
    """Tokens [start, stop) of a stream.

    tokens: int32, the ids.
    ranks: int64, rank in the stream of each token's document.
    offsets: int64, offset of each token in its document.
    weights: float32, loss weight of each token; None: 1.
    """

    tokens: np.ndarray
    ranks: np.ndarray
    offsets: np.ndarray
    weights: np.ndarray | None


class StreamRows:
    """Rows that follow each other in a stream."""

    def __init__(self, stream: Stream, sequence_length: int, lookahead: int, packed: bool = True):
        """Rows of a stream.

        Args:
          stream: the tokens.
          sequence_length: T.
          lookahead: tokens beyond the next one. With more than MAX_DEPTH the last rows may reach past the end of the
            stream, where they are padded.
          packed: whether documents are separate segments.
        """
        self._stream = stream
        self.has_weights = stream.has_weights
        self._length = sequence_length
        self._lookahead = lookahead
        self._packed = packed

    def __len__(self) -> int:
        return max(0, (len(self._stream) - 1 - MAX_DEPTH) // self._length)

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        start = row * self._length
        size = self._length + 1 + self._lookahead
        tokens, ranks, offsets, weights = self._stream.read(start, min(start + size, len(self._stream)))
        positions = np.arange(len(tokens), dtype=np.int32)
        segments = np.ones(len(tokens), np.int32)
        if self._packed:
            # a document that began before the row counts from the row's start
            positions = np.minimum(positions, offsets).astype(np.int32)
            segments = (ranks - ranks[0] + 1).astype(np.int32)
        return _padded(Row(tokens, segments, positions, weights), size)


class WholeRows:
    """Rows of whole documents, each followed by padding; only the `num_truncated` documents longer than a row are
    truncated.

    A row holds T + 1 tokens, the lookahead is padding, so that models of all depths read the same rows. Documents are
    assigned by best-fit decreasing (2404.10830, section 3): from the longest to the shortest, each to the fullest row
    that has room for it.
    """

    def __init__(self, store: TokenStore, documents: np.ndarray, sequence_length: int, lookahead: int):
        """Rows of some documents of a store, int64[n], which break ties between documents of equal length."""
        self._store = store
        self.has_weights = store.weights is not None
        self._capacity, self._size = sequence_length + 1, sequence_length + 1 + lookahead
        lengths = np.minimum(store.lengths[documents], self._capacity)
        self.num_truncated = int((store.lengths[documents] > self._capacity).sum())
        row_of = _best_fit(lengths, self._capacity)
        order = np.argsort(row_of, kind="stable")
        self._documents = documents[order]  # row r holds [starts[r], starts[r + 1])
        num_rows = int(row_of.max(initial=-1)) + 1
        self._starts = np.searchsorted(row_of[order], np.arange(num_rows + 1))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, row: int) -> Row:
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        documents = self._documents[self._starts[row] : self._starts[row + 1]]
        counts = np.minimum(self._store.lengths[documents], self._capacity)
        segments = np.repeat(np.arange(1, len(documents) + 1, dtype=np.int32), counts)
        ends = np.cumsum(counts)
        positions = (np.arange(ends[-1]) - np.repeat(ends - counts, counts)).astype(np.int32)
        at = np.repeat(self._store.offsets[documents], counts) + positions
        return _padded(Row(self._store.ids(at), segments, positions, self._store.loss_weights(at)), self._size)


def _padded(row: Row, size: int) -> Row:
    missing = size - len(row.tokens)
    if not missing:
        return row
    padded = {name: np.pad(value, (0, missing)) for name, value in row._asdict().items() if value is not None}
    return row._replace(**padded)


def _best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Returns int64[n], the row of each document by best-fit decreasing.

    Documents of one length are assigned together: each row that is the fullest with room for one takes as many as fit.

    Args:
      lengths: int64[n], each between 1 and `capacity`.
      capacity: tokens of a row.
    """
    rows, num_rows = np.empty(len(lengths), np.int64), 0
    order = np.argsort(-lengths, kind="stable")
    rooms: list[int] = []  # in increasing order, those that some row has left
    by_room: dict[int, list[int]] = {}

    def leave(room: int, those: list[int]) -> None:
        if room and those:
            if room not in by_room:
                bisect.insort(rooms, room)
            by_room.setdefault(room, []).extend(those)

    for documents in np.split(order, np.flatnonzero(np.diff(lengths[order])) + 1) if len(order) else ():
        length, done = int(lengths[documents[0]]), 0
        while done < len(documents):
            at = bisect.bisect_left(rooms, length)
            room = rooms[at] if at < len(rooms) else capacity
            each = room // length
            wanted = -(-(len(documents) - done) // each)
            if at < len(rooms):
                chosen = by_room[room][-wanted:]
                del by_room[room][-wanted:]
                if not by_room[room]:
                    del by_room[room], rooms[at]
            else:
                chosen, num_rows = list(range(num_rows, num_rows + wanted)), num_rows + wanted
            part = documents[done : done + each * len(chosen)]
            rows[part] = np.repeat(chosen, each)[: len(part)]
            num_full, rest = divmod(len(part), each)
            leave(room - each * length, chosen[:num_full])
            leave(room - rest * length, chosen[num_full : num_full + 1])
            done += len(part)
    return rows


def shuffled(documents: np.ndarray, seed: int) -> np.ndarray:
    """Returns `documents` in an order that depends on the seed alone, not on the version of NumPy."""
    return documents[np.argsort(random_bits(seed, "document order", documents), kind="stable")]


def random_bits(seed: int, purpose: str, index: np.ndarray) -> np.ndarray:
    """Returns uint64[n] for int[n] indices, a pure function of all three arguments (splitmix64)."""
    key = int.from_bytes(hashlib.blake2b(f"{seed}/{purpose}".encode(), digest_size=8).digest(), "little")
    x = np.asarray(index).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(key)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
