"""Small corpora, and the real texts where the machine has them."""

import dataclasses

import pytest

from mtp_jax.config import Config, DataConfig, SourceConfig
from mtp_jax.data import store
from mtp_jax.data.documents import Text
from mtp_jax.data.encoding import encode
from mtp_jax.data.tokenizer import ByteTokenizer
from tests import real_data as real_data_of


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def make_config(cache_dir):
    """A Config of synthetic documents; keywords are data.* keys, and `seed`."""

    def make(seed=0, **data):
        settings = {"source": "synthetic", "synthetic_documents": 300, "sequence_length": 32, "batch_size": 8}
        data = DataConfig(**settings | {"cache_dir": cache_dir, "validation_fraction": 0.2} | data)
        return Config(data=data, seed=seed)

    return make


class BareTokenizer(ByteTokenizer):
    """Bytes without any special token."""

    vocab_size = 256
    bos_id = eos_id = fim_ids = None
    fingerprint = "bare"


@pytest.fixture
def make_store(tmp_path_factory):
    """A token store of some texts."""

    def make(texts, tokenizer=None):
        folder, tokenizer = tmp_path_factory.mktemp("store"), tokenizer or ByteTokenizer()
        documents = [Text(text, f"text {i}") for i, text in enumerate(texts)]
        store.write(folder, encode(documents, tokenizer), tokenizer, SourceConfig(), "test")
        return store.TokenStore(folder)

    return make


@pytest.fixture
def bare_tokenizer():
    return BareTokenizer()


@pytest.fixture
def real_data():
    """The path of a real text or tokenizer."""
    return lambda name: str(real_data_of.find(name))


@pytest.fixture
def with_data():
    """A config with some data.* keys changed."""

    def change(config, **data):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, **data))

    return change
