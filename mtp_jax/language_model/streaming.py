"""Generation of one text piece by piece, which tells drafted tokens from those of the main model."""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np

from mtp_jax.decoding.generator import check_drafts
from mtp_jax.decoding.samplers import make_sampler
from mtp_jax.language_model.model import LanguageModel
from mtp_jax.mtp import kind_of

INCOMPLETE = "\ufffd"  # the end of a text whose last character has more bytes to come


class Piece(NamedTuple):
    """Part of a text.

    Attributes:
      text: what its tokens add to the text.
      is_drafted: whether they were accepted drafts, which took no forward pass of their own.
      num_tokens: number of tokens.
      ends_step: whether it is the last piece of a forward pass.
    """

    text: str
    is_drafted: bool
    num_tokens: int
    ends_step: bool


def stream(
    model: LanguageModel,
    prompt: np.ndarray,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    num_speculative_tokens: int | None = None,
    seed: int = 0,
) -> Iterator[Piece]:
    """Yields the pieces of the text after a prompt, as they are generated: those of `LanguageModel.generate`.

    Args:
      model: the model.
      prompt: int[N], token ids.
      max_new_tokens, temperature, top_k, top_p, seed: as in `LanguageModel.generate`.
      num_speculative_tokens: drafts per forward pass, 0 for none; None: the trained depth.

    Raises:
      UserError: as `LanguageModel.generate`.
    """
    sampler, tokenizer = make_sampler(temperature, top_k, top_p), model.needs_tokenizer()
    kind = kind_of(model.config)
    drafts = num_speculative_tokens
    if drafts is None:
        drafts = 0 if kind.max_drafts == 0 else kind.depth
    check_drafts(model.config.architecture, drafts)
    state = model.decoder.start([prompt], max_new_tokens, num_speculative_tokens=drafts, seed=seed)
    ids, shown = prompt, ""
    is_done = False
    while not is_done:
        state = model.decoder.write(state, 1, sampler=sampler, stop_tokens=model.end_tokens)
        tokens_S, length, is_done = jax.device_get((state.tokens_BS[0], state.length_B[0], state.is_done_B[0]))
        new = tokens_S[len(ids) : length]
        # The last token of a step is the main model's; those before it are accepted drafts.
        for part, is_drafted in ((new[:-1], True), (new[-1:], False)):
            if not len(part):
                continue
            ids = np.concatenate([ids, part])
            visible = ids[:-1] if is_done and ids[-1] in model.end_tokens else ids
            text = tokenizer.decode_after(prompt, visible[len(prompt) :])
            if not is_done or is_drafted:
                text = text.rstrip(INCOMPLETE)
            yield Piece(text[len(shown) :], is_drafted, len(part), not is_drafted)
            shown = text
