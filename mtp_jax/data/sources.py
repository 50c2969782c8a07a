"""Sources of documents: the standard library, files, a dataset of TFDS or Hugging Face, or synthetic texts."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from mtp_jax import storage
from mtp_jax.config import DataConfig, SourceConfig, UserError
from mtp_jax.data import cache, files, formats, huggingface, synthetic, tfds_source
from mtp_jax.data.documents import Document, Text, documents
from mtp_jax.data.records import FIELDS, BadRecord, Dataset, Records

_WITHOUT_SPLITS = ("python_source", "text_files", "synthetic")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".parquet", ".arrow", ".feather")
_VERSION = 3  # of the documents that are read; part of every key


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order.

    Attributes:
      name: for messages: the setting that names the source, with its value.
      key: a hash of everything that the documents depend on.
      read: returns an iterator over the documents, and over the records that are none.
      size: bytes of the texts; None: unknown before they are read.
    """

    name: str
    key: str
    read: Callable[[], Iterator[Document | BadRecord]]
    size: int | None = None


def open_source(settings: SourceConfig, data: DataConfig, seed: int, prefix: str = "data.") -> Source:
    """Returns a source; cheap, since documents are generated or read by `read`.

    Args:
      settings: the source.
      data: tfds_dir.
      seed: that of the run; used by synthetic documents only.
      prefix: of the settings in messages, as in "data.mixture[1].".

    Raises:
      UserError: files that do not exist, a dataset that is unknown or not prepared, a feature it does not have, a
        split of a source that has none.
    """
    name = f"{prefix}source={settings.source}"
    if settings.source in _WITHOUT_SPLITS and settings.split != "train":
        raise UserError(
            f"{prefix}split={settings.split}: {name} has no splits; leave it out (data.validation_fraction sets the "
            "share that is held out)"
        )
    if settings.source == "synthetic":
        key = cache.key_of("synthetic", _VERSION, settings.synthetic_documents, seed)
        return Source(name, key, functools.partial(_synthetic, settings.synthetic_documents, seed))
    if settings.source == "python_source":
        paths = files.stdlib_files()
        stamps = _stamps(paths, name)
        opened = Dataset([sys.version, stamps], functools.partial(files.python_records, paths))
        return _source(name, name, opened, settings, prefix, _size(stamps))
    if settings.source == "text_files":
        paths, where = files.match_files(settings.files, prefix), f"{prefix}files"
        stamps = _stamps([os.fspath(storage.path(path)) for path in paths], where)
        opened = Dataset(stamps, functools.partial(formats.read_files, paths, settings, prefix))
        return _source(f"{where}={settings.files}", where, opened, settings, prefix, _size(stamps))
    if settings.source.startswith(huggingface.SCHEME):
        return _source(name, name, huggingface.hf_records(settings, prefix), settings, prefix)
    return _source(name, name, tfds_source.tfds_records(settings, data.tfds_dir, prefix), settings, prefix)


def _source(
    name: str, where: str, opened: Dataset, settings: SourceConfig, prefix: str, size: int | None = None
) -> Source:
    fields = [getattr(settings, field) for fields in FIELDS.values() for field in fields]
    form = [settings.records, settings.weights_field, settings.loss_on, settings.max_document_chars]
    key = cache.key_of(_VERSION, settings.source, form, settings.on_bad_record, fields, opened.key)
    return Source(name, key, lambda: documents(_located(opened.read(), where), settings, prefix), size)


def _located(records: Records, where: str) -> Records:
    """Yields the records with their setting in the origin: "data.files: PATH line 3"."""
    for record in records:
        if record.origin.startswith(where):
            yield record
        elif isinstance(record, BadRecord):
            yield BadRecord(f"{where}: {record.origin}", record.cause, record.remedy)
        else:
            yield record._replace(origin=f"{where}: {record.origin}")


def _synthetic(num_documents: int, seed: int) -> Iterator[Document]:
    for text in synthetic.synthetic_documents(num_documents, seed):
        yield Text(text)


def _size(stamps: Sequence[tuple[int | str, ...]]) -> int | None:
    """Returns the bytes of text in files; None if some are compressed."""
    total = 0
    for path, size, *_ in stamps:
        if not isinstance(size, int) or str(path).lower().endswith(_COMPRESSED):
            return None
        total += size
    return total


def _stamps(paths: Sequence[str], where: str) -> list[tuple[int | str, ...]]:
    """Returns (path, size, modification time or version) of each file, which differ for a changed file."""
    stamps: list[tuple[int | str, ...]] = []
    for path in paths:
        try:
            stamps.append((path, *storage.version(path)))
        except OSError as error:
            reason = storage.reason(error)
            raise UserError(
                f"{where}: {path}: cannot be read ({reason}); repair it, or remove it from the list"
            ) from error
    return stamps
