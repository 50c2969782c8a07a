"""Plain and speculative generation from prompts; the latter needs fewer forward passes for the same text.

Shape letters: B rows, S slots, K drafts per speculative step.
"""

import collections
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

STEPS_PER_CALL = 256  # speculative steps per call, between checks on the host
STEPS_PER_CALL_WITH_ENDS = 16  # the same with `ends`, which is evaluated on the host
REFILLED = 4  # waiting prompts enter together, this part of a batch at a time


@dataclass(frozen=True)
class Generation:
    """Generated tokens and statistics.

    Attributes:
      tokens: int32, tokens of each row without the prompt, including the stop token.
      num_speculative_steps: int[B], speculative steps per row, each a forward pass of the main model; prefill is not
        counted. For rows ended by `ends` it includes the steps until the next check, up to 16 more than needed.
      tested: int[B, K], number of drafts verified, by their index in the step.
      accepted: int[B, K], number of drafts accepted.
      num_forward_passes: forward passes of the main model for all rows together; prefill is not counted.
    """

    tokens: list[np.ndarray]
    num_speculative_steps: np.ndarray
    tested: np.ndarray
    accepted: np.ndarray
    num_forward_passes: int

    @property
    def rounds(self) -> np.ndarray:
        """Deprecated name of num_speculative_steps."""
        warn_once("Generation.rounds is now num_speculative_steps; the next release drops the old name")
        return self.num_speculative_steps

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
        batch_size: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> Generation:
        """Continues every prompt until `max_new_tokens`, the model's context length or a stop.

        Texts of a batch end after different numbers of steps. If prompts are waiting, they replace the texts that are
        done as soon as a quarter of the batch is (continuous batching; Orca, OSDI 2022).

        Args:
          prompts: token ids, at least one each; lengths may differ.
          max_new_tokens: maximum number of generated tokens per row.
          sampler: see `make_sampler`.
          num_speculative_tokens: K, tokens drafted before each forward pass of the main model; 0 is plain decoding.
          seed: random seed. The samples of a row depend on the index of its prompt, but not on the other rows.
          stop_tokens: ids that end a row.
          ends: (row index, tokens generated so far) -> number of tokens to keep if the row has ended, else None.
          min_confidence: as in `write`.
          batch_size: number of prompts generated from at the same time; None: all.
          progress: called with the number of texts done since the last call.

        Raises:
          UserError: prompts or numbers are invalid; see `start`.
        """
        self.check(prompts, max_new_tokens, num_speculative_tokens, seed)
        first, *later = _groups(len(prompts), batch_size)
        waiting = collections.deque(later)

        def prefilled(group: range) -> State:
            return self._prefilled(prompts, group, max_new_tokens, num_speculative_tokens, seed)

        state, upcoming = prefilled(first), None
        num_padding = len(state.length_B) - len(first)
        active = {row: row for row in first}  # prompt by row
        rows: list[np.ndarray] = [np.zeros(0, np.int32)] * len(prompts)
        steps, tested, accepted = (
            np.zeros((len(prompts), *x.shape[1:]), np.int32) for x in jax.tree.leaves(state.counts)
        )
        while True:
            num_steps = STEPS_PER_CALL if ends is None else STEPS_PER_CALL_WITH_ENDS
            state = self.write(
                state,
                num_steps,
                sampler=sampler,
                stop_tokens=stop_tokens,
                min_confidence=min_confidence,
                num_done=num_padding + len(waiting[0]) if waiting else None,
            )
            if waiting and upcoming is None:
                upcoming = prefilled(waiting[0])  # by the device, while the host waits for the steps
            tokens, lengths, is_done, counts, num_passes = jax.device_get(
                (state.tokens_BS, state.length_B, state.is_done_B, state.counts, state.num_passes)
            )
            is_done, is_ended, num_active = np.array(is_done), False, len(active)
            for row, n in list(active.items()):
                text = tokens[row, len(prompts[n]) : lengths[row]]
                end = None if ends is None else ends(n, text)
                if end is None and not is_done[row]:
                    continue
                is_ended |= not is_done[row]
                is_done[row] = True
                del active[row]
                rows[n] = text if end is None else text[:end]
                steps[n] = min(counts.num_steps_B[row], len(rows[n]))  # a step gives at least one token
                tested[n], accepted[n] = counts.tested_BK[row], counts.accepted_BK[row]
            if progress is not None:
                progress(num_active - len(active))
            if not active and not waiting:
                return Generation(rows, steps, tested, accepted, int(num_passes))
            if is_ended:
                state = state._replace(is_done_B=jax.device_put(is_done, state.is_done_B.sharding))
            free = [row for row in first if row not in active]
            while waiting and len(free) >= len(waiting[0]):
                entering = waiting.popleft()
                more = prefilled(entering) if upcoming is None else upcoming
                state = self._replaced(state, more, free[: len(entering)])
                upcoming = None
                active |= dict(zip(free, entering, strict=False))
                free = free[len(entering) :]

    def compile(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        max_new_tokens: int,
        *,
        sampler: Sampler = GREEDY,
        num_speculative_tokens: int = 0,
        stop_tokens: Sequence[int] = (),
        min_confidence: float | None = None,
        batch_size: int | None = None,
    ) -> None:
        """Compiles the programs that `generate` runs with the same arguments, so that it can be timed.

        Raises:
          UserError: as `generate`.
        """
        self.check(prompts, max_new_tokens, num_speculative_tokens)
        first, *later = _groups(len(prompts), batch_size)
        state = self._prefilled(prompts, first, max_new_tokens, num_speculative_tokens, 0)
        for group in later:
            more = self._prefilled(prompts, group, max_new_tokens, num_speculative_tokens, 0)
            state = self._replaced(state, more, range(len(group)))
        self.write(state, 0, sampler=sampler, stop_tokens=stop_tokens, min_confidence=min_confidence)

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
        return self._prefilled(prompts, range(len(prompts)), max_new_tokens, num_speculative_tokens, seed)

    def _prefilled(
        self,
        prompts: Sequence[Sequence[int] | np.ndarray],
        group: range,
        max_new_tokens: int,
        num_speculative_tokens: int,
        seed: int,
    ) -> State:
        """Returns the state of a group of the prompts after prefill, with room for the longest text of all prompts.

        It has rows, done from the start, up to the next number that the mesh divides.
        """
        with jax.set_mesh(self.mesh):
            num_rows = len(group) + -len(group) % sharding.num_shards("batch")
        longest = min(self.context, max(map(len, prompts)) + max_new_tokens)
        # Drafts beyond a row's limit have no slot; tokens beyond the limit are discarded in any case.
        tokens = np.zeros((num_rows, bucket(longest)), np.int32)
        lengths, limits, index = np.ones(num_rows, np.int32), np.ones(num_rows, np.int32), np.zeros(num_rows, np.int32)
        for row, n in enumerate(group):
            length = len(prompts[n])
            tokens[row, :length], lengths[row], index[row] = prompts[n], length, n
            limits[row] = min(self.context, length + max_new_tokens)
        with jax.set_mesh(self.mesh):
            state = states.begin(
                self.architecture, num_speculative_tokens, self.network, tokens, lengths, limits, np.uint32(seed), index
            )
            return states.prefill_all(self.architecture, self.network, state, int(lengths.max()) - 1)

    def _replaced(self, state: State, more: State, rows: Sequence[int]) -> State:
        """Returns the state whose `rows` are replaced by the first rows of `more`; donates `state`."""
        replaced = np.full(len(more.length_B), len(state.length_B), np.int32)  # outside the batch: none
        replaced[: len(rows)] = rows
        with jax.set_mesh(self.mesh):
            return states.replace_rows(self.architecture, state, more, replaced)

    def write(
        self,
        state: State,
        num_steps: int,
        *,
        sampler: Sampler = GREEDY,
        stop_tokens: Sequence[int] = (),
        min_confidence: float | None = None,
        num_done: int | None = None,
    ) -> State:
        """Returns the state after at most `num_steps` further steps, until `num_done` rows are done; donates `state`.

        Args:
          state: from `start`.
          num_steps: maximum number of steps.
          sampler, stop_tokens: as in `generate`.
          min_confidence: probability; each row verifies its drafts only while the product of their confidences, each
            the probability of the likeliest token, is at least this. None: all drafts are verified.
          num_done: number of rows, padding included; None: all.

        Raises:
          UserError: min_confidence is no probability.
        """
        if min_confidence is not None and not 0 <= min_confidence <= 1:
            raise UserError(f"min_confidence={min_confidence}: must lie between 0 and 1")
        least = None if min_confidence is None else np.float32(min_confidence)
        stops = np.full(1 << max(0, len(stop_tokens) - 1).bit_length(), -1, np.int32)  # few sizes, so few programs
        stops[: len(stop_tokens)] = stop_tokens
        with jax.set_mesh(self.mesh):
            enough = np.int32(len(state.is_done_B) if num_done is None else num_done)
            return states.generate(
                self.architecture, sampler, self.network, stops, state, np.int32(num_steps), least, enough
            )

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


def _groups(num_prompts: int, batch_size: int | None) -> list[range]:
    """Returns the prompts that enter together: first a batch, then parts of it."""
    check_integer("batch_size", num_prompts if batch_size is None else batch_size, 1)
    num_rows = min(num_prompts, batch_size or num_prompts)
    part = -(-num_rows // REFILLED)
    later = [range(at, min(at + part, num_prompts)) for at in range(num_rows, num_prompts, part)]
    return [range(num_rows), *later]


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
