"""What the extra depths propose as the next tokens, given what the main model has read.

The chain is the one trained: depth k at position i reads the hidden state of depth k - 1 at i and the token at i + k,
and sees its own entries at 0 .. i. The entries that were made from drafts are made again each time, from the tokens
that were kept and the newest drafts: a window of the last positions runs through every depth.

Shape letters: B rows, W positions of the window, D model, K drafts, V vocabulary, S slots.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.config import Config, conventions
from mtp_jax.decoding.network import MainOutput, Network
from mtp_jax.decoding.samplers import Sampler, draw, filtered, is_greedy
from mtp_jax.layers.cache import Slots, slots_at
from mtp_jax.mtp import sequential


class Drafts(NamedTuple):
    """tokens_BK: int32. logits_BKV: float32, filtered: what they were drawn from. caches: of every depth used."""

    tokens_BK: jax.Array
    logits_BKV: jax.Array
    caches: Any


def num_depths(config: Config, num_drafts: int) -> int:
    """Depths with a cache of their own: drafts beyond the trained depth share the last one's."""
    return min(num_drafts, config.depth)


def window_size(num_drafts: int) -> int:
    """Positions run through the depths at each draft.

    A round keeps a <= K drafts and one token more, so K + 1 positions may be new. Depth k's entries before them were
    made from drafts that were kept, but for the last k <= K, which read the token after those.
    """
    return num_drafts + 1 if num_drafts else 0


def hidden_for_depths(config: Config, network: Network, main: MainOutput) -> jax.Array:
    """[B, T, D] of the main model that the depths start from: h_0 of sequential modules, z of parallel heads."""
    if config.mtp.kind == "parallel":
        return main.branch_BTD
    return sequential.first_hidden(conventions(config.mtp), main.hidden_BTD, network.final_norm)


def read_prompt(
    config: Config, network: Network, hidden_BTD: jax.Array, tokens_KBT: jax.Array, slots: Slots, caches: Any
) -> Any:
    """The depths' caches with the entries of a run of prompt tokens.

    Args:
      hidden_BTD: `hidden_for_depths` at the run's positions.
      tokens_KBT: for depth k = 1 .. the tokens at i + k.
    """
    if config.mtp.kind == "parallel":
        return _run_heads(network, len(tokens_KBT), hidden_BTD, slots, caches)[1]
    written = []
    onward_BTD = hidden_BTD
    for k, cache in enumerate(caches):
        module = _module(network, k)
        num_wanted = None if k + 1 < len(caches) else 1  # nobody reads what the last depth says of a prompt
        h_BTD, cache = module.decode(network.look_up(tokens_KBT[k]), onward_BTD, slots, cache, num_wanted)
        _, onward_BTD = _hand_on(config, network, module, h_BTD, hidden_BTD)
        written.append(cache)
    return written


def draft(
    config: Config,
    network: Network,
    sampler: Sampler,
    num_drafts: int,
    tokens_BS: jax.Array,
    last_B: jax.Array,
    recent_BWD: jax.Array,
    caches: Any,
    keys_BK: jax.Array,
) -> Drafts:
    """Propose the `num_drafts` tokens after position `last_B`.

    Args:
      tokens_BS: the text; known up to position `last`.
      recent_BWD: `hidden_for_depths` at the positions last - W .. last - 1. Those before the row may be anything.
      keys_BK: random keys, one a draft.
    """
    positions_BW = last_B[:, None] - recent_BWD.shape[1] + jnp.arange(recent_BWD.shape[1])
    run = _heads if config.mtp.kind == "parallel" else _chain
    return run(config, network, sampler, num_drafts, tokens_BS, positions_BW, recent_BWD, caches, keys_BK)


def _heads(config, network, sampler, num_drafts, tokens_BS, positions_BW, recent_BWD, caches, keys_BK) -> Drafts:
    """Parallel heads (2404.19737): each proposes its token from z alone."""
    slots = slots_at(positions_BW, tokens_BS.shape[1])
    h_KB1D, caches = _run_heads(network, num_drafts, recent_BWD, slots, caches)
    hidden_BKD = jnp.moveaxis(network.final_norm(h_KB1D[:, :, 0]), 0, 1)
    logits_BKV = filtered(sampler, network.logits(hidden_BKD))
    tokens = [_pick(sampler, logits_BKV[:, k], keys_BK[:, k]) for k in range(num_drafts)]
    return Drafts(jnp.stack(tokens, axis=1), logits_BKV, caches)


def _run_heads(network: Network, num: int, z_BTD: jax.Array, slots: Slots, caches: Any) -> tuple[jax.Array, Any]:
    """The first `num` heads' blocks on the same z, side by side: [K, B, 1, D] of the last place, and caches."""
    heads = jax.tree.map(lambda w: w[:num], network.depths)
    return jax.vmap(lambda block, cache: block.decode(z_BTD, slots, cache, 1))(heads, caches)


def _chain(config, network, sampler, num_drafts, tokens_BS, positions_BW, recent_BWD, caches, keys_BK) -> Drafts:
    """Sequential modules (2412.19437, eqs. 21-25), each fed with the last one's draft; the last of them as often again
    as there are drafts left."""
    slots, length = slots_at(positions_BW, tokens_BS.shape[1]), tokens_BS.shape[1]
    tokens: list[jax.Array] = []
    logits, caches = [], list(caches)
    onward_BTD, again_BTD = recent_BWD, recent_BWD
    # Depth 1 has learnt to read the trunk's hidden state, later ones what the depth before hands on.
    starts_normed = conventions(config.mtp).trunk_hidden == "after_norm"
    for k in range(num_drafts):
        depth = min(k, len(caches) - 1)
        if k < len(caches):
            inputs_BT = _text_with_drafts(tokens_BS, positions_BW + k + 1, tokens)
        else:
            # One position further with the newest draft: as if this depth's hidden state were what would have been
            # read there. Both foretell the same token.
            positions_B1 = jnp.maximum(positions_BW[:, -1:] + k - depth, 0)
            slots, inputs_BT = slots_at(positions_B1, length), tokens[-1][:, None]
            onward_BTD = again_BTD[:, -1:]
        module = _module(network, depth)
        num_wanted = None if k + 1 < len(caches) else 1  # of all positions where another trained depth reads them
        h_BTD, caches[depth] = module.decode(network.look_up(inputs_BT), onward_BTD, slots, caches[depth], num_wanted)
        normed_BTD, onward_BTD = _hand_on(config, network, module, h_BTD, recent_BWD)
        again_BTD = onward_BTD if depth else (normed_BTD if starts_normed else h_BTD)
        logits.append(filtered(sampler, network.logits(normed_BTD[:, -1:])[:, 0]))
        tokens.append(_pick(sampler, logits[-1], keys_BK[:, k]))
    return Drafts(jnp.stack(tokens, axis=1), jnp.stack(logits, axis=1), caches)


def _module(network: Network, k: int) -> Any:
    return network.depths[min(k, len(network.depths) - 1)]  # where depths share one it is the only one


def _hand_on(config, network, module, h_BTD, h_0_BTD):
    return sequential.hand_on(conventions(config.mtp), module, h_BTD, h_0_BTD, network.final_norm)


def _text_with_drafts(tokens_BS: jax.Array, at_BW: jax.Array, drafts: list[jax.Array]) -> jax.Array:
    """int32[B, W]: the text at these positions, of which the last ones are drafts."""
    known_BW = jnp.take_along_axis(tokens_BS, jnp.clip(at_BW, 0, tokens_BS.shape[1] - 1), axis=1)
    if not drafts:
        return known_BW
    return jnp.concatenate([known_BW[:, : -len(drafts)], jnp.stack(drafts, axis=1)], axis=1)


def _pick(sampler: Sampler, logits_BV: jax.Array, keys_B: jax.Array) -> jax.Array:
    if is_greedy(sampler):
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    return draw(logits_BV, keys_B)
