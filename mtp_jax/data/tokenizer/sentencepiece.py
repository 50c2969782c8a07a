"""Tokenizers of a SentencePiece .model, read by the `sentencepiece` package."""

import functools
import hashlib
import importlib
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.data.tokenizer.base import MAX_VOCABULARY, FIMTokens, Lead, fim_tokens, find_lead
from mtp_jax.errors import first_line


class SentencePieceTokenizer:
    """A SentencePiece model. Its control symbols (bos, eos and others) are the special tokens.

    User-defined symbols are text that is always one token, as in SentencePiece itself.
    """

    def __init__(self, path: storage.AnyPath):
        """Reads a .model.

        Raises:
          UserError: the package sentencepiece is not installed, or not a readable SentencePiece model.
        """
        try:
            import sentencepiece

            messages: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
        except ImportError as error:
            raise UserError(
                f"data.tokenizer={path}: needs a package: pip install sentencepiece (the extra of that name); or use a "
                "tokenizer.json"
            ) from error
        from google.protobuf.message import DecodeError

        content = storage.read_bytes(path)
        try:
            model = messages.ModelProto.FromString(content)
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
            model.normalizer_spec.add_dummy_prefix = False
            self._without_prefix = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
        except (DecodeError, RuntimeError, ValueError) as error:
            raise UserError(
                f"data.tokenizer={path}: not a readable SentencePiece model ({first_line(error)}); use a tokenizer.json"
            ) from error
        self.vocab_size = len(model.pieces)
        if not 0 < self.vocab_size <= MAX_VOCABULARY:
            raise UserError(
                f"data.tokenizer={path}: has {self.vocab_size:,} pieces; use a model with 1 to {MAX_VOCABULARY:,}"
            )
        bos, eos = self._processor.bos_id(), self._processor.eos_id()  # -1 where the model has none
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int | None = eos if eos >= 0 else None
        kinds = messages.ModelProto.SentencePiece
        names = {piece.piece: i for i, piece in enumerate(model.pieces)}
        self.fim_ids: FIMTokens | None = fim_tokens(names)
        marks = {*(self.fim_ids or ())}
        self._special = {
            piece.piece: i for i, piece in enumerate(model.pieces) if piece.type == kinds.CONTROL or i in marks
        }
        self._special_ids = set(self._special.values())
        self._bytes = {i for i, piece in enumerate(model.pieces) if piece.type == kinds.BYTE}
        self.token_bytes = np.zeros(self.vocab_size, np.int32)
        for i, piece in enumerate(model.pieces):
            if piece.type in (kinds.NORMAL, kinds.USER_DEFINED) and i not in self._special_ids:
                self.token_bytes[i] = len(piece.piece.replace("▁", " ").encode())
            elif piece.type == kinds.BYTE:
                self.token_bytes[i] = 1
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        if special_tokens:
            return self.encode_with_offsets(text, special_tokens)[0]
        return np.array(self._processor.encode(text), np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(ids, np.int32) for ids in self._processor.encode(list(texts))]

    def encode_with_offsets(self, text: str, special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for start, part in self._parts(text) if special_tokens else [(0, text)]:
            if special_tokens and part in self._special:
                ids.append(self._special[part])
                offsets.append((start, start + len(part)))
                continue
            # The model adds a blank to the beginning of a text, which is not that of the part after a special token.
            processor = self._processor if start == 0 else self._without_prefix
            found = processor.encode(part, out_type="offset_mapping")
            ids += found["ids"]
            for i, (first, end) in zip(found["ids"], found["offsets"], strict=True):
                # Only the last byte of a character has its place in the text.
                offsets.append((start + first, start + (max(end, first + 1) if i in self._bytes else end)))
        return np.array(ids, np.int32), np.array(offsets, np.int64).reshape(-1, 2)

    def _parts(self, text: str) -> list[tuple[int, str]]:
        """Returns the spelled special tokens and the texts between them, with their first characters."""
        parts, start = [], 0
        for part in self._special_pattern.split(text):
            if part:
                parts.append((start, part))
            start += len(part)
        return parts

    @functools.cached_property
    def _special_pattern(self) -> re.Pattern[str]:
        names = sorted(filter(None, self._special), key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, names))})" if names else "((?!))")

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if self._is_text(i)])

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        if not any(map(self._is_text, before)):
            return self.decode(ids)
        return self.decode([*self._lead.ids, *ids])[len(self._lead.text) :]

    def _is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and int(i) not in self._special_ids

    @functools.cached_property
    def _lead(self) -> Lead:
        return find_lead(self.vocab_size, self.decode)

    def special_id(self, name: str) -> int | None:
        return self._special.get(name)
