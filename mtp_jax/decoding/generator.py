"""From prompts to continuations, plain or self-speculated: the same text, in fewer forward passes.

Shape letters: B rows, S slots, K drafts a round.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Architecture, Config, UserError
from mtp_jax.decoding import generation as states
from mtp_jax.decoding.generation import State, bucket
from mtp_jax.decoding.inference_model import unstack
from mtp_jax.decoding.samplers import GREEDY, Sampler
from mtp_jax.model import Tree
from mtp_jax.mtp import kind_of

ROUNDS_A_CALL = 64  # between two looks at what was written
ROUNDS_A_CALL_WATCHED = 16  # the same where somebody looks for the end of the text


@dataclass(frozen=True)
class Generation:
    """What was written after each prompt.

    tokens: int32, without the prompt, the stop token included.
    rounds: int[B], forward passes of the main model that the row took, the prompt's own not counted. Where `ends` cut
      the row, those until that was seen, up to 16 more than needed.
    tested, accepted: int[B, K], drafts judged and kept, by their place in the round.
    """

    tokens: list[np.ndarray]
    rounds: np.ndarray
    tested: np.ndarray
    accepted: np.ndarray

    @property
    def num_forward_passes(self) -> int:
        """Of the batch: as many as its slowest row took."""
        return int(self.rounds.max(initial=0))

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of all rows by forward passes of all rows."""
        return sum(map(len, self.tokens)) / max(1, int(self.rounds.sum()))

    @property
    def acceptance(self) -> list[float]:
        """Of the k-th draft, how often it was kept where those before it were; NaN where none was judged."""
        tested, accepted = self.tested.sum(axis=0), self.accepted.sum(axis=0)
        return [float(a / t) if t else float("nan") for a, t in zip(accepted, tested, strict=True)]


class Generator:
    """A model ready to write. Its weights are a copy in the compute dtype; see `Network`."""

    def __init__(self, config: Config, params: Tree, biases: Tree, mesh: jax.sharding.Mesh):
        self.architecture = config.architecture
        self.context = config.data.sequence_length
        self.mesh = mesh
        with jax.set_mesh(mesh):
            self.network = unstack(self.architecture, params, biases)

    def generate(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        *,
        sampler: Sampler = GREEDY,
        num_speculative_tokens: int = 0,
        seed: int = 0,
        stop_tokens: Sequence[int] = (),
        ends: Callable[[int, np.ndarray], int | None] | None = None,
    ) -> Generation:
        """Continue every prompt until `max_new_tokens`, the model's context or a stop.

        Args:
          prompts: token ids, at least one each; lengths may differ.
          num_speculative_tokens: K tokens drafted before each forward pass of the main model; 0 is plain decoding.
          seed: of the draws. What a row draws depends on its place in the batch, not on the rows beside it.
          stop_tokens: ids that end a row.
          ends: given a row's number and what it has written so far, how many tokens of it to keep if it has come to
            its end.

        Raises:
          UserError: prompts or numbers that cannot be used; see `start`.
        """
        state = self.start(prompts, max_new_tokens, num_speculative_tokens=num_speculative_tokens, seed=seed)
        starts = [len(p) for p in prompts]
        kept: dict[int, int] = {}
        while True:
            rounds = ROUNDS_A_CALL if ends is None else ROUNDS_A_CALL_WATCHED
            state = self.write(state, rounds, sampler=sampler, stop_tokens=stop_tokens)
            rows, is_done = _written(state, starts)
            found = {} if ends is None else {b: ends(b, row) for b, row in enumerate(rows) if b not in kept}
            kept |= {b: end for b, end in found.items() if end is not None}
            is_done[list(kept)] = True
            if is_done.all():
                break
            if any(end is not None for end in found.values()):
                state = state._replace(is_done_B=jax.device_put(is_done, state.is_done_B.sharding))
        counts = jax.device_get(state.counts)
        rows = [row[: kept.get(b, len(row))] for b, row in enumerate(rows)]
        num_rounds = np.minimum(counts.rounds_B[: len(prompts)], [len(row) for row in rows])  # each writes a token
        return Generation(rows, num_rounds, counts.tested_BK[: len(prompts)], counts.accepted_BK[: len(prompts)])

    def start(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        *,
        num_speculative_tokens: int = 0,
        seed: int = 0,
    ) -> State:
        """The prompts, read.

        Raises:
          UserError: no prompt, an empty one, one that leaves no room in the context, a token outside the vocabulary,
            max_new_tokens < 1, or drafts that the model cannot make.
        """
        self.check(prompts, max_new_tokens, num_speculative_tokens, seed)
        with jax.set_mesh(self.mesh):
            num_more = -len(prompts) % sharding.num_shards("batch")  # rows of no interest, done from the start
            lengths = np.array([len(p) for p in prompts] + [1] * num_more, np.int32)
            limits = lengths + np.minimum(min(max_new_tokens, self.context), self.context - lengths)
            limits[len(prompts) :] = 1
            # Drafts beyond a row's limit find no slot: what they would have led to is not kept either.
            tokens = np.zeros((len(lengths), bucket(int(limits.max()))), np.int32)
            for row, prompt in zip(tokens, prompts, strict=False):
                row[: len(prompt)] = prompt
            state = states.begin(
                self.architecture, num_speculative_tokens, self.network, tokens, lengths, limits, np.uint32(seed)
            )
            return states.prefill_all(self.architecture, self.network, state, int(lengths.max()) - 1)

    def write(
        self, state: State, num_rounds: int, *, sampler: Sampler = GREEDY, stop_tokens: Sequence[int] = ()
    ) -> State:
        """The state after so many rounds more, or fewer where every row is done. The one given is used up."""
        stops = np.full(1 << max(0, len(stop_tokens) - 1).bit_length(), -1, np.int32)  # few sizes: few programs
        stops[: len(stop_tokens)] = stop_tokens
        with jax.set_mesh(self.mesh):
            return states.generate(self.architecture, sampler, self.network, stops, state, np.int32(num_rounds))

    def check(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        num_speculative_tokens: int,
        seed: int = 0,
    ) -> None:
        """Raises UserError where `start` cannot use these."""
        if not len(prompts):
            raise UserError("prompts: there are none; give at least one")
        check_integer("max_new_tokens", max_new_tokens, 1)
        check_integer("seed", seed, 0, 2**32 - 1)
        check_drafts(self.architecture, num_speculative_tokens)
        vocab = self.architecture.model.vocab_size or 0
        for b, prompt in enumerate(prompts):
            ids = np.asarray(prompt)
            if not len(ids):
                raise UserError(f"prompt {b}: is empty; give it at least one token")
            if len(ids) >= self.context:
                raise UserError(
                    f"prompt {b}: has {len(ids)} tokens and the model's context holds {self.context}; shorten it to at "
                    f"most {self.context - 1}"
                )
            bad = ids[(ids < 0) | (ids >= vocab)]
            if len(bad):
                raise UserError(f"prompt {b}: token {int(bad[0])} is outside the vocabulary of {vocab}")


def check_integer(name: str, value: object, least: int, most: int | None = None) -> None:
    """Raises UserError where `value` is no integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name}={value!r}: must be an integer")
    if value < least:
        raise UserError(f"{name}={value}: must be at least {least}")
    if most is not None and value > most:
        raise UserError(f"{name}={value}: must be at most {most}")


def check_drafts(architecture: Architecture, num_speculative_tokens: int) -> None:
    """Raises UserError where the model cannot draft so many tokens."""
    check_integer("num_speculative_tokens", num_speculative_tokens, 0)
    kind = kind_of(architecture)
    if num_speculative_tokens and kind.max_drafts == 0:
        raise UserError(
            "speculative decoding: the model has no multi-token prediction to draft with "
            f"(mtp.kind={kind.name}); it can only be decoded plainly"
        )
    if kind.max_drafts is not None and num_speculative_tokens > kind.max_drafts:
        raise UserError(
            f"num_speculative_tokens={num_speculative_tokens}: the model has {kind.depth} {kind.name} heads, which "
            f"draft one token each; use at most {kind.max_drafts}"
        )


def _written(state: State, starts: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """What each row has written so far, and which rows are done."""
    tokens, lengths, is_done = jax.device_get((state.tokens_BS, state.length_B, state.is_done_B))
    return [tokens[b, start : lengths[b]] for b, start in enumerate(starts)], np.array(is_done)
