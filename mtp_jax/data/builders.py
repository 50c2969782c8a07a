"""The TFDS datasets of this project. Imports TFDS: import this module only where one is prepared."""

import dataclasses
from collections.abc import Iterator

import tensorflow_datasets as tfds

from mtp_jax.config import UserError
from mtp_jax.data import documents

Examples = Iterator[tuple[int, dict[str, str]]]


class _Documents(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    """One split, train, of {text, origin}, in the order generated: the order of the files."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # where checksums of downloads would be; TFDS 4.9 needs a package it does not declare to find it

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict({"text": tfds.features.Text(), "origin": tfds.features.Text()})
        return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Examples:
        i = -1
        for i, (origin, text) in enumerate(self._documents()):
            yield i, {"text": text, "origin": origin}
        if i < 0:  # TFDS would fail an assertion
            raise UserError(f"data.source={self.name}: holds no text; give files that are not empty")

    def _documents(self) -> Iterator[tuple[str, str]]:
        raise NotImplementedError


@dataclasses.dataclass(kw_only=True)
class PythonSourceConfig(tfds.core.BuilderConfig):
    """The .py files; not shown, because TFDS logs its configs and there are hundreds of files."""

    paths: tuple[str, ...] = dataclasses.field(default=(), repr=False)


class PythonSource(_Documents, skip_registration=True):  # type: ignore[call-arg]
    """A document a file of the running interpreter's standard library."""

    name = "python_source"

    def _documents(self) -> Iterator[tuple[str, str]]:
        return documents.python_documents(self.builder_config.paths)


@dataclasses.dataclass(kw_only=True)
class TextFilesConfig(tfds.core.BuilderConfig):
    """Files, the field of JSON lines, and the length plain text is cut to."""

    paths: tuple[str, ...] = dataclasses.field(default=(), repr=False)
    text_field: str = "text"
    max_document_chars: int = 32_768


class TextFiles(_Documents, skip_registration=True):  # type: ignore[call-arg]
    """Documents of the user's own files."""

    name = "text_files"

    def _documents(self) -> Iterator[tuple[str, str]]:
        config = self.builder_config
        return documents.text_documents(config.paths, config.text_field, config.max_document_chars)
