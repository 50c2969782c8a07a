"""The interface of a tokenizer, the tokenizer of bytes, and the names of special tokens."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

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

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        """Returns the ids, int32[n]; no special token is added.

        Args:
          special_tokens: text that spells a special token is encoded as that token; False: as text.
        """
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns `encode` of each text."""
        ...

    def encode_with_offsets(self, text: str, special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Returns `encode`, int32[n], and the characters of `text` of each id, int64[n, 2]: first, and last + 1."""
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

    def encode(self, text: str, special_tokens: bool = False) -> np.ndarray:
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(text) for text in texts]

    def encode_with_offsets(self, text: str, special_tokens: bool = False) -> tuple[np.ndarray, np.ndarray]:
        ids = self.encode(text)
        firsts = np.cumsum((ids & 0xC0) != 0x80) - 1  # the other bytes of a character are 10xxxxxx
        return ids, np.stack([firsts, firsts + 1], axis=1).astype(np.int64)

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")

    def decode_after(self, before: Iterable[int], ids: Iterable[int]) -> str:
        return self.decode(ids)

    def special_id(self, name: str) -> int | None:
        return None  # its special tokens have no names


# Names by family, the most specific first; the first one present is used. DeepSeek spells its own with a full-width bar
# and a lower-one-eighth block.
BOS_NAMES = ("<|begin_of_sentence|>", "<｜begin▁of▁sentence｜>", "<|begin_of_text|>", "<bos>", "<s>")
EOS_NAMES = (
    "<|end_of_sentence|>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<eos>",
    "</s>",
    "<|im_end|>",
)
FIM_NAMES = (
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek: the hole's mark precedes the suffix
    ("<|fim_begin|>", "<|fim_hole|>", "<|fim_end|>"),
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),  # Code Llama
)


def fim_tokens(ids: Mapping[str, int]) -> FIMTokens | None:
    """Returns the FIM tokens of a vocabulary, name -> id; None if it has none."""
    found = (FIMTokens(ids[a], ids[b], ids[c]) for a, b, c in FIM_NAMES if {a, b, c} <= ids.keys())
    return next(found, None)


class Lead(NamedTuple):
    """Ids and their text, which is the same whatever ids follow: it has no part of a character.

    A text decoded after a lead keeps the blank that it begins with. The last token of the actual prefix may be part of
    a character, which would change the bytes that follow.
    """

    ids: list[int]
    text: str


def find_lead(vocab_size: int, decode: Callable[[list[int]], str]) -> Lead:
    """Returns the first id that can be a lead; no id and no text if there is none."""
    texts = (Lead([i], decode([i])) for i in range(vocab_size))
    return next((lead for lead in texts if lead.text and "\ufffd" not in lead.text), Lead([], ""))
