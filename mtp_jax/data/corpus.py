"""The corpus of a config: the tokenizer, the sources, their splits and their batches."""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from mtp_jax.config import MAX_DEPTH, Config, SourceConfig, UserError, ValidationConfig, check_bounds, check_data
from mtp_jax.data import cache, sources, store
from mtp_jax.data import tokenizer as tokenizers
from mtp_jax.data.chat import ChatTemplate
from mtp_jax.data.encoding import Encoder
from mtp_jax.data.mixture import Mixture
from mtp_jax.data.packing import FIM, Row, Rows, Stream, StreamRows, WholeRows, shuffled
from mtp_jax.data.pipeline import Batches, num_batches_held
from mtp_jax.data.store import TokenStore
from mtp_jax.data.tokenizer import Tokenizer
from mtp_jax.errors import one_line, warn_once

MAX_WORKERS_PER_CPU = 4

Split = str  # "train", or a name of `Corpus.validation_sets`
HELD_OUT = "validation"  # the validation set of the held-out documents of the one source


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """The prepared documents of one source.

    Attributes:
      name: that of the source in the mixture, or of the validation set; "" for the one source of a run.
      settings: the source.
      key: dotted key of the settings, for messages.
      store: the tokens of all documents.
      train, validation: int64, the documents of each split in source order.
    """

    name: str
    settings: SourceConfig
    key: str
    store: TokenStore
    train: np.ndarray
    validation: np.ndarray

    @property
    def origin(self) -> str:
        """The source, for messages: "data.source=text_files"."""
        return f"{self.key}source={self.settings.source}"

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON values that tell these documents from others: see `Corpus.identity`."""
        python = f" of Python {sys.version.split()[0]}" if self.settings.source == "python_source" else ""
        return {
            "documents": hashlib.blake2b(self.store.hashes.tobytes(), digest_size=16).hexdigest(),
            "num_documents": len(self.store),
            "num_bytes": int(self.store.num_bytes.sum()),
            "origin": f"{self.settings.source}{python}",
        }


@dataclasses.dataclass(frozen=True, eq=False)
class Corpus:
    """The prepared data of a config.

    Attributes:
      config: the run.
      tokenizer: that of data.tokenizer.
      sources: the source of the training documents, or those of the mixture.
      validation_parts: the sets of data.validation.
      lookahead: tokens of a row beyond its positions and the next token.
    """

    config: Config
    tokenizer: Tokenizer
    sources: tuple[Part, ...]
    validation_parts: tuple[Part, ...] = ()
    lookahead: int = 0
    _rows: dict[tuple[Split, int], Rows] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the documents and their ids: equal on every process of a run, and before and after a resume."""
        parts = [self.tokenizer.fingerprint.encode()]
        for part in (*self.sources, *self.validation_parts):
            parts += [part.store.hashes.tobytes(), part.store.offsets.tobytes()]
        return hashlib.blake2b(b"".join(parts), digest_size=16).hexdigest()

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """JSON values that tell the training documents from others: a hash of the documents' text and one of the
        tokenizer, and, for messages, the number and size of the documents and their origin. The documents of a mixture
        are under "sources", by name.
        """
        if not self.config.data.mixture:
            return {**self.sources[0].identity, "tokenizer": self.tokenizer.fingerprint}
        sources = {part.name: part.identity for part in self.sources}
        return {"sources": sources, "tokenizer": self.tokenizer.fingerprint}

    @property
    def validation_sets(self) -> dict[str, Part]:
        """The sets by name: those of data.validation, and the held-out documents of each source.

        The set of the one source of a run is "validation".
        """
        held_out = (
            {part.name or HELD_OUT: part for part in self.sources} if self.config.data.validation_fraction else {}
        )
        return held_out | {part.name: part for part in self.validation_parts}

    def num_tokens(self, split: Split) -> int:
        """Returns the number of tokens of the split as stored: bos and eos count, FIM marks do not."""
        parts = self.sources if split == "train" else [self.validation_sets[split]]
        return sum(int(part.store.lengths[_documents(part, split)].sum()) for part in parts)

    @functools.cached_property
    def mixture(self) -> Mixture:
        """The order in which rows are drawn from the sources."""
        limits = [
            getattr(part.settings, "max_epochs", 0) * len(self.rows("train", i)) for i, part in enumerate(self.sources)
        ]
        weights = [getattr(part.settings, "weight", 1.0) for part in self.sources]
        return Mixture(weights, [limit or None for limit in limits])

    def drawn(self, num_steps: int) -> dict[str, tuple[float, float]]:
        """Returns, for each source of a mixture, its share of the rows of the first steps, and its epochs so far."""
        num_rows = num_steps * self.config.data.batch_size
        return {
            self.sources[i].name: (count / max(1, num_rows), count / len(self.rows("train", i)))
            for i, count in enumerate(self.mixture.counts(num_rows))
        }

    def rows(self, split: Split, source: int = 0) -> Rows:
        """Returns the rows of one epoch: of a source of the training documents, or of a validation set, in source order
        and without FIM for every seed."""
        key = (split, source)
        if key not in self._rows:
            part = self.sources[source] if split == "train" else self.validation_sets[split]
            self._rows[key] = self._make_rows(part, split == "train")
        return self._rows[key]

    def _make_rows(self, part: Part, is_train: bool) -> Rows:
        data, documents, fim = self.config.data, part.train if is_train else part.validation, None
        if is_train and data.shuffle:
            documents = shuffled(documents, self.config.seed)
        if is_train and data.fim_rate and self.tokenizer.fim_ids is not None:
            fim = FIM(data.fim_rate, self.tokenizer.fim_ids, self.config.seed)
        if part.settings.packing == "whole":
            return WholeRows(part.store, documents, data.sequence_length, self.lookahead)
        stream = Stream(part.store, documents, fim)
        return StreamRows(stream, data.sequence_length, self.lookahead, packed=part.settings.packing == "packed")

    def batches(self, split: Split, start_step: int = 0, row_slice: tuple[int, int] | None = None) -> Batches:
        """Returns the batches of a split: endless and shuffled for training, one epoch in order for validation.

        Args:
          split: "train" or a name of `validation_sets`.
          start_step: the step at which iteration begins; `Batches.batch_at` takes any step.
          row_slice: (low, high), the rows of each global batch that this process reads; None: all.

        Raises:
          UserError: a split without documents or rows, or a validation split with fewer rows than a batch.
        """
        data, is_train = self.config.data, split == "train"
        if not is_train and split not in self.validation_sets:
            fraction = f"data.validation_fraction={data.validation_fraction}"
            raise UserError(f"{fraction}: leaves no {split} documents; use one between 0 and 1")
        parts = self.sources if is_train else (self.validation_sets[split],)
        rows = [self.rows(split, i) for i in range(len(parts))]
        for part, found in zip(parts, rows, strict=True):
            if not len(_documents(part, split)):
                fraction = f"data.validation_fraction={data.validation_fraction}"
                raise UserError(f"{fraction}: leaves no {split} documents of {part.origin}; use one between 0 and 1")
            if len(found) < (1 if is_train else data.batch_size):
                raise _too_few(self, part, split, len(found))
        return Batches(
            rows,
            data.batch_size,
            mixture=self.mixture if is_train else None,
            shuffle_seed=self.config.seed if is_train and data.shuffle else None,
            endless=is_train,
            start_step=start_step,
            row_slice=row_slice,
            num_workers=data.num_workers,
            prefetch=data.prefetch,
        )

    def held_out_documents(self) -> Iterator[np.ndarray]:
        """Yields the documents of all validation sets, int32[n] each."""
        for name, part in self.validation_sets.items():
            for i in _documents(part, name):
                yield part.store.document(int(i))


def _documents(part: Part, split: Split) -> np.ndarray:
    return part.train if split == "train" else part.validation


def prepare(config: Config, lookahead: int = 0, num_processes: int = 1) -> Corpus:
    """Tokenises the sources of a config, or finds them in the cache, and checks that every split has rows.

    Args:
      config: the run.
      lookahead: tokens of a row beyond its positions and the next token (`Kind.lookahead`).
      num_processes: number of processes among which the rows of a batch are divided.

    Raises:
      UserError: a tokenizer or source that cannot be used, FIM without FIM tokens, a split with too few tokens or
        without a loss, batches that exceed this machine's memory, more workers than its CPUs can run, a mixture that
        ends before the run.
    """
    data = config.data
    check_bounds(config)  # of data prepared without a model, which `validate` has not checked
    check_data(data)
    _check_machine(config, lookahead, num_processes)
    tokenizer = tokenizers.load(data.tokenizer)
    if data.fim_rate and tokenizer.fim_ids is None:
        raise UserError(
            f"data.fim_rate={data.fim_rate}: data.tokenizer={data.tokenizer} has no FIM tokens; "
            "use a tokenizer that has, or data.fim_rate=0"
        )
    if data.mixture:
        sources = [_part(config, tokenizer, s, s.name, f"data.mixture[{i}].") for i, s in enumerate(data.mixture)]
    else:
        sources = [_part(config, tokenizer, data, "", "data.")]
    validation = [_part(config, tokenizer, s, s.name, f"data.validation[{i}].") for i, s in enumerate(data.validation)]
    corpus = Corpus(config, tokenizer, tuple(sources), tuple(validation), lookahead)
    corpus.batches("train")
    for i, part in enumerate(sources):
        _check_rows(part, corpus.rows("train", i), "training", data.sequence_length)
    for name, part in corpus.validation_sets.items():
        if part in sources:
            _check_held_out(corpus, part)
        corpus.batches(name)
        _check_rows(part, corpus.rows(name), "validation", data.sequence_length)
    _check_mixture(corpus)
    return corpus


def tokenise(config: Config) -> TokenStore:
    """Returns the tokens of all documents of the one source of a config, from the cache if they are there.

    Raises:
      UserError: a tokenizer or source that cannot be used.
    """
    check_bounds(config)
    check_data(config.data)
    return _part(config, tokenizers.load(config.data.tokenizer), config.data, "", "data.").store


def _part(config: Config, tokenizer: Tokenizer, settings: SourceConfig, name: str, key: str) -> Part:
    """Returns the documents of a source, all of them for validation if it is a validation set."""
    data = config.data
    source = sources.open_source(settings, data, config.seed, key)
    template = None
    if settings.records == "chat":
        template = ChatTemplate.load(data.tokenizer, data.chat_template)
    elif settings.records == "prompt":
        with contextlib.suppress(UserError):  # two texts need none; lists of messages without one are bad records
            template = ChatTemplate.load(data.tokenizer, data.chat_template)
    encoder = Encoder(data.tokenizer, None if template is None else data.chat_template, settings.loss_on)
    folder = cache.entry(
        cache.root(data) / "tokens",
        cache.key_of(store.VERSION, source.key, tokenizer.fingerprint, template.fingerprint if template else ""),
        lambda temporary: store.write(
            temporary, encoder.encode(source.read()), tokenizer, settings, source.name, key, source.size
        ),
    )
    tokens = TokenStore(folder)
    if tokens.num_skipped:
        number = f"{tokens.num_skipped:,} of {tokens.num_skipped + len(tokens):,} records skipped"
        warn_once(f"{source.name}: {number}: {one_line(UserError('; '.join(tokens.skipped)))}")
    if isinstance(settings, ValidationConfig):
        return Part(name, settings, key, tokens, np.zeros(0, np.int64), np.arange(len(tokens)))
    train, validation = store.split_documents(tokens.hashes, data.validation_fraction)
    return Part(name, settings, key, tokens, train, validation)


def _check_mixture(corpus: Corpus) -> None:
    """Rejects a mixture whose sources have all reached max_epochs before the last step."""
    config, num_rows = corpus.config, corpus.mixture.num_rows
    if num_rows is None or num_rows >= config.training.num_steps * config.data.batch_size:
        return
    raise UserError(
        f"training.num_steps={config.training.num_steps}: all sources of data.mixture have reached their max_epochs "
        f"after {num_rows // config.data.batch_size} steps; train fewer, or raise max_epochs of a source (0: no limit)"
    )


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


def _check_rows(part: Part, rows: Rows, split: str, sequence_length: int) -> None:
    """Notes how many documents do not fit in a row, and rejects rows of which no token has a loss."""
    truncated = rows.num_truncated if isinstance(rows, WholeRows) else 0
    beyond = f"longer than a row of data.sequence_length={sequence_length}"
    if truncated:
        warn_once(f"{part.origin}: {truncated:,} of its {split} documents are {beyond} and are truncated")
    if rows.has_weights and not any(np.any(rows[i].loss_mask[1:]) for i in range(len(rows))):  # type: ignore[index]
        remedy = f"its documents are {beyond}; use longer rows" if truncated else "give some tokens a weight above 0"
        raise UserError(f"{part.origin}: no token of its {split} rows has a loss; {remedy}")


def _check_held_out(corpus: Corpus, part: Part) -> None:
    if not len(part.validation):
        number = len(part.store)
        documents = "only one document" if number == 1 else f"{number} documents, all the same"
        raise UserError(
            f"data.validation_fraction={corpus.config.data.validation_fraction}: {part.origin} has {documents}; "
            f"{_smaller_documents(part)}use data.validation_fraction=0"
        )


def _too_few(corpus: Corpus, part: Part, split: Split, num_rows: int) -> UserError:
    """Returns the error for a split that cannot fill its batches, with a remedy that works."""
    data = corpus.config.data
    num_tokens = int(part.store.lengths[_documents(part, split)].sum())
    problem = (
        f"{part.origin}: its {'train' if split == 'train' else 'validation'} split has {num_tokens:,} tokens, "
        f"{num_rows} rows of data.sequence_length={data.sequence_length}"
    )
    if split == "train":
        return UserError(f"{problem}; use a shorter sequence_length or more text")
    problem += f", fewer than the data.batch_size={data.batch_size} of one batch"
    if part in corpus.validation_parts:
        return UserError(f"{problem}; use smaller batches, shorter rows or more text")
    fraction = _enough_fraction(corpus, part)
    if fraction is not None:
        return UserError(f"{problem}; use data.validation_fraction={fraction}, smaller batches or shorter rows")
    remedy = f"{_smaller_documents(part)}use smaller batches, shorter rows or data.validation_fraction=0"
    return UserError(f"{problem}; {remedy}")


def _enough_fraction(corpus: Corpus, part: Part) -> float | None:
    """Returns the least fraction, at most a half, whose documents fill one validation batch, to three digits."""
    data, tokens = corpus.config.data, part.store
    needed, longest = data.batch_size * data.sequence_length + 1 + MAX_DEPTH, None
    if part.settings.packing == "whole":  # one token more than fewer rows can hold
        longest = data.sequence_length + 1
        needed = (data.batch_size - 1) * longest + 1
    order = np.argsort(tokens.hashes)
    filled = np.cumsum(np.clip(tokens.lengths[order], None, longest)) >= needed
    if not filled.any():
        return None
    last = tokens.hashes[order][int(np.argmax(filled))]
    fraction = (math.floor(float(last) / 2.0**64 * 1000) + 1) / 1000
    return fraction if fraction <= 0.5 else None


def _smaller_documents(part: Part) -> str:
    if part.settings.source != "text_files" or part.settings.records != "text":
        return ""
    size = max(1, int(part.store.num_bytes.sum()) // 50)
    return f"set {part.key}max_document_chars={size} to split the files into more documents, or "
