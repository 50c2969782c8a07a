"""The tokenizer.json of a closed vocabulary of words, as artificial languages have."""

from collections.abc import Iterable

from mtp_jax.typing import JsonObject

SPECIAL = ("<unk>", "<s>", "</s>")  # ids 0, 1 and 2


def word_level(words: Iterable[str]) -> JsonObject:
    """Returns a tokenizer.json with one token per word, where words are separated by white space.

    Args:
      words: the vocabulary; a word that occurs again is left out. Their ids follow those of `SPECIAL`.
    """
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    vocabulary = list(dict.fromkeys([*SPECIAL, *words]))
    return {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": word, **flags, "special": True} for i, word in enumerate(SPECIAL)],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(vocabulary)},
            "unk_token": SPECIAL[0],
        },
    }
