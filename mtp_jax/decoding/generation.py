"""State of a batch of texts during generation, and the programs that advance it: prefill and speculative steps.

Plain decoding is a speculative step without drafts. The shapes of all arrays are constant during generation.

Shape letters: B rows, S slots (for the longest text), T tokens run at once, W window of the drafting depths,
D model, K drafts per step, N extra depths.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Architecture
from mtp_jax.decoding.drafting import draft, window_size
from mtp_jax.decoding.inference_model import Network, empty_caches, placed, run_main
from mtp_jax.decoding.samplers import Sampler
from mtp_jax.decoding.verify import Verdict, verify
from mtp_jax.layers.cache import slots_at
from mtp_jax.mtp import Caches, Text, kind_of
from mtp_jax.sharding import MAX_PROGRAMS_AHEAD, constrain
from mtp_jax.typing import Cache

PROMPT_CHUNK = 512  # maximum number of prompt tokens run at once


class Counts(NamedTuple):
    """Counts since the prompt, int32.

    num_steps_B: speculative steps, each a forward pass of the main model. tested_BK: number of times that draft k was
    verified, which requires all drafts before it to be accepted. accepted_BK: number of times that it was accepted.
    """

    num_steps_B: jax.Array
    tested_BK: jax.Array
    accepted_BK: jax.Array


class State(NamedTuple):
    """State of the generation of a batch, a pytree.

    tokens_BS: int32, tokens of the text, prompt included; 0 from length_B on. length_B: int32, number of tokens.
    limit_B: int32, maximum length of a row. is_done_B: bool, whether the row has reached it or a stop token.
    keys_B: random keys, one per row, so that samples do not depend on the other rows.
    recent_BWD: `Kind.draft_hidden` at the last W positions that the main model has read, from length - 1 - W on.
    caches, mtp_caches: entries of positions 0 .. length - 2.
    counts: statistics of speculative decoding.
    num_passes: int32, speculative steps of the batch, including those in which some rows were done.
    """

    tokens_BS: jax.Array
    length_B: jax.Array
    limit_B: jax.Array
    is_done_B: jax.Array
    keys_B: jax.Array
    recent_BWD: jax.Array
    caches: list[Cache]
    mtp_caches: Caches
    counts: Counts
    num_passes: jax.Array

    @property
    def num_speculative_tokens(self) -> int:
        """K."""
        return self.counts.tested_BK.shape[1]


@functools.partial(jax.jit, static_argnums=(0, 1))
def begin(
    architecture: Architecture,
    num_speculative_tokens: int,
    network: Network,
    tokens_BS: jax.Array,
    length_B: jax.Array,
    limit_B: jax.Array,
    seed: jax.typing.ArrayLike,
    index_B: jax.Array,
) -> State:
    """Returns the state of a batch of prompts, before prefill.

    Args:
      index_B: int, index of each prompt, of which its random samples are a function.
    """
    num_rows, num_slots = tokens_BS.shape
    model = architecture.model
    caches, mtp_caches = empty_caches(architecture, network, num_speculative_tokens, num_rows, num_slots)
    recent_BWD = jnp.zeros((num_rows, window_size(num_speculative_tokens), model.embed_dim), model.compute_dtype)
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, jax.random.key(seed)))(index_B)
    zero_BK = jnp.zeros((num_rows, num_speculative_tokens), jnp.int32)
    return State(
        tokens_BS=tokens_BS,
        length_B=length_B,
        limit_B=limit_B,
        is_done_B=length_B >= limit_B,
        keys_B=keys_B,
        recent_BWD=constrain(recent_BWD, "batch", None, None),
        caches=caches,
        mtp_caches=mtp_caches,
        counts=Counts(jnp.zeros(num_rows, jnp.int32), zero_BK, zero_BK),
        num_passes=jnp.zeros((), jnp.int32),
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnames="state")
def prefill(
    architecture: Architecture, num_tokens: int, num_visible: int, network: Network, state: State, start: jax.Array
) -> State:
    """Runs the positions start .. start + num_tokens - 1 of every prompt, except the last token of each prompt.

    The last token is run by the first speculative step. Positions beyond a prompt are computed but write no entry.

    Args:
      num_visible: number of slots that may hold an entry afterwards; at least start + num_tokens.
    """
    num_rows, num_slots = state.tokens_BS.shape
    index_T = start + jnp.arange(num_tokens)
    slots = slots_at(jnp.broadcast_to(index_T, (num_rows, num_tokens)), num_visible, state.length_B - 1)

    def tokens_at(ahead: int) -> jax.Array:
        return jnp.take(state.tokens_BS, jnp.minimum(index_T + ahead, num_slots - 1), axis=1)

    main, caches = run_main(network, tokens_at(0), slots, state.caches)
    if not state.num_speculative_tokens:
        return state._replace(caches=caches)
    kind = kind_of(architecture)
    hidden_BTD = kind.draft_hidden(main)
    depths = min(state.num_speculative_tokens, kind.depth)
    ahead_NBT = jnp.stack([tokens_at(k + 1) for k in range(depths)])
    mtp_caches = kind.read_prompt(network.mtp, main, hidden_BTD, ahead_NBT, slots, state.mtp_caches)
    num_new_B = jnp.clip(state.length_B - 1 - start, 0, num_tokens)
    recent_BWD = _moved(state.recent_BWD, hidden_BTD, num_new_B)
    return state._replace(caches=caches, mtp_caches=mtp_caches, recent_BWD=recent_BWD)


def prefill_all(architecture: Architecture, network: Network, state: State, num_tokens: int) -> State:
    """Runs the first `num_tokens` positions of every prompt in chunks of few different sizes; donates `state`."""
    if not num_tokens:
        return state
    chunk = min(PROMPT_CHUNK, max(16, 1 << (num_tokens - 1).bit_length()))
    for at in range(0, num_tokens, chunk):
        visible = min(bucket(at + chunk), state.tokens_BS.shape[1])
        state = prefill(architecture, chunk, visible, network, state, np.int32(at))
        if at // chunk % MAX_PROGRAMS_AHEAD == MAX_PROGRAMS_AHEAD - 1:
            jax.block_until_ready(state)
    return state


def bucket(length: int) -> int:
    """Returns a size of at least `length`, out of few different ones.

    The sizes are multiples of 128 and of a quarter of the next power of two.
    """
    step = max(128, (1 << (length - 1).bit_length()) // 4)
    return -(-length // step) * step


@functools.partial(jax.jit, static_argnums=0, donate_argnames="state")
def generate(
    architecture: Architecture,
    sampler: Sampler,
    network: Network,
    stop_tokens: jax.Array,
    state: State,
    num_steps: jax.Array,
    min_confidence: jax.Array | None = None,
    num_done: jax.Array | None = None,
) -> State:
    """Runs at most `num_steps` speculative steps, until `num_done` rows are done; donates `state`.

    Args:
      stop_tokens: int[N]; a row ends with the first of these tokens.
      min_confidence: float32; drafts are verified while the product of their confidences is at least this. None: all.
      num_done: int32; None: all rows.
    """
    enough = len(state.is_done_B) if num_done is None else num_done
    network = network.for_drafts(state.num_speculative_tokens)

    def is_going(carry):
        step, state = carry
        return (step < num_steps) & (state.is_done_B.sum() < enough)

    def one(carry):
        step, state = carry
        return step + 1, _step(architecture, sampler, network, stop_tokens, state, min_confidence)

    num_passes, state = jax.lax.while_loop(is_going, one, (jnp.zeros((), jnp.int32), state))
    return _sharded(architecture, state._replace(num_passes=state.num_passes + num_passes))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def replace_rows(architecture: Architecture, state: State, more: State, rows_R: jax.Array) -> State:
    """Returns the state with rows replaced by those of another one; donates `state`.

    Args:
      more: R rows after prefill, for texts of the same maximum length and the same number of drafts.
      rows_R: int[R], rows to be replaced; those outside the batch replace none.
    """

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[rows_R].set(new, mode="drop")

    def put_stacked(old: jax.Array, new: jax.Array) -> jax.Array:
        return old.at[:, rows_R].set(new, mode="drop")

    put_mtp = put_stacked if kind_of(architecture).stacks_caches else put
    found = {"num_passes": state.num_passes, "mtp_caches": jax.tree.map(put_mtp, state.mtp_caches, more.mtp_caches)}
    names = [name for name in State._fields if name not in found]
    found |= {name: jax.tree.map(put, getattr(state, name), getattr(more, name)) for name in names}
    return _sharded(architecture, State(**found))


def _sharded(architecture: Architecture, state: State) -> State:
    """Returns the state, whose arrays for the host are replicated and the others sharded as the next call expects."""
    return state._replace(
        recent_BWD=constrain(state.recent_BWD, "batch", None, None),
        caches=placed(state.caches),
        mtp_caches=placed(state.mtp_caches, kind_of(architecture).stacks_caches),
        tokens_BS=constrain(state.tokens_BS, None, None),
        length_B=constrain(state.length_B, None),
        is_done_B=constrain(state.is_done_B, None),
        num_passes=constrain(state.num_passes),
        counts=jax.tree.map(lambda x: constrain(x, *(None for _ in x.shape)), state.counts),
    )


def _step(
    architecture: Architecture,
    sampler: Sampler,
    network: Network,
    stop_tokens: jax.Array,
    state: State,
    min_confidence: jax.Array | None,
) -> State:
    """One speculative step: draft, verify in one forward pass of the main model, append accepted drafts and a token."""
    num_speculative_tokens, last_B = state.num_speculative_tokens, state.length_B - 1
    keys_BK = _step_keys(state, num_speculative_tokens)
    drafts_BK, draft_logits_BKV, num_drafts_B = jnp.zeros((len(last_B), 0), jnp.int32), None, None
    if num_speculative_tokens:
        text = Text(state.tokens_BS, last_B, state.recent_BWD)
        drafts = draft(architecture, network, sampler, num_speculative_tokens, text, state.mtp_caches, keys_BK[:, 1:])
        drafts_BK, draft_logits_BKV = drafts.tokens_BK, drafts.logits_BKV
        state = state._replace(mtp_caches=drafts.caches)
        if min_confidence is not None:
            is_likely_BK = jnp.cumprod(drafts.confidence_BK, axis=1) >= min_confidence
            num_drafts_B = is_likely_BK.sum(axis=1, dtype=jnp.int32)
    newest_B1 = jnp.take_along_axis(state.tokens_BS, last_B[:, None], axis=1)
    tokens_BT = jnp.concatenate([newest_B1, drafts_BK], axis=1)
    if num_drafts_B is None:
        read = _read(architecture, network, tokens_BT, state)
    else:
        # The forward pass is as wide as the row with the most drafts to verify, one program per width.
        widths = range(1, 2 + num_speculative_tokens)
        programs = [functools.partial(_read_first, architecture, network, width) for width in widths]
        most = jnp.where(state.is_done_B, 0, num_drafts_B).max()
        read = jax.lax.switch(most, programs, tokens_BT, state)
    verdict = verify(sampler, read.logits_BTV, drafts_BK, draft_logits_BKV, keys_BK[:, 0], num_drafts_B)
    state = _extended(state, drafts_BK, verdict, stop_tokens, num_drafts_B)
    if num_speculative_tokens:
        recent_BWD = _moved(state.recent_BWD, read.hidden_BTD, state.length_B - 1 - last_B)
        state = state._replace(recent_BWD=recent_BWD)
    return state._replace(caches=read.caches)


class _Read(NamedTuple):
    """Outputs of the main model for new tokens. hidden_BTD: `Kind.draft_hidden`. caches: with the new entries."""

    logits_BTV: jax.Array
    hidden_BTD: jax.Array
    caches: list[Cache]


def _read(architecture: Architecture, network: Network, tokens_BT: jax.Array, state: State) -> _Read:
    """Runs the newest token of each row and the drafts after it through the main model."""
    positions_BT = state.length_B[:, None] - 1 + jnp.arange(tokens_BT.shape[1])
    main, caches = run_main(network, tokens_BT, slots_at(positions_BT, state.tokens_BS.shape[1]), state.caches)
    logits_BTV = network.logits(network.final_norm(main.hidden))
    return _Read(logits_BTV, kind_of(architecture).draft_hidden(main), caches)


def _read_first(architecture: Architecture, network: Network, width: int, tokens_BT: jax.Array, state: State) -> _Read:
    """`_read` of the first `width` tokens of each row; the outputs of the others are 0."""
    read = _read(architecture, network, tokens_BT[:, :width], state)
    more = ((0, 0), (0, tokens_BT.shape[1] - width), (0, 0))
    return _Read(jnp.pad(read.logits_BTV, more), jnp.pad(read.hidden_BTD, more), read.caches)


def _extended(
    state: State, drafts_BK: jax.Array, verdict: Verdict, stop_tokens: jax.Array, num_drafts_B: jax.Array | None = None
) -> State:
    """Appends the accepted drafts and the token after them, truncated at the limit and after a stop token.

    Args:
      num_drafts_B: int32, number of drafts verified; None: all.
    """
    num_slots, num_speculative_tokens = state.tokens_BS.shape[1], state.num_speculative_tokens
    index_T = jnp.arange(1 + num_speculative_tokens)
    accepted_B1 = verdict.num_accepted_B[:, None]
    new_BT = jnp.where(index_T == accepted_B1, verdict.next_B[:, None], jnp.pad(drafts_BK, ((0, 0), (0, 1))))
    room_B = jnp.minimum(verdict.num_accepted_B + 1, state.limit_B - state.length_B)
    is_stop_BT = (new_BT[..., None] == stop_tokens).any(-1) & (index_T < room_B[:, None])
    stop_B = jnp.where(is_stop_BT.any(1), jnp.argmax(is_stop_BT, axis=1) + 1, room_B)
    num_B = jnp.where(state.is_done_B, 0, stop_B).astype(jnp.int32)
    slots_BT = jnp.where(index_T < num_B[:, None], state.length_B[:, None] + index_T, num_slots + index_T)
    tokens_BS = jax.vmap(lambda row, at, new: row.at[at].set(new, mode="drop", unique_indices=True))(
        state.tokens_BS, slots_BT, new_BT
    )
    length_B = state.length_B + num_B
    is_done_B = state.is_done_B | is_stop_BT.any(1) | (length_B >= state.limit_B)
    draft_K = jnp.arange(num_speculative_tokens)
    # Draft k was verified if all before it were accepted, and counts if the text was not truncated before it.
    tested_BK = (draft_K <= accepted_B1) & (draft_K < num_B[:, None])
    if num_drafts_B is not None:
        tested_BK &= draft_K < num_drafts_B[:, None]
    accepted_BK = tested_BK & (draft_K < accepted_B1)
    counts = Counts(
        state.counts.num_steps_B + ~state.is_done_B,
        state.counts.tested_BK + tested_BK,
        state.counts.accepted_BK + accepted_BK,
    )
    return state._replace(tokens_BS=tokens_BS, length_B=length_B, is_done_B=is_done_B, counts=counts)


def _step_keys(state: State, num_speculative_tokens: int) -> jax.Array:
    """Returns keys [B, 1 + K] for verification and each draft of a step; a function of the row's key and length."""

    def row(key, length):
        return jax.vmap(functools.partial(jax.random.fold_in, jax.random.fold_in(key, length)))(
            jnp.arange(1 + num_speculative_tokens)
        )

    return jax.vmap(row)(state.keys_B, state.length_B)


def _moved(recent_BWD: jax.Array, new_BTD: jax.Array, num_B: jax.Array) -> jax.Array:
    """Returns the window advanced by num_B of the new positions."""
    joined = jnp.concatenate([recent_BWD, new_BTD], axis=1)
    window = recent_BWD.shape[1]
    return jax.vmap(lambda row, n: jax.lax.dynamic_slice_in_dim(row, n, window))(joined, num_B)
