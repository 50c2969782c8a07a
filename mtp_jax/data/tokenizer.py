"""Text to ids and back: bytes, or a Hugging Face tokenizer.json. One interface."""

import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mtp_jax.config import UserError
from mtp_jax.errors import first_line
from mtp_jax.typing import JsonObject


class FIMTokens(NamedTuple):
    """Ids that mark the pieces of a document rearranged for fill-in-the-middle (2207.14255)."""

    prefix: int
    suffix: int
    middle: int


class Tokenizer(Protocol):
    """What the rest of the project knows of a tokenizer.

    Attributes:
      vocab_size: ids are below it. The model may have more, when its vocabulary is rounded up.
      bos_id, eos_id: put around every document, where the tokenizer has them.
      fim_ids: None where the tokenizer has none.
      token_bytes: int32[vocab_size], UTF-8 bytes of text an id stands for; 0 for special tokens.
      fingerprint: a hash of everything that decides the ids.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    fim_ids: FIMTokens | None
    token_bytes: np.ndarray
    fingerprint: str

    def encode(self, text: str) -> np.ndarray:
        """int32[n]; no special token is added, and none is made from text that spells one."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """The text; special and unknown ids are dropped, bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        """The text that `ids` add to that of `before`: with it, `decode` of both, where `before` ends with a whole
        character. By itself the first id may be less: SentencePiece takes a blank off the beginning of a text.
        """
        ...

    def special_id(self, name: str) -> int | None:
        """The id of the special token of that name, which `decode` drops; None where there is none."""
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
        return None  # they have no names


# Names by family, most telling first; the first one present is taken. DeepSeek spells its own with a full-width bar
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
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek: the hole's mark stands before the suffix
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


class HFTokenizer:
    """A tokenizer.json of the `tokenizers` library."""

    def __init__(self, path: str | pathlib.Path):
        """
        Args:
          path: the tokenizer.json.

        Raises:
          UserError: not a readable tokenizer.json.
        """
        import tokenizers  # here: byte-level runs need not have it loaded

        try:
            content = pathlib.Path(path).read_bytes()
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"data.tokenizer={path}: not a readable tokenizer.json ({first_line(error)})") from error
        # A saved file may carry the settings of whoever saved it: cut documents, padded batches, and documents that
        # spell <|endoftext|> encoded as the real one.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(ids.values()) + 1  # ids may have holes, so more than their number
        self.bos_id: int | None = next((ids[n] for n in _BOS_NAMES if n in ids), None)
        self.eos_id: int | None = next((ids[n] for n in _EOS_NAMES if n in ids), None)
        fim = (FIMTokens(ids[a], ids[b], ids[c]) for a, b, c in _FIM_NAMES if {a, b, c} <= ids.keys())
        self.fim_ids: FIMTokens | None = next(fim, None)
        marks = {self.bos_id, self.eos_id, *(self.fim_ids or ())} - {None}
        self._special = {i for i, t in self._tokenizer.get_added_tokens_decoder().items() if t.special} | marks
        self.token_bytes = self._count_bytes(ids, json.loads(content))
        self.fingerprint = hashlib.blake2b(content, digest_size=16).hexdigest()

    def encode(self, text: str) -> np.ndarray:
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(e.ids, np.int32) for e in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids if self._is_text(i)], skip_special_tokens=True)

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        if not any(map(self._is_text, before)):
            return self.decode(ids)  # after a bos, say, they are the beginning
        lead, text = self._lead
        return self.decode([*lead, *ids])[len(text) :]

    def _is_text(self, i: int) -> bool:
        return 0 <= i < self.vocab_size and int(i) not in self._special

    @functools.cached_property
    def _lead(self) -> tuple[list[int], str]:
        """An id and its text, which stays as it is whatever ids follow: one without a part of a character. The last of
        what really comes before may be such a part, and would spoil the bytes behind it."""
        texts = (([i], self.decode([i])) for i in range(self.vocab_size))
        return next(((ids, text) for ids, text in texts if text and "\ufffd" not in text), ([], ""))

    def special_id(self, name: str) -> int | None:
        found = self._tokenizer.token_to_id(name)
        return found if found in self._special else None

    def _count_bytes(self, ids: dict[str, int], spec: JsonObject) -> np.ndarray:
        """int32[vocab_size]; exact for byte-level vocabularies.

        SentencePiece vocabularies count their "▁" as the one space it stands for, also where the tokenizer puts it
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
    """The tokenizer `data.tokenizer` names.

    Args:
      name_or_path: "bytes", a tokenizer.json, or a folder that holds one.

    Raises:
      UserError: no such file, or not a tokenizer.json.
    """
    if name_or_path == "bytes":
        return ByteTokenizer()
    path = pathlib.Path(name_or_path).expanduser()
    if path.is_dir():
        path = path / "tokenizer.json"
    if not path.is_file():
        raise UserError(f"data.tokenizer={name_or_path}: no such file; use bytes, or the path of a tokenizer.json")
    return HFTokenizer(path)


def _types(spec: object) -> set[str]:
    """Every "type" inside a piece of a tokenizer.json, which nests them in sequences."""
    if isinstance(spec, dict):
        return {str(spec.get("type"))}.union(*map(_types, spec.values()))
    if isinstance(spec, list):
        return set().union(*map(_types, spec))
    return set()
