"""The corpus of a config: the tokenizer, the token store, the two splits and their batches."""

import dataclasses
import functools
import hashlib
import math
import os
import sys
from typing import Any, Literal

import numpy as np

from mtp_jax.config import MAX_DEPTH, Config, UserError, check_bounds
from mtp_jax.data import cache, sources, store
from mtp_jax.data import tokenizer as tokenizers
from mtp_jax.data.packing import FIM, Row, Rows, Stream, shuffled
from mtp_jax.data.pipeline import Batches, num_batches_held
from mtp_jax.data.store import TokenStore
from mtp_jax.data.tokenizer import Tokenizer

MAX_WORKERS_PER_CPU = 4

Split = Literal["train", "validation"]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The prepared data of a config.

    Attributes:
      config: the run.
      tokenizer: that of data.tokenizer.
      store: the tokens of all documents.
      train, validation: int64, the documents of each split in source order. Validation is empty if
        data.validation_fraction is 0.
      lookahead: tokens of a row beyond its positions and the next token.
    """

    config: Config
    tokenizer: Tokenizer
    store: TokenStore
    train: np.ndarray
    validation: np.ndarray
    lookahead: int = 0

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the documents and their ids: equal on every process of a run, and before and after a resume."""
        parts = [self.tokenizer.fingerprint.encode(), self.store.hashes.tobytes(), self.store.offsets.tobytes()]
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON values that tell this corpus from another: a hash of the documents' text and one of the tokenizer, and,
        for messages, the number and size of the documents and their origin.
        """
        python = f" of Python {sys.version.split()[0]}" if self.config.data.source == "python_source" else ""
        return {
            "documents": hashlib.blake2b(self.store.hashes.tobytes(), digest_size=16).hexdigest(),
            "tokenizer": self.tokenizer.fingerprint,
            "num_documents": len(self.store),
            "num_bytes": int(self.store.num_bytes.sum()),
            "origin": f"{self.config.data.source}{python}",
        }

    def num_tokens(self, split: Split) -> int:
        """Returns the number of tokens of the split as stored: bos and eos count, FIM marks do not."""
        return int(self.store.lengths[self._documents(split)].sum())

    def rows(self, split: Split) -> Rows:
        """Returns the rows of one epoch; those of validation are in source order, without FIM, for every seed."""
        config, documents = self.config, self._documents(split)
        fim = None
        if split == "train":
            if config.data.shuffle:
                documents = shuffled(documents, config.seed)
            if config.data.fim_rate and self.tokenizer.fim_ids is not None:
                fim = FIM(config.data.fim_rate, self.tokenizer.fim_ids, config.seed)
        stream = Stream(self.store, documents, fim)
        return Rows(stream, config.data.sequence_length, self.lookahead, packed=config.data.packing == "packed")

    def batches(self, split: Split, start_step: int = 0, row_slice: tuple[int, int] | None = None) -> Batches:
        """Returns the batches of a split: endless and shuffled for training, one epoch in order for validation.

        Args:
          split: "train" or "validation".
          start_step: the step at which iteration begins; `Batches.batch_at` takes any step.
          row_slice: (low, high), the rows of each global batch that this process reads; None: all.

        Raises:
          UserError: a split without documents or rows, or a validation split with fewer rows than a batch.
        """
        rows = self.rows(split)
        if not len(self._documents(split)):
            fraction = f"data.validation_fraction={self.config.data.validation_fraction}"
            raise UserError(f"{fraction}: leaves no {split} documents; use one between 0 and 1")
        if len(rows) < (1 if split == "train" else self.config.data.batch_size):
            raise _too_few(self, split, len(rows))
        shuffles = split == "train" and self.config.data.shuffle
        return Batches(
            rows,
            self.config.data.batch_size,
            shuffle_seed=self.config.seed if shuffles else None,
            endless=split == "train",
            start_step=start_step,
            row_slice=row_slice,
            num_workers=self.config.data.num_workers,
            prefetch=self.config.data.prefetch,
        )

    def _documents(self, split: Split) -> np.ndarray:
        return {"train": self.train, "validation": self.validation}[split]


def prepare(config: Config, lookahead: int = 0, num_processes: int = 1) -> Corpus:
    """Tokenises the source of a config, or finds it in the cache, and checks that both splits have rows.

    Args:
      config: the run.
      lookahead: tokens of a row beyond its positions and the next token (`Kind.lookahead`).
      num_processes: number of processes among which the rows of a batch are divided.

    Raises:
      UserError: a tokenizer or source that cannot be used, FIM without FIM tokens, a split with too few tokens, batches
        that exceed this machine's memory, more workers than its CPUs can run.
    """
    data = config.data
    check_bounds(config)  # of data prepared without a model, which `validate` has not checked
    _check_machine(config, lookahead, num_processes)
    tokenizer = tokenizers.load(data.tokenizer)
    if data.fim_rate and tokenizer.fim_ids is None:
        raise UserError(
            f"data.fim_rate={data.fim_rate}: data.tokenizer={data.tokenizer} has no FIM tokens; "
            "use a tokenizer that has, or data.fim_rate=0"
        )
    source = sources.open_source(data, config.seed)
    folder = cache.entry(
        cache.root(data) / "tokens",
        cache.key_of(store.VERSION, source.key, tokenizer.fingerprint),
        lambda temporary: store.write(temporary, source.read(), tokenizer, source.name),
    )
    tokens = TokenStore(folder)
    train, validation = store.split_documents(tokens.hashes, data.validation_fraction)
    corpus = Corpus(config, tokenizer, tokens, train, validation, lookahead)
    corpus.batches("train")
    if data.validation_fraction:
        _check_validation(corpus)
        corpus.batches("validation")
    return corpus


def _check_machine(config: Config, lookahead: int, num_processes: int) -> None:
    """Rejects what exceeds this machine's memory or CPUs, before anything is allocated or started."""
    data, num_cpus = config.data, os.cpu_count() or 1
    if data.num_workers > MAX_WORKERS_PER_CPU * num_cpus:
        raise UserError(
            f"data.num_workers={data.num_workers}: too many for the {num_cpus} CPUs of this machine; use at most "
            f"{MAX_WORKERS_PER_CPU * num_cpus}"
        )
    rows = -(-data.batch_size // num_processes)
    batch = rows * (data.sequence_length + 1 + lookahead) * len(Row._fields) * np.dtype(np.int32).itemsize
    needed = batch * num_batches_held(data.prefetch, data.num_workers)
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > available:
        raise UserError(
            f"data.batch_size={data.batch_size}: with data.sequence_length={data.sequence_length} and "
            f"data.prefetch={data.prefetch}, the batches read ahead take {needed / 2**30:,.1f} GiB and this machine "
            f"has {available / 2**30:,.1f} GiB; lower one of them"
        )


def _check_validation(corpus: Corpus) -> None:
    if not len(corpus.validation):
        number = len(corpus.store)
        documents = "only one document" if number == 1 else f"{number} documents, all the same"
        raise UserError(
            f"data.validation_fraction={corpus.config.data.validation_fraction}: the corpus has {documents}; "
            f"{_smaller_documents(corpus)}use data.validation_fraction=0"
        )


def _too_few(corpus: Corpus, split: Split, num_rows: int) -> UserError:
    """Returns the error for a split that cannot fill its batches, with a remedy that works."""
    data = corpus.config.data
    problem = (
        f"data.source={data.source}: its {split} split has {corpus.num_tokens(split):,} tokens, {num_rows} rows of "
        f"data.sequence_length={data.sequence_length}"
    )
    if split == "train":
        return UserError(f"{problem}; use a shorter sequence_length or more text")
    problem += f", fewer than the data.batch_size={data.batch_size} of one batch"
    fraction = _enough_fraction(corpus)
    if fraction is not None:
        return UserError(f"{problem}; use data.validation_fraction={fraction}, smaller batches or shorter rows")
    remedy = f"{_smaller_documents(corpus)}use smaller batches, shorter rows or data.validation_fraction=0"
    return UserError(f"{problem}; {remedy}")


def _enough_fraction(corpus: Corpus) -> float | None:
    """Returns the least fraction, at most a half, whose documents fill one validation batch, to three digits."""
    data = corpus.config.data
    needed = data.batch_size * data.sequence_length + 1 + MAX_DEPTH
    order = np.argsort(corpus.store.hashes)
    filled = np.cumsum(corpus.store.lengths[order]) >= needed
    if not filled.any():
        return None
    last = corpus.store.hashes[order][int(np.argmax(filled))]
    fraction = (math.floor(float(last) / 2.0**64 * 1000) + 1) / 1000
    return fraction if fraction <= 0.5 else None


def _smaller_documents(corpus: Corpus) -> str:
    if corpus.config.data.source != "text_files":
        return ""
    size = max(1, int(corpus.store.num_bytes.sum()) // 50)
    return f"set data.max_document_chars={size} to split the files into more documents, or "
