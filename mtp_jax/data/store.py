"""The token store: the ids of every document of a source, in memory-mapped files."""

import array
import contextlib
import functools
import json
import pathlib
from collections.abc import Iterable

import numpy as np
import tqdm

from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data.encoding import Encoded
from mtp_jax.data.records import BadRecord
from mtp_jax.data.tokenizer import Tokenizer

VERSION = 3  # of the files below; part of the cache key
_MAX_SHOWN = 3  # records that were skipped
_SILENT_SECONDS = 5.0  # before progress is shown


class TokenStore:
    """Documents 0..n-1 in source order, each [bos] + tokens + [eos] where the tokenizer has these.

    Attributes:
      tokens: uint16 or int32[N], the concatenated documents; a memory map.
      weights: float32[N], loss weight of each token, a memory map; None: 1.
      offsets: int64[n + 1]; document i is tokens[offsets[i]:offsets[i + 1]], never empty.
      hashes: uint64[n], of the text: equal documents have equal ones.
      num_bytes: int64[n], UTF-8 bytes of the text, before the tokenizer normalises it.
      has_bos, has_eos: whether each document is a text with an added bos, eos.
      skipped: messages of the first records that were skipped, of `num_skipped`.

    Raises:
      UserError: files that are damaged.
    """

    def __init__(self, directory: str | pathlib.Path):
        self.directory = pathlib.Path(directory)
        try:
            meta = json.loads((self.directory / "meta.json").read_text())
            self.has_bos: bool = meta["has_bos"]
            self.has_eos: bool = meta["has_eos"]
            self.num_skipped: int = meta["num_skipped"]
            self.skipped: list[str] = meta["skipped"]
            self.offsets = np.load(self.directory / "offsets.npy")
            self.hashes = np.load(self.directory / "hashes.npy")
            self.num_bytes = np.load(self.directory / "num_bytes.npy")
            shape = (int(self.offsets[-1]),)
            self.tokens = np.memmap(self.directory / "tokens.bin", np.dtype(meta["dtype"]), mode="r", shape=shape)
            self.weights: np.ndarray | None = None
            if meta["has_weights"]:
                self.weights = np.memmap(self.directory / "weights.bin", np.float32, mode="r", shape=shape)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"data.cache_dir: {self.directory} is damaged ({error}); remove that folder") from error

    def __len__(self) -> int:
        return len(self.hashes)

    def __reduce__(self) -> tuple[type["TokenStore"], tuple[pathlib.Path]]:
        return TokenStore, (self.directory,)  # worker processes map the same file; a pickled memmap is a copy

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """int64[n], tokens of each document with bos and eos."""
        return np.diff(self.offsets)

    def document(self, i: int) -> np.ndarray:
        """Returns document i, int32[length]."""
        return np.asarray(self.tokens[self.offsets[i] : self.offsets[i + 1]], np.int32)

    def ids(self, at: np.ndarray) -> np.ndarray:
        """Returns the tokens at some indices, int32."""
        return np.asarray(self.tokens[at], np.int32)

    def loss_weights(self, at: np.ndarray) -> np.ndarray | None:
        """Returns the weights at some indices, float32; None: 1."""
        return None if self.weights is None else np.asarray(self.weights[at])


def write(
    directory: pathlib.Path,
    documents: Iterable[Encoded | BadRecord],
    tokenizer: Tokenizer,
    settings: SourceConfig,
    name: str,
    prefix: str = "data.",
    size: int | None = None,
) -> None:
    """Writes encoded documents into `directory`.

    Args:
      directory: an empty folder.
      documents: the documents, and the records that cannot be used.
      tokenizer: that of the documents.
      settings: records, weights_field, loss_on, on_bad_record.
      name: name of the source, for messages.
      prefix: of the settings in messages.
      size: bytes of all texts, for the progress bar; None: unknown.

    Raises:
      BadRecord: the first record that cannot be used, with settings.on_bad_record="stop".
      UserError: no documents.
    """
    is_text = settings.records == "text"
    has_weights = settings.has_loss_weights
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32)
    offsets, hashes, num_bytes = array.array("q", [0]), array.array("Q"), array.array("q")
    skipped: list[str] = []
    num_skipped = 0
    progress = tqdm.tqdm(
        desc=f"{name}: tokenising", total=size, unit="B", unit_scale=True, delay=_SILENT_SECONDS, mininterval=1.0
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(progress)
        token_file = stack.enter_context(open(directory / "tokens.bin", "wb"))
        weight_file = stack.enter_context(open(directory / "weights.bin", "wb")) if has_weights else None
        for document in documents:
            if isinstance(document, BadRecord):
                if settings.on_bad_record == "stop":
                    remedy = f"{document.remedy}; or set {prefix}on_bad_record=skip"
                    raise BadRecord(document.origin, document.cause, remedy)
                num_skipped += 1
                skipped += [str(document).removeprefix(f"{prefix}files: ")] if num_skipped <= _MAX_SHOWN else []
                continue
            token_file.write(document.ids.astype(dtype).tobytes())
            if weight_file is not None:
                weights = np.ones(len(document.ids), np.float32) if document.weights is None else document.weights
                weight_file.write(weights.astype(np.float32).tobytes())
            offsets.append(offsets[-1] + len(document.ids))
            hashes.append(document.key)
            num_bytes.append(document.num_bytes)
            progress.update(document.num_bytes)
    if not hashes and num_skipped:
        raise UserError(f"{name}: none of its {num_skipped:,} records can be used: {skipped[0]}")
    if not hashes:
        raise UserError(f"{name}: holds no text; give documents that are not empty")
    np.save(directory / "offsets.npy", np.frombuffer(offsets, np.int64))
    np.save(directory / "hashes.npy", np.frombuffer(hashes, np.uint64))
    np.save(directory / "num_bytes.npy", np.frombuffer(num_bytes, np.int64))
    meta = {
        "has_bos": is_text and tokenizer.bos_id is not None,
        "has_eos": is_text and tokenizer.eos_id is not None,
        "has_weights": has_weights,
        "dtype": dtype.name,
        "source": name,
        "num_skipped": num_skipped,
        "skipped": skipped,
    }
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
