"""Hugging Face datasets, by name or by folder: `data.source=hf:NAME` or `hf:FOLDER`, through the package `datasets`."""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from mtp_jax.config import SourceConfig, UserError
from mtp_jax.data.formats import columns
from mtp_jax.data.records import Dataset, Record, Records, needed_columns

if TYPE_CHECKING:
    import datasets

SCHEME = "hf:"
_SAVED = ("dataset_dict.json", "state.json")  # files of `save_to_disk`


def hf_records(settings: SourceConfig, prefix: str = "data.") -> Dataset:
    """Opens the Hugging Face dataset named by `settings.source`.

    A dataset of the Hub and a folder of data files are streamed; a folder made by `save_to_disk` is mapped into memory.

    Args:
      settings: source, split, subset, and the names of the fields, which decide the columns to read.
      prefix: of the settings in messages, as in "data.mixture[1].".

    Returns:
      The dataset. Its key has the fingerprint of a saved dataset, else the revision or the times of the data files.

    Raises:
      UserError: the package is not installed; a dataset, subset or split that is unknown; no network. `read` raises it
        where the dataset cannot be read to its end.
    """
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f"{prefix}source={settings.source}: hf: needs a package: pip install datasets")
    name = os.path.expanduser(settings.source.removeprefix(SCHEME))
    if not name:
        raise UserError(f"{prefix}source={settings.source}: names no dataset; write hf:OWNER/NAME or hf:FOLDER")
    if name.startswith(("/", ".")) and not os.path.isdir(name):
        raise UserError(f"{prefix}source={settings.source}: no such folder; give one, or hf:OWNER/NAME")
    with _quiet():
        if any(os.path.isfile(os.path.join(name, each)) for each in _SAVED):
            return _saved(name, settings, prefix)
        return _streamed(name, settings, prefix)


def _saved(folder: str, settings: SourceConfig, prefix: str) -> Dataset:
    import datasets

    if settings.subset:
        raise UserError(f"{prefix}subset={settings.subset}: a saved dataset has no subsets; leave it out")
    try:
        found = datasets.load_from_disk(folder)
    except Exception as error:
        raise UserError(
            f"{prefix}source={settings.source}: cannot be read ({_line(error)}); save the dataset again"
        ) from error
    if isinstance(found, datasets.Dataset):
        own = str(found.split or "train")
        dataset = found if settings.split in (own, "train") else None
        splits = [own]
    else:
        dataset, splits = found.get(settings.split), list(found)
    if dataset is None:
        _raise_split(settings, prefix, splits)
    key = [str(dataset._fingerprint), len(dataset), [os.path.getsize(each["filename"]) for each in dataset.cache_files]]
    return Dataset(key, functools.partial(_read_saved, dataset, settings, prefix))


def _read_saved(dataset: "datasets.Dataset", settings: SourceConfig, prefix: str) -> Records:
    needed = needed_columns(settings, dataset.column_names)
    tables = (dataset if needed is None else dataset.select_columns(needed)).with_format("arrow").iter(columns.ROWS)
    yield from columns.records(_all(tables, settings, prefix), f"{prefix}source={settings.source}")


def _streamed(name: str, settings: SourceConfig, prefix: str) -> Dataset:
    import datasets

    where = f"{prefix}source={settings.source}"
    try:
        builder = datasets.load_dataset_builder(name, settings.subset or None)
        dataset = builder.as_streaming_dataset(split=settings.split)
    except FileNotFoundError as error:
        raise UserError(
            f"{where}: no such dataset, or one that needs a login ({_line(error)}); give hf:OWNER/NAME or hf:FOLDER, "
            "or run `hf auth login`"
        ) from error
    except ConnectionError as error:
        raise UserError(
            f"{where}: cannot be reached ({_line(error)}); where there is a network, run `hf download {name} "
            "--repo-type=dataset --local-dir=FOLDER`, and give hf:FOLDER"
        ) from error
    except Exception as error:
        text = _line(error)
        if text.startswith("Bad split"):
            _raise_split(settings, prefix, [str(split) for split in builder.config.data_files])
        if text.startswith(("BuilderConfig", "Config name is missing")):
            raise UserError(
                f"{prefix}subset={settings.subset}: not one of {settings.source} ({text}); set {prefix}subset"
            ) from error
        raise UserError(f"{where}: cannot be opened ({text}); give files with {prefix}source=text_files") from error
    files = builder.config.data_files or {}
    key = [
        name,
        builder.config.name,
        settings.split,
        [(str(split), list(found), found.origin_metadata) for split, found in files.items()],
    ]
    return Dataset(key, functools.partial(_read_streamed, dataset, settings, prefix))


def _read_streamed(dataset: "datasets.IterableDataset", settings: SourceConfig, prefix: str) -> Records:
    if dataset.features is not None:
        dataset = dataset.decode(False)  # images and sounds stay bytes
        needed = needed_columns(settings, list(dataset.features))
        dataset = dataset if needed is None else dataset.select_columns(needed)
    for number, example in enumerate(_all(dataset, settings, prefix), 1):
        yield Record(f"{prefix}source={settings.source} record {number}", example)


def _all(items: Any, settings: SourceConfig, prefix: str) -> Iterator[Any]:
    """Yields the items of an iterator of the package, whose errors are of many types."""
    with contextlib.closing(iter(items)) as iterator:
        number = 0
        while True:
            try:
                item = next(iterator, None)
            except Exception as error:
                raise UserError(
                    f"{prefix}source={settings.source}: cannot be read after item {number} ({_line(error)}); repair "
                    f"it, or give its files with {prefix}source=text_files"
                ) from error
            if item is None:
                return
            number += 1
            yield item


def _raise_split(settings: SourceConfig, prefix: str, splits: list[str]) -> NoReturn:
    raise UserError(f"{prefix}split={settings.split}: not a split of {settings.source}; it has {', '.join(splits)}")


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppresses the package's progress bars and the notices of each of its attempts to reach the Hub."""
    import datasets
    import huggingface_hub.utils as hub

    loggers = (datasets.logging, hub.logging)
    verbosities = [each.get_verbosity() for each in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for each in loggers:
        each.set_verbosity_error()
    try:
        yield
    finally:
        for each, verbosity in zip(loggers, verbosities, strict=True):
            each.set_verbosity(verbosity)
        if had_bars:
            datasets.enable_progress_bars()
