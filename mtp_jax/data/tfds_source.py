"""TFDS datasets, by name or by folder. Imports TFDS where one is opened: it is slow to import."""

import contextlib
import functools
import io
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from absl import logging

from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data.records import Dataset, Record, Records
from mtp_jax.errors import first_line

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder
    from tensorflow_datasets.core.features import FeatureConnector

_READ_AT_ONCE = 64  # records


class _Examples(Protocol):
    """A data source of TFDS."""

    def __len__(self) -> int: ...
    def __getitems__(self, indices: Sequence[int]) -> Sequence[dict[str, Any]]: ...


def tfds_records(settings: SourceConfig, tfds_dir: str, prefix: str = "data.") -> Dataset:
    """Opens the TFDS dataset named by `settings.source`, prepared first if it is not.

    Args:
      settings: source, split, records, text_field.
      tfds_dir: TFDS's data_dir; "" for its own default.
      prefix: of the settings in messages, as in "data.mixture[1].".

    Returns:
      The dataset. Its records hold all features: texts as strings (bytes where they are not UTF-8), numbers and
      sequences as numbers and lists, features of several parts as objects.

    Raises:
      UserError: a dataset that is unknown, cannot be prepared or has no random access; an unknown split; with
        records=text, a feature that is not text.
    """
    builder = _open_builder(settings, tfds_dir, prefix)
    if settings.records == "text":
        _check_text_feature(builder.info.features, settings, prefix)
    try:
        examples = builder.as_data_source(split=settings.split)
    except NotImplementedError as error:
        raise UserError(
            f"{prefix}source={settings.source}: prepared as {builder.info.file_format.value} in {builder.data_dir}; "
            f"prepare it again with `tfds build {settings.source} --file_format=array_record` and another data.tfds_dir"
        ) from error
    except Exception as error:
        splits = ", ".join(builder.info.splits)
        raise UserError(f"{prefix}split={settings.split}: not a split of {settings.source}; it has {splits}") from error
    info_file = builder.data_path / "dataset_info.json"
    key = [
        str(builder.data_dir),
        builder.info.full_name,
        settings.split,
        len(examples),
        info_file.read_text(),
        info_file.stat().mtime,
    ]
    return Dataset(key, functools.partial(_read, examples, f"{prefix}source={settings.source}"))


def _read(examples: _Examples, name: str) -> Records:
    for start in range(0, len(examples), _READ_AT_ONCE):
        batch = examples.__getitems__(list(range(start, min(start + _READ_AT_ONCE, len(examples)))))
        for number, example in enumerate(batch, start + 1):
            yield Record(f"{name} record {number}", _plain(example))


def _plain(value: Any) -> Any:
    """Returns a value of numpy arrays and bytes as objects, lists, strings and numbers."""
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if hasattr(value, "tolist"):  # an array or a scalar of numpy
        return _plain(value.tolist()) if value.dtype == object else value.tolist()
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, bytes):
        with contextlib.suppress(UnicodeDecodeError):
            return value.decode()
    return value


def _open_builder(settings: SourceConfig, tfds_dir: str, prefix: str) -> "DatasetBuilder":
    """Returns the prepared builder of the source."""
    import tensorflow_datasets as tfds

    name = f"{prefix}source={settings.source}"
    where = f" under data.tfds_dir={tfds_dir}" if tfds_dir else ""
    try:
        if os.path.isfile(os.path.join(settings.source, "dataset_info.json")):
            return tfds.builder_from_directory(settings.source)
        with _quiet():
            builder = tfds.builder(settings.source, data_dir=tfds_dir or None)
    except tfds.core.registered.DatasetNotFoundError as error:
        raise UserError(
            f"{name}: no such source, and TFDS has no builder and no prepared dataset of this name{where}; the "
            "built-in sources are python_source, text_files and synthetic, and hf:NAME is a Hugging Face dataset"
        ) from error
    except Exception as error:
        raise UserError(
            f"{name}: TFDS cannot open it{where} ({first_line(error)}); give the name or the folder of a TFDS dataset, "
            "hf:NAME, or one of python_source, text_files and synthetic"
        ) from error
    if builder.is_prepared():
        return builder
    try:
        with _quiet():
            builder.download_and_prepare(file_format="array_record")
    except Exception as error:
        raise UserError(
            f"{name}: not prepared in {builder.data_dir}, and preparing it failed ({first_line(error)}); run "
            f"`tfds build {settings.source} --file_format=array_record` where it can be downloaded"
        ) from error
    return builder


def _check_text_feature(features: "FeatureConnector", settings: SourceConfig, prefix: str) -> None:
    import tensorflow_datasets as tfds

    available = dict(features) if isinstance(features, tfds.features.FeaturesDict) else {}
    feature = available.get(settings.text_field)
    if feature is None and available:  # a name such as "a.b"
        feature = functools.reduce(_part, settings.text_field.split("."), features)
    if isinstance(feature, tfds.features.Text):
        return
    if isinstance(feature, tfds.features.Tensor) and feature.shape == () and feature.np_dtype in (object, str):
        return
    shown = ", ".join(f"{name} ({type(f).__name__})" for name, f in available.items()) or type(features).__name__
    problem = "is not text" if feature is not None else f"is not a feature of {settings.source}"
    raise UserError(f"{prefix}text_field={settings.text_field}: {problem}; the features are {shown}")


def _part(features: Any, name: str) -> Any:
    import tensorflow_datasets as tfds

    is_dict = isinstance(features, tfds.features.FeaturesDict)
    return features[name] if is_dict and name in features.keys() else None


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
