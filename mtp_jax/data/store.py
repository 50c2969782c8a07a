"""The token store: the ids of every document of a source, in memory-mapped files."""

import array
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator

import numpy as np
import tqdm

from mtp_jax.config import UserError
from mtp_jax.data.tokenizer import Tokenizer

VERSION = 1  # of the files below; part of the cache key
_BATCH_CHARS = 1 << 20  # text tokenised at one time
_SILENT_SECONDS = 5.0  # before progress is shown


class TokenStore:
    """Documents 0..n-1 in source order, each [bos] + tokens + [eos] where the tokenizer has these.

    Attributes:
      tokens: uint16 or int32[N], the concatenated documents; a memory map.
      offsets: int64[n + 1]; document i is tokens[offsets[i]:offsets[i + 1]], never empty.
      hashes: uint64[n], of the text: equal documents have equal ones.
      num_bytes: int64[n], UTF-8 bytes of the text, before the tokenizer normalises it.
      has_bos, has_eos: whether documents begin with bos and end with eos.

    Raises:
      UserError: files that are damaged.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        try:
            meta = json.loads((self.directory / "meta.json").read_text())
            self.has_bos: bool = meta["has_bos"]
            self.has_eos: bool = meta["has_eos"]
            self.offsets = np.load(self.directory / "offsets.npy")
            self.hashes = np.load(self.directory / "hashes.npy")
            self.num_bytes = np.load(self.directory / "num_bytes.npy")
            shape = (int(self.offsets[-1]),)
            self.tokens = np.memmap(self.directory / "tokens.bin", np.dtype(meta["dtype"]), mode="r", shape=shape)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"data.cache_dir: {self.directory} is damaged ({error}); remove that folder") from error

    def __len__(self) -> int:
        return len(self.hashes)

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[pathlib.Path]]:
        return TokenStore, (self.directory,)  # worker processes map the same file; a pickled memmap is a copy

    @property
    def lengths(self) -> np.ndarray:
        """int64[n], tokens of each document with bos and eos."""
        return np.diff(self.offsets)

    def document(self, i: int) -> np.ndarray:
        """Returns document i, int32[length]."""
        return np.asarray(self.tokens[self.offsets[i] : self.offsets[i + 1]], np.int32)


def write(directory: pathlib.Path, texts: Iterable[str], tokenizer: Tokenizer, name: str) -> None:
    """Tokenises all documents into `directory`.

    Args:
      directory: an empty folder.
      texts: the documents.
      tokenizer: provides ids, and bos and eos around each document if it has them.
      name: name of the source, for messages.

    Raises:
      UserError: no documents.
    """
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    bos = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    eos = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    offsets, hashes, num_bytes = array.array("q", [0]), array.array("Q"), array.array("q")
    watched = tqdm.tqdm(texts, f"{name}: tokenising", unit=" documents", delay=_SILENT_SECONDS, mininterval=1.0)
    with open(directory / "tokens.bin", "wb") as file:
        for batch in _batches(watched):
            for text, ids in zip(batch, tokenizer.encode_batch(batch), strict=True):
                if not len(ids):  # a tokenizer that strips may leave nothing
                    continue
                encoded = text.encode()
                file.write(np.concatenate([bos, ids, eos]).astype(dtype).tobytes())
                offsets.append(offsets[-1] + len(bos) + len(ids) + len(eos))
                hashes.append(int.from_bytes(hashlib.blake2b(encoded, digest_size=8).digest(), "little"))
                num_bytes.append(len(encoded))
    if not hashes:
        raise UserError(f"{name}: holds no text; give documents that are not empty")
    np.save(directory / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(directory / "hashes.npy", np.frombuffer(hashes, np.uint64))
    np.save(directory / "num_bytes.npy", np.frombuffer(num_bytes, np.int64))
    meta = {"has_bos": bool(bos), "has_eos": bool(eos), "dtype": dtype.name, "source": name}
    (directory / "meta.json").write_text(json.dumps(meta))


def split_documents(hashes: np.ndarray, validation_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Splits documents into training and validation by a hash of the text, so equal documents are in the same split.

    Where there are too few documents for both splits, an empty split gets the document with the nearest hash; if all
    are equal, all train.

    Args:
      hashes: uint64[n].
      validation_fraction: expected share of the documents; 0 and 1 leave one split empty.

    Returns:
      int64 indices of the training and of the validation documents, in source order.
    """
    is_validation = hashes < validation_fraction * 2.0**64
    if 0 < validation_fraction < 1:
        if is_validation.all():
            is_validation = hashes != hashes.max()
        elif not is_validation.any() and hashes.min() != hashes.max():
            is_validation = hashes == hashes.min()
    return np.flatnonzero(~is_validation), np.flatnonzero(is_validation)


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
