"""The stream of all documents and its rows: random access, no state.

The stream is the concatenation of the documents in a fixed order. With N tokens in it and T positions per row, row r is

    stream[r T : r T + T + 1 + D],    r < R = (N - 1 - MAX_DEPTH) // T,

so consecutive rows overlap by 1 + D tokens, each of stream[1 : R T + 1] is the depth-0 target exactly once, and no row
needs padding. R does not depend on D: models of different depths read the same rows in the same order.
"""

import dataclasses
import hashlib
from typing import NamedTuple

import numpy as np

from mtp_jax.config import MAX_DEPTH
from mtp_jax.data.store import TokenStore
from mtp_jax.data.tokenizer import FIMTokens


class Row(NamedTuple):
    """One row, int32[T + 1 + lookahead] each. Segment 0 is padding (`targets.PADDING`) for positions past the stream.

    tokens: the ids.
    segment_ids: 1, 2, 3 .. for each document in the row; all 1 in contiguous rows.
    positions: 0, 1, 2 .. from the start of each document or of the row; of the row alone in contiguous rows.
    """

    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray


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
        self._documents = documents
        self._fim = fim if fim is not None and fim.rate > 0 else None
        lengths = store.lengths[documents]
        if self._fim is not None:
            lengths = lengths + 3 * self._fim.chosen(documents)
        self._starts = np.concatenate([[0], np.cumsum(lengths)])  # int64[n + 1], in the stream

    def __len__(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Reads the tokens [start, stop) of the stream.

        Returns:
          int32 tokens, and for each the int64 rank of its document in the stream and its offset in that document.
        """
        assert 0 <= start < stop <= len(self), (start, stop, len(self))
        first = int(np.searchsorted(self._starts, start, "right")) - 1
        last = int(np.searchsorted(self._starts, stop, "left"))
        counts = np.diff(np.clip(self._starts[first : last + 1], start, stop))
        ranks = np.repeat(np.arange(first, last), counts)
        offsets = np.arange(start, stop) - self._starts[ranks]
        bases = self._store.offsets[self._documents[first:last]]
        sources, marks = offsets, None
        if self._fim is not None:
            sources, marks = self._rearranged(self._fim, first, last, counts, offsets)
        tokens = np.asarray(self._store.tokens[np.repeat(bases, counts) + sources], np.int32)
        if marks is not None:
            tokens = np.where(marks >= 0, marks, tokens)
        return tokens, ranks, offsets

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


class Rows:
    """The rows of a stream; a sequence of `Row`s of T + 1 + lookahead tokens."""

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
        tokens, ranks, offsets = self._stream.read(start, min(start + size, len(self._stream)))
        positions = np.arange(len(tokens), dtype=np.int32)
        segments = np.ones(len(tokens), np.int32)
        if self._packed:
            # a document that began before the row counts from the row's start
            positions = np.minimum(positions, offsets).astype(np.int32)
            segments = (ranks - ranks[0] + 1).astype(np.int32)
        missing = size - len(tokens)
        return Row(*(np.pad(x, (0, missing)) if missing else x for x in (tokens, segments, positions)))


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
