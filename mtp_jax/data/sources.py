"""Sources of documents: the standard library, files, a TFDS dataset, or synthetic texts."""

import contextlib
import dataclasses
import functools
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from absl import logging

from mtp_jax import storage
from mtp_jax.config import DataConfig, UserError
from mtp_jax.data import cache, documents
from mtp_jax.errors import first_line

if TYPE_CHECKING:  # slow to import, and not needed once the tokens are in the cache
    from tensorflow_datasets.core import DatasetBuilder
    from tensorflow_datasets.core.features import FeatureConnector

_READ_AT_ONCE = 64  # records


class Records(Protocol):
    """A data source of TFDS."""

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, object]]: ...


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
        read = functools.partial(documents.synthetic_documents, data.synthetic_documents, seed)
        return Source("synthetic", cache.key_of("synthetic", 1, data.synthetic_documents, seed), read)
    return _tfds_dataset(data)


def _python_source(data: DataConfig) -> Source:
    paths = documents.stdlib_files()
    key = cache.key_of("python_source", 1, sys.version, _stamps(paths, "python_source"))
    read = functools.partial(documents.python_documents, paths)
    return Source("python_source", key, functools.partial(_read_own, data, key, read))


def _text_files(data: DataConfig) -> Source:
    paths = documents.match_files(data.files)
    settings = (data.text_field, data.max_document_chars)
    key = cache.key_of("text_files", 1, settings, _stamps([os.fspath(storage.path(p)) for p in paths], "data.files"))
    read = functools.partial(documents.text_documents, paths, *settings)
    return Source(f"data.files={data.files}", key, functools.partial(_read_own, data, key, read))


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


def _read_own(data: DataConfig, key: str, read: Callable[[], Iterator[tuple[str, str]]]) -> Iterator[str]:
    """Yields texts of files through a TFDS dataset, prepared in the cache first if it is not there."""
    import tensorflow_datasets as tfds

    source = f"data.files={data.files}" if data.source == "text_files" else f"data.source={data.source}"

    def prepare(folder: pathlib.Path) -> None:
        from mtp_jax.data import builders

        with _quiet():
            builders.Documents(source, read, data_dir=folder, file_format="array_record").download_and_prepare()

    folder = cache.entry(cache.root(data) / "sources", key, prepare)
    # The builder that is opened depends on the files alone, not on the code that wrote them
    (directory,) = [path.parent for path in folder.rglob("dataset_info.json")]
    yield from _texts(tfds.builder_from_directory(directory).as_data_source(split="train"), "text", data.source)


def _tfds_dataset(data: DataConfig) -> Source:
    """A TFDS dataset by name, or by the folder it was prepared in."""
    builder = _open_builder(data)
    _check_text_feature(builder.info.features, data)
    try:
        records = builder.as_data_source(split=data.split)
    except NotImplementedError as error:
        raise UserError(
            f"data.source={data.source}: prepared as {builder.info.file_format.value} in {builder.data_dir}; prepare "
            f"it again with `tfds build {data.source} --file_format=array_record` and another data.tfds_dir"
        ) from error
    except Exception as error:
        splits = ", ".join(builder.info.splits)
        raise UserError(f"data.split={data.split}: not a split of {data.source}; it has {splits}") from error
    info_file = builder.data_path / "dataset_info.json"
    key = cache.key_of(
        "tfds",
        1,
        str(builder.data_dir),
        builder.info.full_name,
        data.split,
        data.text_field,
        len(records),
        info_file.read_text(),
        info_file.stat().mtime,
    )
    name = f"data.source={data.source}"
    return Source(name, key, lambda: _texts(records, data.text_field, name))


def _open_builder(data: DataConfig) -> "DatasetBuilder":
    """Returns the prepared builder of data.source."""
    import tensorflow_datasets as tfds

    where = f" under data.tfds_dir={data.tfds_dir}" if data.tfds_dir else ""
    try:
        if os.path.isfile(os.path.join(data.source, "dataset_info.json")):
            return tfds.builder_from_directory(data.source)
        with _quiet():
            builder = tfds.builder(data.source, data_dir=data.tfds_dir or None)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"data.source={data.source}: no such source, and TFDS has no builder and no prepared dataset of this "
            f"name{where}; the built-in sources are python_source, text_files and synthetic"
        ) from error
    except Exception as error:
        raise UserError(
            f"data.source={data.source}: TFDS cannot open it{where} ({first_line(error)}); give the name or the folder "
            "of a TFDS dataset, or one of python_source, text_files and synthetic"
        ) from error
    if builder.is_prepared():
        return builder
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise UserError(
            f"data.source={data.source}: not prepared in {builder.data_dir}, and preparing it failed "
            f"({first_line(error)}); run `tfds build {data.source} --file_format=array_record` where it can be "
            "downloaded"
        ) from error
    return builder


def _check_text_feature(features: "FeatureConnector", data: DataConfig) -> None:
    import tensorflow_datasets as tfds

    available = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    feature = available.get(data.text_field)
    if isinstance(feature, tfds.features.Text):
        return
    if isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype in (object, str):
        return
    shown = ", ".join(f"{name} ({type(f).__name__})" for name, f in available.items()) or type(features).__name__
    problem = "is not text" if feature is not None else f"is not a feature of {data.source}"
    raise UserError(f"data.text_field={data.text_field}: {problem}; the features are {shown}")


def _texts(records: Records, field: str, name: str) -> Iterator[str]:
    """Yields the text of each record that has one."""
    for start in range(0, len(records), _READ_AT_ONCE):
        batch = records.__getitems__(list(range(start, min(start + _READ_AT_ONCE, len(records)))))
        for i, record in enumerate(batch, start):
            value = record[field]
            try:
                text = value.decode() if isinstance(value, bytes) else str(value)
            except UnicodeDecodeError as error:
                raise UserError(f"{name}: record {i}: feature {field!r} is not UTF-8 ({error.reason})") from error
            if text:
                yield text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses TFDS's progress bars and notices, which would hide the run's own output."""
    import tensorflow_datasets as tfds

    tfds.disable_progress_bar()
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
