"""Number of tokens to draft, from measured acceptance and the measured costs of drafting and verifying on this machine.

Shape letters: B rows, T tokens verified, K drafts, W window.
"""

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax.config import Architecture
from mtp_jax.decoding import drafting
from mtp_jax.decoding.generation import State
from mtp_jax.decoding.generator import Generator
from mtp_jax.decoding.inference_model import Network, run_main
from mtp_jax.decoding.samplers import GREEDY, Sampler
from mtp_jax.layers.cache import slots_at
from mtp_jax.losses import expected_tokens_per_pass
from mtp_jax.mtp import Text, kind_of

ITERATIONS = 32
REPEATS = 5
BEYOND_DEPTH = 2  # drafts beyond the trained depths that are considered, where the kind has no limit
TRIAL_TOKENS = 48  # new tokens per row from which `choose` measures acceptance


@dataclass(frozen=True)
class Cost:
    """Milliseconds of one speculative step at a batch size: K drafts, their verification, and a plain step."""

    batch_size: int
    num_speculative_tokens: int
    draft_ms: float
    verify_ms: float
    plain_ms: float


@dataclass(frozen=True)
class Advice:
    """The number of drafts with the largest speed-up at a batch size; 0 where plain decoding is fastest."""

    batch_size: int
    num_speculative_tokens: int
    speed_up: float


def speed_up(acceptance: Sequence[float], cost: Cost) -> float:
    """Returns the speed-up over plain decoding: expected tokens per speculative step, divided by its relative cost."""
    rates = [0.0 if math.isnan(a) else a for a in acceptance[: cost.num_speculative_tokens]]
    return expected_tokens_per_pass(rates) * cost.plain_ms / (cost.draft_ms + cost.verify_ms)


def advise(acceptance: Sequence[float], costs: Sequence[Cost]) -> list[Advice]:
    """Returns the best number of drafts for each batch size, smallest batch first."""
    best: dict[int, Advice] = {}
    for cost in sorted(costs, key=lambda c: (c.batch_size, c.num_speculative_tokens)):
        known = best.setdefault(cost.batch_size, Advice(cost.batch_size, 0, 1.0))
        gain = speed_up(acceptance, cost)
        if gain > known.speed_up:
            best[cost.batch_size] = Advice(cost.batch_size, cost.num_speculative_tokens, gain)
    return list(best.values())


def stops_paying(advice: Sequence[Advice]) -> int | None:
    """Returns the smallest batch size from which on plain decoding is fastest; None if none was measured."""
    end = None
    for a in sorted(advice, key=lambda a: -a.batch_size):
        if a.num_speculative_tokens:
            break
        end = a.batch_size
    return end


def most_drafts(architecture: Architecture) -> int:
    """Returns the largest number of drafts that is considered."""
    kind = kind_of(architecture)
    return kind.depth + BEYOND_DEPTH if kind.max_drafts is None else kind.max_drafts


def choose(decoder: Generator, prompts: Sequence[np.ndarray], sampler: Sampler = GREEDY) -> Advice:
    """Returns the best number of drafts for a batch like `prompts`: measures acceptance on them, and the costs.

    Compiles programs for every number of drafts, which takes far longer than a short text.

    Raises:
      UserError: as `Generator.generate`; a model that cannot draft.
    """
    most = most_drafts(decoder.architecture)
    trial = decoder.generate(prompts, TRIAL_TOKENS, sampler=sampler, num_speculative_tokens=max(1, most))
    (advice,) = advise(trial.acceptance, measure_costs(decoder, [len(prompts)], most, prompts[0]))
    return advice


def measure_costs(decoder: Generator, batch_sizes: Sequence[int], max_drafts: int, prompt: np.ndarray) -> list[Cost]:
    """Measures the parts of a speculative step after `prompt` in every row, the fastest of a few repeats."""
    costs = []
    for rows in batch_sizes:
        state = decoder.start([prompt] * rows, 1 + max_drafts, num_speculative_tokens=max_drafts)
        with jax.set_mesh(decoder.mesh):
            verify = [_time(_verify, decoder, state, t) for t in range(1, max_drafts + 2)]
        for drafts in range(1, max_drafts + 1):
            state = decoder.start([prompt] * rows, 1 + max_drafts, num_speculative_tokens=drafts)
            with jax.set_mesh(decoder.mesh):
                cost = _time(_draft, decoder, state, drafts)
            costs.append(Cost(rows, drafts, cost, verify[drafts], verify[0]))
    return costs


def _time(
    run: Callable[[Architecture, int, Network, State], jax.Array], decoder: Generator, state: State, num: int
) -> float:
    """Returns the milliseconds of one iteration."""
    best = math.inf
    jax.block_until_ready(run(decoder.architecture, num, decoder.network, state))
    for _ in range(REPEATS):
        started = time.monotonic()
        jax.block_until_ready(run(decoder.architecture, num, decoder.network, state))
        best = min(best, time.monotonic() - started)
    return best / ITERATIONS * 1e3


@functools.partial(jax.jit, static_argnums=(0, 1))
def _verify(architecture: Architecture, num_tokens: int, network: Network, state: State) -> jax.Array:
    """Runs the main model on `num_tokens` per row, repeatedly."""
    slots = slots_at(state.length_B[:, None] - 1 + jnp.arange(num_tokens), state.tokens_BS.shape[1])

    def one(_, carry):
        tokens_BT, caches = carry
        main, caches = run_main(network, tokens_BT, slots, caches)
        logits_BTV = network.logits(network.final_norm(main.hidden))
        return jnp.argmax(logits_BTV, axis=-1).astype(jnp.int32), caches

    rows = len(state.length_B)  # different tokens in each row, which select different experts
    tokens_BT = jnp.arange(rows * num_tokens, dtype=jnp.int32).reshape(rows, num_tokens) % network.vocab_size
    start = tokens_BT, state.caches
    return jax.lax.fori_loop(0, ITERATIONS, one, start)[0]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _draft(architecture: Architecture, num_speculative_tokens: int, network: Network, state: State) -> jax.Array:
    """Runs the depths on one window, repeatedly."""
    keys = jnp.broadcast_to(state.keys_B[:, None], (len(state.keys_B), num_speculative_tokens))

    def one(_, carry):
        tokens_BS, caches = carry
        text = Text(tokens_BS, state.length_B - 1, state.recent_BWD)
        drafts = drafting.draft(architecture, network, GREEDY, num_speculative_tokens, text, caches, keys)
        # Each draft depends on the previous one, so that no iteration can be optimised away.
        return tokens_BS.at[:, 0].set(drafts.tokens_BK[:, -1]), drafts.caches

    return jax.lax.fori_loop(0, ITERATIONS, one, (state.tokens_BS, state.mtp_caches))[0]


def text(acceptance: Sequence[float], costs: Sequence[Cost], advice: Sequence[Advice]) -> str:
    """Returns a row per batch size: milliseconds of a plain step, the speed-up of each number of drafts, the best."""
    lengths = sorted({c.num_speculative_tokens for c in costs})
    rates = ", ".join("-" if math.isnan(a) else f"{a:.0%}" for a in acceptance)
    head = f"{'batch':<7}{'plain ms':>10}" + "".join(f"{f'K={k}':>9}" for k in lengths) + f"{'best':>7}"
    lines = [f"speed-up to expect by draft length K (acceptance {rates})", head]
    for a in advice:
        own = {c.num_speculative_tokens: c for c in costs if c.batch_size == a.batch_size}
        plain = next(iter(own.values())).plain_ms
        gains = "".join(f"{speed_up(acceptance, own[k]):>8.2f}x" for k in lengths)
        lines.append(f"{a.batch_size:<7}{plain:>10.3f}{gains}{a.num_speculative_tokens or 'plain':>7}")
    end = stops_paying(advice)
    largest = max(a.batch_size for a in advice)
    if end is not None:
        lines.append(f"from batch size {end} on speculation does not pay")
    elif all(a.num_speculative_tokens for a in advice):
        lines.append(f"speculation pays at every batch size up to {largest}")
    else:
        lines.append(f"speculation pays at batch size {largest}, but not at all below")
    return "\n".join(lines)
