"""Tokenizers of a tokenizer.json, read by the `tokenizers` library of Hugging Face."""

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.data.tokenizer.base import (
    BOS_NAMES,
    EOS_NAMES,
    MAX_VOCABULARY,
    FIMTokens,
    Lead,
    fim_tokens,
    find_lead,
)
from mtp_jax.errors import first_line
from mtp_jax.typing import JsonObject

if TYPE_CHECKING:  # imported where it is used: byte-level runs do not need it
    import tokenizers


class HFTokenizer:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: storage.AnyPath):
        """Reads a tokenizer.json.

        Args:
          path: the tokenizer.json.

        Raises:
          UserError: not a readable tokenizer.json.
        """
        try:
            content = storage.read_bytes(path)
            self._tokenizer = _parse(content, special_tokens=False)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer={path}: not a readable tokenizer.json ({first_line(error)})") from error
        self._content = content
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        if not ids:
            raise UserError(f"data.tokenizer={path}: its vocabulary is empty; give a tokenizer.json with tokens")
        self.vocab_size = max(ids.values()) + 1  # ids may have gaps, so this may exceed their number
        if self.vocab_size > MAX_VOCABULARY:
            raise UserError(
                f"data.tokenizer={path}: has an id {self.vocab_size - 1:,}, and ids stay below {MAX_VOCABULARY:,}; "
                "number its tokens from 0"
            )
        self._where = f"data.tokenizer={path}"
        self.bos_id: int | None = next((ids[n] for n in BOS_NAMES if n in ids), None)
        self.eos_id: int | None = next((ids[n] for n in EOS_NAMES if n in ids), None)
        self.fim_ids: FIMTokens | None = fim_tokens(ids)
        marks = {self.bos_id, self.eos_id, *(self.fim_ids or ())} - {None}
        self._special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special} | marks
        self.token_bytes = self._count_bytes(ids, json.loads(content))
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    @functools.cached_property
    def _with_special_tokens(self) -> "tokenizers.Tokenizer":
        """The same tokenizer with the library's other setting, which belongs to the object and not to a call."""
        return _parse(self._content, special_tokens=True)

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        return np.array(self._encoding(text, special_tokens).ids, np.int32)

    def encode_with_offsets(self, text: str, special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        found = self._encoding(text, special_tokens)
        return np.array(found.ids, np.int32), np.array(found.offsets, np.int64).reshape(-1, 2)

    def _encoding(self, text: str, special_tokens: bool) -> "tokenizers.Encoding":
        with self._errors():
            tokenizer = self._with_special_tokens if special_tokens else self._tokenizer
            return tokenizer.encode(text, add_special_tokens=False)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        with self._errors():
            encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Turns the library's errors, of the type Exception itself, into UserError: they are of the tokenizer.json."""
        try:
            yield
        except Exception as error:
            if type(error) is not Exception:
                raise
            raise UserError(
                f"{self._where}: cannot encode a text ({first_line(error)}); correct the file, or use another tokenizer"
            ) from error

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if self._is_text(i)], skip_special_tokens=True)

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        if not any(map(self._is_text, before)):
            return self.decode(ids)  # after a bos, for instance, they are the beginning of the text
        return self.decode([*self._lead.ids, *ids])[len(self._lead.text) :]

    def _is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and int(i) not in self._special

    @functools.cached_property
    def _lead(self) -> Lead:
        return find_lead(self.vocab_size, self.decode)

    def special_id(self, name: str) -> int | None:
        found = self._tokenizer.token_to_id(name)
        return found if found in self._special else None

    def _count_bytes(self, ids: dict[str, int], spec: JsonObject) -> np.ndarray:
        """Returns int32[vocab_size], UTF-8 bytes of each id; exact for byte-level vocabularies.

        SentencePiece vocabularies count their "▁" as the one space it represents, also where the tokenizer adds it
        before the first word.
        """
        counts = np.zeros(self.vocab_size, np.int32)
        added = {t.content for t in self._tokenizer.get_added_tokens_decoder().values()}
        pieces = _types(spec.get("decoder")) | _types(spec.get("pre_tokenizer"))
        is_byte_level = "ByteLevel" in pieces
        is_sentencepiece = bool(pieces & {"Metaspace", "ByteFallback", "Replace"})
        for token, i in ids.items():
            if i in self._special:
                continue
            if token in added:
                counts[i] = len(token.encode())
            elif is_byte_level:
                counts[i] = len(token)  # the vocabulary spells each byte as one character
            elif is_sentencepiece:
                is_byte = re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", token)
                counts[i] = 1 if is_byte else len(token.replace("▁", " ").encode())
            else:
                counts[i] = len(self._tokenizer.decode([i]).encode())
        return counts


def _parse(content: bytes, special_tokens: bool) -> "tokenizers.Tokenizer":
    """Returns the tokenizer of a tokenizer.json without the settings of another use that a saved file may have.

    These are truncation, padding of batches, and whether text that spells <|endoftext|> is encoded as that token.
    """
    import tokenizers

    tokenizer = tokenizers.Tokenizer.from_str(content.decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = not special_tokens  # the library's name of "encode them as text"
    return tokenizer


def _types(spec: object) -> set[str]:
    """Returns every "type" inside a part of a tokenizer.json, which nests them in sequences."""
    if isinstance(spec, dict):
        return {str(spec.get("type"))}.union(*map(_types, spec.values()))
    if isinstance(spec, list):
        return set().union(*map(_types, spec))
    return set()
