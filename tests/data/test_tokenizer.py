"""Tokenizers: round trips, special tokens, bytes an id stands for."""

import json

import numpy as np
import pytest
import tokenizers
from etils import epath
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from mtp_jax.config import UserError, with_own_tokenizer
from mtp_jax.data import ByteTokenizer, load_tokenizer
from mtp_jax.data.tokenizer.word_level import word_level
from tests import sentencepiece

TEXTS = ["def f(x):\n    return x  # é ü 漢字 🙂\n", "aaaa bbbb  cccc\t\r\n", "<|endoftext|> is spelled here"]


def byte_level(special=(), **options):
    """A byte-level BPE tokenizer, trained here."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
        **options,
    )
    made.train_from_iterator(TEXTS * 3, trainer)
    return made


@pytest.fixture
def saved(tmp_path):
    def save(made):
        path = tmp_path / "tokenizer.json"
        made.save(str(path))
        return load_tokenizer(str(path))

    return save


@given(st.text())
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes[ids].sum() == len(text.encode())


def test_bytes_decode_replaces_what_is_not_utf8_and_drops_special_ids():
    assert ByteTokenizer().decode([256, 104, 0xC3, 105, 257, 258, 300, 10**6]) == "h\ufffdi"


def test_bytes_ids():
    t = load_tokenizer("bytes")
    assert (t.vocab_size, t.bos_id, t.eos_id, tuple(t.fim_ids)) == (261, 256, 257, (258, 259, 260))
    assert t.token_bytes.dtype == np.int32
    assert t.token_bytes.tolist() == [1] * 256 + [0] * 5


def test_byte_level_bpe_round_trips_and_counts_bytes(saved):
    tokenizer = saved(byte_level(["<|endoftext|>"]))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.fim_ids) == (None, 0, None)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and len(ids) < len(text.encode())
        assert tokenizer.decode(ids) == text
        assert tokenizer.token_bytes[ids].sum() == len(text.encode())
    assert tokenizer.token_bytes[0] == 0
    assert tokenizer.decode([0, *tokenizer.encode("ab"), 10**6, 0]) == "ab"
    assert tokenizer.decode(tokenizer.encode("é")[:1]) == "\ufffd"
    for one, batched in zip(map(tokenizer.encode, TEXTS), tokenizer.encode_batch(TEXTS), strict=True):
        np.testing.assert_array_equal(one, batched)


def test_text_that_spells_a_special_token_does_not_become_it(saved):
    tokenizer = saved(byte_level(["<|endoftext|>"]))
    assert 0 not in tokenizer.encode("a <|endoftext|> b")


def test_special_tokens_go_by_their_names_and_words_do_not(saved):
    tokenizer = saved(byte_level(["<s>", "<|im_end|>"]))
    assert [tokenizer.special_id(name) for name in ("<|im_end|>", "a", "<no>")] == [1, None, None]
    assert tokenizer.decode([1]) == "" and ByteTokenizer().special_id("<s>") is None


def test_settings_left_in_the_file_do_not_touch_documents(saved):
    made = byte_level(["<s>", "</s>"])
    made.enable_truncation(4)
    made.enable_padding(length=4)
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
    tokenizer = saved(made)
    ids = tokenizer.encode(TEXTS[0] * 5)
    assert tokenizer.decode(ids) == TEXTS[0] * 5
    assert not {0, 1} & set(ids.tolist())
    assert (tokenizer.bos_id, tokenizer.eos_id) == (0, 1)


@pytest.mark.parametrize(
    "names",
    [
        ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
        ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
        ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ],
)
def test_fim_tokens_are_found(saved, names):
    special = ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", *names[::-1]]
    tokenizer = saved(byte_level(special))
    assert (tokenizer.bos_id, tokenizer.eos_id, tuple(tokenizer.fim_ids)) == (0, 1, (4, 3, 2))


def test_sentencepiece_pieces_count_their_text(saved):
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "<0xC3>": 3, "<0xA9>": 4, "▁": 5, "a": 6, "▁a": 7}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("▁", "a")], unk_token="<unk>", byte_fallback=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    made.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback()])
    tokenizer = saved(made)
    assert tokenizer.token_bytes.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert tokenizer.token_bytes[tokenizer.encode("a aé")].sum() == len("a aé".encode())


@pytest.mark.parametrize("make", [sentencepiece.llama_style, sentencepiece.unigram_style, byte_level])
def test_a_text_decoded_in_two_parts_is_the_text(saved, make):
    """Wherever it is split between two characters, at its ends too, and whatever special tokens stand there."""
    tokenizer = saved(make())
    for text in [*sentencepiece.TEXTS, "  Bob 漢字 🙂🙂 at 3", "a<|x|>  b"]:
        ids = tokenizer.encode(text).tolist()
        whole, num_splits = tokenizer.decode(ids), 0
        for n in range(len(ids) + 1):
            before = tokenizer.decode(ids[:n])
            if whole.startswith(before):  # else in the middle of a character
                assert before + tokenizer.decode_after(ids[:n], ids[n:]) == whole
                num_splits += 1
        assert num_splits > 6 and tokenizer.decode_after([], []) == tokenizer.decode_after(ids, []) == ""


def test_what_follows_no_text_is_the_beginning_of_one(saved):
    tokenizer = saved(sentencepiece.llama_style())
    bos, ids = tokenizer.bos_id, tokenizer.encode("the station")
    assert tokenizer.decode_after([bos], ids) == tokenizer.decode_after([], ids) == "the station"
    assert tokenizer.decode_after([bos, *ids], ids) == tokenizer.decode_after(ids, [bos, *ids]) == " the station"


def test_part_of_a_character_before_spoils_no_byte_behind_it(saved):
    """The library makes every byte of a run U+FFFD where one is: a prompt truncated in mid-character is no such run."""
    tokenizer = saved(sentencepiece.llama_style())
    letter = [tokenizer._tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in "漢".encode()]
    assert tokenizer.decode_after(letter[:1], letter) == "漢" and tokenizer.decode([letter[0], *letter]) == "\ufffd" * 4
    assert tokenizer.decode_after(letter[:1], letter[1:]) == "\ufffd" * 2


def test_fingerprint_tells_files_apart(saved):
    assert saved(byte_level(["<s>"])).fingerprint != saved(byte_level(["</s>"])).fingerprint


def test_real_tokenizer(real_data):
    tokenizer = load_tokenizer(real_data("tokenizer/gpt_neox_olmo_tokenizer.json"))
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, 50279, 50280)
    with open(real_data("text/tinyshakespeare.txt"), encoding="utf-8") as file:
        text = file.read(200_000)
    ids = tokenizer.encode(text + "    two    four\n")
    assert tokenizer.decode(ids) == text + "    two    four\n"
    assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + len("    two    four\n")


def test_unusable_files_are_one_line(tmp_path):
    (tmp_path / "corrupt.json").write_text(json.dumps({"model": 1}))
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe")
    for path, problem in [
        ("/nowhere/tokenizer.json", "no such file"),
        ("byte", "no such file"),
        (str(tmp_path), "no such file"),
        (str(tmp_path / "corrupt.json"), "not a readable tokenizer.json"),
        (str(tmp_path / "binary.json"), "not a readable tokenizer.json"),
    ]:
        with pytest.raises(UserError) as caught:
            load_tokenizer(path)
        message = str(caught.value)
        assert message.startswith(f"data.tokenizer={path}: {problem}") and "\n" not in message


def test_special_tokens_written_in_a_text_count_on_request(saved):
    tokenizer = saved(byte_level(["<|endoftext|>", "<|im_end|>"]))
    text = "a<|im_end|> b<|endoftext|>"
    ids = tokenizer.encode(text, special_tokens=True).tolist()
    a, b = (tokenizer.encode(part).tolist() for part in ("a", " b"))
    assert ids == [*a, 1, *b, 0] and not {0, 1} & set(tokenizer.encode(text).tolist())
    np.testing.assert_array_equal(ByteTokenizer().encode("<s>", special_tokens=True), list(b"<s>"))


@pytest.mark.parametrize("special_tokens", [False, True])
@pytest.mark.parametrize("make", [sentencepiece.llama_style, sentencepiece.unigram_style, byte_level, None])
def test_offsets_are_the_characters_of_each_id(saved, make, special_tokens):
    tokenizer = saved(make(["<s>"]) if make is byte_level else make()) if make else ByteTokenizer()
    for text in [*TEXTS[:2], "the café <s>🙂 is 漢字", ""]:
        ids, offsets = tokenizer.encode_with_offsets(text, special_tokens)
        np.testing.assert_array_equal(ids, tokenizer.encode(text, special_tokens))
        assert offsets.shape == (len(ids), 2) and offsets.dtype == np.int64 and ids.dtype == np.int32
        assert np.all(np.diff(offsets[:, 0]) >= 0) and np.all((0 <= offsets) & (offsets <= len(text)))
        covered = {i for first, end in offsets for i in range(first, end)}
        assert {i for i, character in enumerate(text) if not character.isspace()} <= covered
        if special_tokens and "<s>" in text and make:
            (at,) = np.flatnonzero(ids == tokenizer.special_id("<s>"))
            assert text[slice(*offsets[at])] == "<s>"


# ---------------------------------------------------------------------------------------------------------------
# SentencePiece


def model_file(folder, **options):
    """The path of a SentencePiece model, trained here."""
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    numbers = {"vocab_size": 340, "byte_fallback": True, "remove_extra_whitespaces": False}
    numbers |= {"normalization_rule_name": "identity", "minloglevel": 2, "hard_vocab_limit": False, **options}
    lines = [line for text in [*sentencepiece.TEXTS, *TEXTS] for line in text.splitlines()]
    trainer.train(sentence_iterator=iter(lines * 5), model_prefix=str(folder / "tokenizer"), **numbers)
    return folder / "tokenizer.model"


PIECES = [{"model_type": "bpe"}, {"model_type": "unigram"}, {"model_type": "bpe", "add_dummy_prefix": False}]


@pytest.mark.parametrize("options", PIECES, ids=["bpe", "unigram", "no prefix"])
def test_a_sentencepiece_model_encodes_and_decodes_as_its_package_does(tmp_path, options):
    path = model_file(tmp_path, user_defined_symbols=["<|im_end|>"], control_symbols=["<ctl>"], **options)
    oracle = pytest.importorskip("sentencepiece").SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(str(tmp_path))  # the folder
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, oracle.vocab_size())
    for text in [*TEXTS, *sentencepiece.TEXTS, "  Bob 漢字 🙂🙂 at 3", "a<|im_end|>  b <ctl><s>", "", " "]:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int32 and ids.tolist() == oracle.encode(text)
        np.testing.assert_array_equal(tokenizer.encode_batch([text, "a"])[0], ids)
        assert tokenizer.decode([1, *ids, 2, 10**6]) == oracle.decode(ids.tolist()) == text
        extra = int(options.get("add_dummy_prefix", True) and text != "")
        assert tokenizer.token_bytes[ids].sum() == len(text.encode()) + extra
        offsets = tokenizer.encode_with_offsets(text)[1]
        assert "".join(text[a:b] for a, b in dict.fromkeys(map(tuple, offsets.tolist()))) == text
    assert tokenizer.special_id("<ctl>") == 3 and tokenizer.special_id("<|im_end|>") is None
    assert tokenizer.token_bytes[[0, 1, 2, 3]].sum() == 0
    assert tokenizer.fingerprint != load_tokenizer("bytes").fingerprint


@pytest.mark.parametrize("options", PIECES, ids=["bpe", "unigram", "no prefix"])
def test_sentencepiece_texts_in_two_parts_and_special_tokens(tmp_path, options):
    tokenizer = load_tokenizer(str(model_file(tmp_path, control_symbols=["<ctl>"], **options)))
    for text in [*sentencepiece.TEXTS, "  Bob 漢字 🙂🙂 at 3"]:
        ids = tokenizer.encode(text).tolist()
        for n in range(len(ids) + 1):
            before = tokenizer.decode(ids[:n])
            if "\ufffd" not in before and "\ufffd" not in tokenizer.decode_after(ids[:n], ids[n:]):
                assert before + tokenizer.decode_after(ids[:n], ids[n:]) == text
    text = "the café<ctl>is open</s><s> 漢 Bob"
    ids, offsets = tokenizer.encode_with_offsets(text, special_tokens=True)
    parts = [tokenizer.encode("the café").tolist(), 3, None, 2, 1, None]
    assert ids.tolist()[: len(parts[0]) + 1] == [*parts[0], 3]
    assert [text[a:b] for (a, b), i in zip(offsets, ids, strict=True) if i in (1, 2, 3)] == ["<ctl>", "</s>", "<s>"]
    assert tokenizer.decode(ids) == text.replace("<ctl>", "").replace("</s>", "").replace("<s>", "")
    assert not {1, 2, 3} & set(tokenizer.encode(text).tolist())


def test_unusable_models_are_one_line(tmp_path):
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # of tiktoken, under the same name
    with pytest.raises(UserError, match="tokenizer.model: not a readable SentencePiece model .*; use a tokenizer.json"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_a_workdir_s_own_tokenizer_takes_the_place_of_one_that_is_gone(tmp_path, capsys, name):
    (tmp_path / "hf").mkdir()
    values = {"data": {"tokenizer": str(tmp_path / "gone" / "hf" / name)}}
    assert with_own_tokenizer(values, epath.Path(tmp_path)) == values
    (tmp_path / "hf" / name).write_text("{}")
    assert with_own_tokenizer(values, epath.Path(tmp_path))["data"]["tokenizer"] == str(tmp_path / "hf" / name)
    assert "is gone" in capsys.readouterr().err


def test_a_word_level_tokenizer_has_a_token_per_word(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps(word_level(["up", "down", "up"])))
    found = load_tokenizer(str(tmp_path))
    assert found.vocab_size == 5 and (found.bos_id, found.eos_id) == (1, 2)
    assert found.encode(" down up  up\nsideways").tolist() == [4, 3, 3, 0]
    assert found.decode([3, 4]) == "up down"
