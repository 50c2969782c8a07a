"""Tokenizers with one interface: bytes, or a Hugging Face tokenizer.json."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mtp_jax import storage
from mtp_jax.config import UserError
from mtp_jax.errors import first_line
from mtp_jax.typing import JsonObject

MAX_VOCABULARY = 2**24  # ids, as of model.vocab_size


class FIMTokens(NamedTuple):
    """Ids that mark the parts of a document rearranged for fill-in-the-middle (2207.14255)."""

    prefix: int
    suffix: int
    middle: int


class Tokenizer(Protocol):
    """Interface of a tokenizer.

    Attributes:
      vocab_size: ids are below it. The model's vocabulary may be larger, rounded up.
      bos_id, eos_id: put around every document; None where the tokenizer has none.
      fim_ids: None where the tokenizer has none.
      token_bytes: int32[vocab_size], UTF-8 bytes of the text of each id; 0 for special tokens.
      fingerprint: a hash of everything that the ids depend on.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fim_ids: FIMTokens | None
    token_bytes: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids, int32[n]; no special token is added, and text that spells one is encoded as text."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text; special and unknown ids are dropped, bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        """Returns the text that `ids` add to that of `before`.

        Where `before` ends with a whole character, the text of `before` followed by this one is `decode` of both. The
        first id alone may decode to less: SentencePiece removes a blank at the beginning of a text.
        """
        ...

    def special_id(self, name: str) -> int | None:
        """Returns the id of the special token `name`, which `decode` drops; None if there is none."""
        ...


class ByteTokenizer:
    """Ids 0..255 are bytes; 256 begins a document, 257 ends it, 258..260 are the FIM marks."""

    vocab_size = 261
    bos_id: int | None = 256
    eos_id: int | None = 257
    fim_ids: FIMTokens | None = FIMTokens(258, 259, 260)
    fingerprint = "bytes-1"

    def __init__(self) -> None:
        self.token_bytes = (np.arange(self.vocab_size) < 256).astype(np.int32)

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        return self.decode(ids)

    def special_id(self, name: str) -> int | None:
        return None  # its special tokens have no names


# Names by family, the most specific first; the first one present is used. DeepSeek spells its own with a full-width bar
# and a lower-one-eighth block.
_BOS_NAMES = ("<|begin_of_sentence|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>")
_EOS_NAMES = (
    "<|end_of_sentence|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<eos>",
    "</s>",
    "<|im_end|>",
)
_FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek: the hole's mark precedes the suffix
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


class HFTokenizer:
    """A tokenizer.json, read by the `tokenizers` library."""

    def __init__(self, path: storage.AnyPath):
        """Reads a tokenizer.json.

        Args:
          path: the tokenizer.json.

        Raises:
          UserError: not a readable tokenizer.json.
        """
        import tokenizers  # imported here: byte-level runs do not need it

        try:
            content = storage.read_bytes(path)
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer={path}: not a readable tokenizer.json ({first_line(error)})") from error
        # A saved file may carry settings of another use: truncation, padding of batches, and documents in which the
        # text <|endoftext|> is encoded as the special token.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
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
        self.bos_id: int | None = next((ids[n] for n in _BOS_NAMES if n in ids), None)
        self.eos_id: int | None = next((ids[n] for n in _EOS_NAMES if n in ids), None)
        fim = (FIMTokens(ids[a], ids[b], ids[c]) for a, b, c in _FIM_NAMES if {a, b, c} <= ids.keys())
        self.fim_ids: FIMTokens | None = next(fim, None)
        marks = {self.bos_id, self.eos_id, *(self.fim_ids or ())} - {None}
        self._special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special} | marks
        self.token_bytes = self._count_bytes(ids, json.loads(content))
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        with self._errors():
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

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
        lead, text = self._lead
        return self.decode([*lead, *ids])[len(text) :]

    def _is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and int(i) not in self._special

    @functools.cached_property
    def _lead(self) -> tuple[list[int], str]:
        """Returns an id and its text, which is the same whatever ids follow: it has no part of a character.

        The last token of the actual prefix may be part of a character, which would change the bytes that follow.
        """
        texts = (([i], self.decode([i])) for i in range(self.vocab_size))
        return next(((ids, text) for ids, text in texts if text and "\ufffd" not in text), ([], ""))

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


def load(name_or_path: str) -> Tokenizer:
    """Returns the tokenizer that `data.tokenizer` names.

    Args:
      name_or_path: "bytes", a tokenizer.json, or a folder that holds one; local or a URL.

    Raises:
      UserError: no such file, or not a tokenizer.json.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    path = storage.path(os.path.expanduser(name_or_path), "data.tokenizer")
    if storage.is_dir(path):
        path = path / "tokenizer.json"
    if not storage.is_file(path):
        raise UserError(f"data.tokenizer={name_or_path}: no such file; use bytes, or the path of a tokenizer.json")
    return HFTokenizer(path)


def _types(spec: object) -> set[str]:
    """Returns every "type" inside a part of a tokenizer.json, which nests them in sequences."""
    if isinstance(spec, dict):
        return {str(spec.get("type"))}.union(*map(_types, spec.values()))
    if isinstance(spec, list):
        return set().union(*map(_types, spec))
    return set()
