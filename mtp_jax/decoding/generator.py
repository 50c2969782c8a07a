"""Plain and speculative generation from prompts; the latter needs fewer forward passes for the same text.

Shape letters: B rows, S slots, K drafts per speculative step.
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
from mtp_jax.errors import warn_once
from mtp_jax.model import Tree
from mtp_jax.mtp import kind_of

STEPS_PER_CALL = 64  # speculative steps per call, between checks on the host
STEPS_PER_CALL_WITH_ENDS = 16  # the same with `ends`, which is evaluated on the host


@dataclass(frozen=True)
class Generation:
    """Generated tokens and statistics.

    tokens: int32, tokens of each row without the prompt, including the stop token.
    num_speculative_steps: int[B], speculative steps per row, each a forward pass of the main model; prefill is not
      counted. For rows ended by `ends` it includes the steps until the next check, up to 16 more than needed.
    tested, accepted: int[B, K], number of drafts verified and accepted, by their index in the step.
    """

    tokens: list[np.ndarray]
    num_speculative_steps: np.ndarray
    tested: np.ndarray
    accepted: np.ndarray

    @property
    def rounds(self) -> np.ndarray:
        """Deprecated name of num_speculative_steps."""
        warn_once("Generation.rounds is now num_speculative_steps; the next release drops the old name")
        return self.num_speculative_steps

    @property
    def num_forward_passes(self) -> int:
        """Number of forward passes of the batch: that of the row with the most."""
        return int(self.num_speculative_steps.max(initial=0))

    @property
    def tokens_per_forward(self) -> float:
        """Generated tokens per forward pass, both summed over rows."""
        return sum(map(len, self.tokens)) / max(1, int(self.num_speculative_steps.sum()))

    @property
    def acceptance(self) -> list[float]:
        """Acceptance rate of each draft k, given that all before it were accepted; NaN if it was never verified."""
        tested, accepted = self.tested.sum(axis=0), self.accepted.sum(axis=0)
        return [float(a / t) if t else float("nan") for a, t in zip(accepted, tested, strict=True)]


class Generator:
    """Text generator of a model; holds a copy of the weights in the compute dtype, see `Network`."""

    def __init__(
        self,
        config: Config,
        params: Tree,
        biases: Tree,
        mesh: jax.sharding.Mesh,
        draft_vocabulary: np.ndarray | None = None,
    ):
        """Initializes the generator.

        Args:
          config: the model.
          params, biases: its weights.
          mesh: of the weights.
          draft_vocabulary: int[V'], increasing ids of the tokens that may be drafted; None: all. Texts do not depend
            on it, acceptance does.

        Raises:
          UserError: draft_vocabulary is not such a list of ids.
        """
        self.architecture = config.architecture
        self.context = config.data.sequence_length
        self.mesh = mesh
        with jax.set_mesh(mesh):
            ids = None if draft_vocabulary is None else _checked_ids(draft_vocabulary, config.model.vocab_size or 0)
            self.network = unstack(self.architecture, params, biases, ids)

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
        min_confidence: float | None = None,
    ) -> Generation:
        """Continues every prompt until `max_new_tokens`, the model's context length or a stop.

        Args:
          prompts: token ids, at least one each; lengths may differ.
          max_new_tokens: maximum number of generated tokens per row.
          sampler: see `make_sampler`.
          num_speculative_tokens: K, tokens drafted before each forward pass of the main model; 0 is plain decoding.
          seed: random seed. The samples of a row depend on its index in the batch, but not on the other rows.
          stop_tokens: ids that end a row.
          ends: (row index, tokens generated so far) -> number of tokens to keep if the row has ended, else None.
          min_confidence: as in `write`.

        Raises:
          UserError: prompts or numbers are invalid; see `start`.
        """
        state = self.start(prompts, max_new_tokens, num_speculative_tokens=num_speculative_tokens, seed=seed)
        starts = [len(p) for p in prompts]
        kept: dict[int, int] = {}
        while True:
            num_steps = STEPS_PER_CALL if ends is None else STEPS_PER_CALL_WITH_ENDS
            state = self.write(
                state, num_steps, sampler=sampler, stop_tokens=stop_tokens, min_confidence=min_confidence
            )
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
        num_rows = len(prompts)
        num_steps_B = np.minimum(counts.num_steps_B[:num_rows], [len(row) for row in rows])  # a step gives >= 1 token
        return Generation(rows, num_steps_B, counts.tested_BK[:num_rows], counts.accepted_BK[:num_rows])

    def start(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        *,
        num_speculative_tokens: int = 0,
        seed: int = 0,
    ) -> State:
        """Returns the state after prefill of the prompts.

        Raises:
          UserError: there is no prompt, a prompt is empty or fills the context, a token is outside the vocabulary,
            max_new_tokens < 1, or the model cannot draft this many tokens.
        """
        self.check(prompts, max_new_tokens, num_speculative_tokens, seed)
        with jax.set_mesh(self.mesh):
            num_more = -len(prompts) % sharding.num_shards("batch")  # padding rows, done from the start
            lengths = np.array([len(p) for p in prompts] + [1] * num_more, np.int32)
            limits = lengths + np.minimum(min(max_new_tokens, self.context), self.context - lengths)
            limits[len(prompts) :] = 1
            # Drafts beyond a row's limit have no slot; tokens beyond the limit are discarded in any case.
            tokens = np.zeros((len(lengths), bucket(int(limits.max()))), np.int32)
            for row, prompt in zip(tokens, prompts, strict=False):
                row[: len(prompt)] = prompt
            state = states.begin(
                self.architecture, num_speculative_tokens, self.network, tokens, lengths, limits, np.uint32(seed)
            )
            return states.prefill_all(self.architecture, self.network, state, int(lengths.max()) - 1)

    def write(
        self,
        state: State,
        num_steps: int,
        *,
        sampler: Sampler = GREEDY,
        stop_tokens: Sequence[int] = (),
        min_confidence: float | None = None,
    ) -> State:
        """Returns the state after at most `num_steps` further steps, fewer if all rows are done; donates `state`.

        Args:
          state: from `start`.
          num_steps: maximum number of steps.
          sampler, stop_tokens: as in `generate`.
          min_confidence: probability; each row verifies its drafts only while the product of their confidences, each
            the probability of the likeliest token, is at least this. None: all drafts are verified.

        Raises:
          UserError: min_confidence is no probability.
        """
        if min_confidence is not None and not 0 <= min_confidence <= 1:
            raise UserError(f"min_confidence={min_confidence}: must lie between 0 and 1")
        least = None if min_confidence is None else np.float32(min_confidence)
        stops = np.full(1 << max(0, len(stop_tokens) - 1).bit_length(), -1, np.int32)  # few sizes, so few programs
        stops[: len(stop_tokens)] = stop_tokens
        with jax.set_mesh(self.mesh):
            return states.generate(self.architecture, sampler, self.network, stops, state, np.int32(num_steps), least)

    def check(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        num_speculative_tokens: int,
        seed: int = 0,
    ) -> None:
        """Raises UserError if `start` does not accept the arguments."""
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
    """Raises UserError if `value` is not an integer from `least` to `most`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise UserError(f"{name}={value!r}: must be an integer")
    if value < least:
        raise UserError(f"{name}={value}: must be at least {least}")
    if most is not None and value > most:
        raise UserError(f"{name}={value}: must be at most {most}")


def check_drafts(architecture: Architecture, num_speculative_tokens: int) -> None:
    """Raises UserError if the model cannot draft `num_speculative_tokens` tokens."""
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


def _checked_ids(draft_vocabulary: np.ndarray, vocab: int) -> np.ndarray:
    """Returns the ids as int32. A repeated id would be drafted twice as often as its logit states."""
    ids = np.asarray(draft_vocabulary)
    if (
        ids.ndim != 1
        or not len(ids)
        or not np.issubdtype(ids.dtype, np.integer)
        or (np.diff(ids) <= 0).any()
        or not 0 <= ids[0] <= ids[-1] < vocab
    ):
        shown = np.array2string(ids, threshold=8, separator=", ").replace("\n", "")
        raise UserError(f"draft_vocabulary={shown}: must be increasing token ids from 0 to {vocab - 1}, at least one")
    return ids.astype(np.int32)


def _written(state: State, starts: Sequence[int]) -> tuple[list[np.ndarray], np.ndarray]:
    """Returns the generated tokens of each row, and which rows are done."""
    tokens, lengths, is_done = jax.device_get((state.tokens_BS, state.length_B, state.is_done_B))
    return [tokens[b, start : lengths[b]] for b, start in enumerate(starts)], np.array(is_done)
