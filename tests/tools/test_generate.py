"""Text that appears piece by piece, with the drafted tokens marked, in Python and as a command."""

import re

import pytest

import mtp_jax
from mtp_jax.config import UserError
from mtp_jax.language_model.streaming import stream
from mtp_jax.tools import generate

PROMPT = "the café is"


@pytest.fixture(scope="module")
def workdir(small_workdir):
    return small_workdir


@pytest.mark.parametrize("num_speculative_tokens", [None, 0])
def test_pieces_are_the_text_and_name_its_drafts(workdir, num_speculative_tokens):
    lm = mtp_jax.load(workdir)
    drafts = {"speculative": True} if num_speculative_tokens is None else {}
    whole = lm.generate(PROMPT, 60, **drafts)
    pieces = list(stream(lm, lm.prompt_ids(PROMPT)[0], 60, num_speculative_tokens=num_speculative_tokens))
    assert "".join(piece.text for piece in pieces) == whole.texts[0]
    assert "→" in whole.texts[0]  # three bytes, which several pieces may share
    assert sum(piece.num_tokens for piece in pieces) == len(whole.tokens[0])
    assert sum(piece.ends_step for piece in pieces) == whole.num_forward_passes
    drafted = sum(piece.num_tokens for piece in pieces if piece.is_drafted)
    assert drafted == len(whole.tokens[0]) - whole.num_forward_passes
    assert bool(drafted) == (num_speculative_tokens is None)


def test_the_command_prints_the_text_and_what_it_took(workdir, capsys):
    expected = mtp_jax.load(workdir).generate(PROMPT, 40, speculative=True)
    generate.main([f"--model={workdir}", PROMPT, "--max_new_tokens=40", "--mark=brackets"])
    out = capsys.readouterr().out
    text, _, last = out.rpartition("\n\n")
    assert text.startswith(PROMPT) and "[" in text
    assert text.replace("[", "").replace("]", "") == PROMPT + expected.texts[0]
    passes = expected.num_forward_passes
    assert re.match(rf"40 tokens in {passes} forward passes .*, {40 - passes} of them accepted drafts", last)
    with pytest.raises(UserError, match="num_speculative_tokens=-1: must be at least 0"):
        generate.main([f"--model={workdir}", PROMPT, "--num_speculative_tokens=-1"])
