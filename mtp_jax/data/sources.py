"""Sources of documents: the standard library, files, a dataset of TFDS or Hugging Face, or synthetic texts."""

import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence

from mtp_jax import storage
from mtp_jax.config import DataConfig, UserError
from mtp_jax.data import cache, documents, files, formats, huggingface, synthetic, tfds_source
from mtp_jax.data.records import Records


@dataclasses.dataclass(frozen=True)
class Source:
    """Documents in a fixed order.

    Attributes:
      name: for messages.
      key: a hash of everything that the documents depend on.
      read: yields the text of each document.
    """

    name: str
    key: str
    read: Callable[[], Iterator[str]]


def open_source(data: DataConfig, seed: int) -> Source:
    """Returns the source named by `data.source`; cheap, since documents are generated or read by `read`.

    Args:
      data: source, files, text_field, split, tfds_dir, max_document_chars, synthetic_documents, cache_dir.
      seed: that of the run; used by synthetic documents only.

    Raises:
      UserError: files that do not exist, a dataset that is unknown or not prepared, a feature it does not have, a
        split of a source that has none.
    """
    if data.source in ("python_source", "text_files", "synthetic") and data.split != "train":
        raise UserError(
            f"data.split={data.split}: data.source={data.source} has no splits; leave it out (data.validation_fraction "
            "sets the share that is held out)"
        )
    if data.source == "python_source":
        return _python_source(data)
    if data.source == "text_files":
        return _text_files(data)
    if data.source == "synthetic":
        read = functools.partial(synthetic.synthetic_documents, data.synthetic_documents, seed)
        return Source("synthetic", cache.key_of("synthetic", 1, data.synthetic_documents, seed), read)
    return _dataset(data)


def _python_source(data: DataConfig) -> Source:
    paths = files.stdlib_files()
    key = cache.key_of("python_source", 1, sys.version, _stamps(paths, "python_source"))
    read = functools.partial(files.python_records, paths)
    return Source("python_source", key, functools.partial(_texts, data, read, "data.source=python_source"))


def _text_files(data: DataConfig) -> Source:
    paths = files.match_files(data.files)
    settings = (data.text_field, data.max_document_chars, data.records, data.on_bad_record)
    key = cache.key_of("text_files", 2, settings, _stamps([os.fspath(storage.path(p)) for p in paths], "data.files"))
    read = functools.partial(formats.read_files, paths, data)
    return Source(f"data.files={data.files}", key, functools.partial(_texts, data, read, "data.files"))


def _dataset(data: DataConfig) -> Source:
    """A dataset of TFDS or Hugging Face."""
    if data.source.startswith(huggingface.SCHEME):
        opened = huggingface.hf_records(data)
    else:
        opened = tfds_source.tfds_records(data, data.tfds_dir)
    key = cache.key_of("dataset", 2, data.source, data.text_field, data.records, data.on_bad_record, *opened.key)
    name = f"data.source={data.source}"
    return Source(name, key, functools.partial(_texts, data, opened.read, name))


def _texts(data: DataConfig, read: Callable[[], Records], where: str) -> Iterator[str]:
    """Yields the texts of a source."""
    for document in documents.accepted(documents.documents(read(), data), data.on_bad_record, where):
        if not isinstance(document, documents.Text):
            raise UserError(f"data.records={data.records}: the token store takes texts; set data.records=text")
        yield document.text


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
