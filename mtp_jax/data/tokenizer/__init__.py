"""Tokenizers with one interface: bytes, a Hugging Face tokenizer.json, or a SentencePiece model."""

import os

from etils import epath

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.data.tokenizer.base import MAX_VOCABULARY, ByteTokenizer, FIMTokens, Tokenizer
from mtp_jax.data.tokenizer.hugging_face import HFTokenizer
from mtp_jax.data.tokenizer.sentencepiece import SentencePieceTokenizer

FILES = ("tokenizer.json", "tokenizer.model")  # of a folder, the first one present


def load(name_or_path: str) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names.

    Args:
      name_or_path: "bytes", a tokenizer.json, a SentencePiece .model, or a folder that holds one of `FILES`; local or
        a URL.

    Raises:
      UserError: no such file, not a tokenizer, or a .model without the package that reads it.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    path = storage.path(os.path.expanduser(name_or_path), "data.tokenizer")
    if storage.is_dir(path):
        path = find(path) or path / FILES[0]
    if not storage.is_file(path):
        raise UserError(
            f"data.tokenizer={name_or_path}: no such file; use bytes, or the path of a tokenizer.json or a "
            "SentencePiece .model"
        )
    return SentencePieceTokenizer(path) if path.suffix == ".model" else HFTokenizer(path)


def find(folder: epath.Path) -> epath.Path | None:
    """Returns the tokenizer file of a folder; None if it has none."""
    return next((folder / name for name in FILES if storage.is_file(folder / name)), None)
