"""Log-likelihoods of several continuations of one context, which is prefilled once and whose caches they share.

Shape letters: G contexts, J continuations of each, B = G * J rows, C tokens of a continuation, S slots, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.decoding import generation as states
from mtp_jax.decoding.generator import Generator, bucket
from mtp_jax.decoding.inference_model import Network, cache_bytes_per_token, placed, run_main
from mtp_jax.decoding.scoring import TOKENS_PER_BATCH, chunk_tokens
from mtp_jax.layers.cache import slots_at
from mtp_jax.losses import token_scores
from mtp_jax.sharding import constrain
from mtp_jax.typing import Cache

CACHE_BYTES = 1 << 30  # limit of the caches of a batch, including those of the continuations
FEWEST = 4  # minimum number of continuations scored together, for any cache size

Scores = list[tuple[float, bool]]


def score(
    decoder: Generator,
    contexts: Sequence[np.ndarray],
    continuations: Sequence[Sequence[np.ndarray]],
    progress: Callable[[int], None] = lambda num: None,
) -> list[Scores]:
    """Returns the sum of log p (nats) of the tokens of each continuation, and whether they are the greedy ones.

    Args:
      contexts: token ids, at least one each. Context and continuation have at most one token more than the model's
        context length, since the last token is only predicted.
      continuations: for each context at least one continuation, of at least one token each.
      progress: called with the number of continuations scored since the last call.
    """
    parts = [(i, part) for i, each in enumerate(continuations) for part in _parts(decoder, contexts[i], each)]
    sizes = [_num_tokens(contexts[i], part) for i, part in parts]
    order = sorted(range(len(parts)), key=lambda p: -sizes[p])
    found: list[Scores] = [[] for _ in parts]
    while order:
        num_slots = bucket(sizes[order[0]])
        num_choices = max(len(parts[p][1]) for p in order[: TOKENS_PER_BATCH // num_slots + 1])
        num = _rows(decoder, num_slots, num_choices)
        batch, order = order[:num], order[num:]
        scored = _batch(decoder, [contexts[parts[p][0]] for p in batch], [parts[p][1] for p in batch], num_slots, num)
        for p, scores in zip(batch, scored, strict=True):
            found[p] = scores
        progress(sum(map(len, scored)))
    results: list[Scores] = [[] for _ in contexts]
    for (i, _), scores in zip(parts, found, strict=True):
        results[i] += scores
    return results


def _num_tokens(context: np.ndarray, continuations: Sequence[np.ndarray]) -> int:
    """Returns the number of tokens that the model reads; the last one is only predicted."""
    return len(context) - 1 + max(map(len, continuations))


def _parts(decoder: Generator, context: np.ndarray, continuations: Sequence[np.ndarray]) -> list[Sequence[np.ndarray]]:
    """Splits the continuations into parts whose caches fit in memory; each part prefills the context again."""
    row_bytes = bucket(_num_tokens(context, continuations)) * cache_bytes_per_token(decoder.architecture)["kept"]
    most = max(FEWEST, CACHE_BYTES // row_bytes - 1)  # one row is that of the context
    return [continuations[at : at + most] for at in range(0, len(continuations), most)]


def _rows(decoder: Generator, num_slots: int, num_choices: int) -> int:
    """Returns the number of contexts per batch, a power of two whose caches fit in memory."""
    row_bytes = num_slots * cache_bytes_per_token(decoder.architecture)["kept"] * (1 + num_choices)
    most = max(1, min(TOKENS_PER_BATCH // num_slots, CACHE_BYTES // row_bytes))
    return 1 << (most.bit_length() - 1)


def _batch(decoder: Generator, contexts, continuations, num_slots: int, num_rows: int) -> list[Scores]:
    """Returns the scores of one batch, padded with rows and continuations that are not read."""
    num_choices = max(map(len, continuations))
    longest = max(len(c) for each in continuations for c in each)
    size = 1 << (longest - 1).bit_length()  # few sizes, so few programs
    with jax.set_mesh(decoder.mesh):
        shards = sharding.num_shards("batch")
        num_rows = -(-min(num_rows, 1 << (len(contexts) - 1).bit_length()) // shards) * shards
        tokens_GS = np.zeros((num_rows, num_slots), np.int32)
        lengths_G = np.ones(num_rows, np.int32)
        inputs_GJC, targets_GJC = np.zeros((2, num_rows, num_choices, size), np.int32)
        for g, (context, each) in enumerate(zip(contexts, continuations, strict=True)):
            lengths_G[g] = len(context)
            tokens_GS[g, : len(context) - 1] = context[:-1]  # the last token is run with the continuation
            for j, tokens in enumerate(each):
                inputs_GJC[g, j, : len(tokens)] = [context[-1], *tokens[:-1]]
                targets_GJC[g, j, : len(tokens)] = tokens
        network = decoder.network
        index_G = np.arange(num_rows, dtype=np.int32)
        state = states.begin(decoder.architecture, 0, network, tokens_GS, lengths_G, lengths_G, np.uint32(0), index_G)
        state = states.prefill_all(decoder.architecture, network, state, int(lengths_G.max()) - 1)
        found = _continued(num_slots, network, state.caches, lengths_G, inputs_GJC, targets_GJC)
        log_p_GJC, is_best_GJC = jax.device_get(found)
    out = []
    for g, each in enumerate(continuations):
        spans = [(j, slice(len(tokens))) for j, tokens in enumerate(each)]
        out.append(
            [(float(log_p_GJC[g, j, s].sum(dtype=np.float64)), bool(is_best_GJC[g, j, s].all())) for j, s in spans]
        )
    return out


@functools.partial(jax.jit, static_argnums=0)
def _continued(
    num_slots: int,
    network: Network,
    caches: list[Cache],
    lengths_G: jax.Array,
    inputs_GJC: jax.Array,
    targets_GJC: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Returns log p of the targets, float32[G, J, C], and whether each is the most likely token.

    Args:
      num_slots: S, positions for which layers without a window have slots.
      caches: caches of G rows with the entries of positions 0 .. length - 2; later slots are overwritten before they
        are read.
      lengths_G: int, lengths of the contexts.
      inputs_GJC: the last token of the context, then the continuation without its last token.
      targets_GJC: the continuation.
    """
    shape = inputs_GJC.shape
    num_choices = shape[1]
    caches = placed(jax.tree.map(lambda x: jnp.repeat(x, num_choices, axis=0), caches))
    starts_B = jnp.repeat(lengths_G - 1, num_choices)
    slots = slots_at(starts_B[:, None] + jnp.arange(shape[2]), num_slots)
    main, _ = run_main(network, inputs_GJC.reshape(-1, shape[2]), slots, caches)
    hidden_BCD, head_DV = network.final_norm(main.hidden), network.parts.head_VD.T
    scores = token_scores(hidden_BCD, head_DV, targets_GJC.reshape(-1, shape[2]), chunk_tokens(head_DV))
    log_p_BC, is_best_BC = (constrain(x, None, None) for x in scores)
    return log_p_BC.reshape(shape), is_best_BC.reshape(shape)
