"""The TFDS dataset of this project. Imports TFDS: import this module only where a dataset is prepared."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow_datasets as tfds

from mtp_jax.config import UserError

Examples = Iterator[tuple[int, dict[str, str]]]


class Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One split, train, of {text, origin}, in the order in which `read` yields them: that of the files."""

    name = "documents"
    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # the folder of download checksums; TFDS 4.9 needs an undeclared package to find it

    def __init__(self, source: str, read: Callable[[], Iterator[tuple[str, str]]], **options: Any):
        """Builder of the documents of a source.

        Args:
          source: the setting that names the source and its value, for errors.
          read: yields (origin, text).
          options: passed to `GeneratorBasedBuilder`.
        """
        self._source, self._read = source, read
        super().__init__(**options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "origin": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Examples:
        i = -1
        for i, (origin, text) in enumerate(self._read()):
            yield i, {"text": text, "origin": origin}
        if i < 0:  # TFDS would fail an assertion
            raise UserError(f"{self._source}: holds no text; give files that are not empty")
