"""Tokenizers of the SentencePiece kind, trained in milliseconds: a blank is the mark before a word, and the one at the
beginning of a text is taken off when it is decoded."""

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

TEXTS = [
    "the station is open and Ann comes at 3.\nthe café is closed, and Bob stays → home\n",
    "def f(x):\n    return x  # two  blanks\n",
]
SPECIAL = ["<unk>", "<s>", "</s>"]


def llama_style(num_learned=80):
    """BPE that falls back on bytes: normalizer, model and decoder as in the tokenizer.json of Llama 2 and Mistral."""
    taught = tokenizers.Tokenizer(models.BPE())
    taught.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    taught.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # or it would learn whole lines
    taught.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=num_learned, show_progress=False))
    learned = json.loads(taught.to_str())["model"]
    names = [*SPECIAL, *(f"<0x{i:02X}>" for i in range(256)), *learned["vocab"]]
    vocab = {name: i for i, name in enumerate(names)}
    merges = [tuple(merge) for merge in learned["merges"]]
    made = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.add_special_tokens(SPECIAL)
    made.normalizer = taught.normalizer
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made


def unigram_style(vocab_size=120):
    """Unigram with a Metaspace pre-tokenizer and decoder, as in the tokenizer.json of T5 and XLM-R."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made
