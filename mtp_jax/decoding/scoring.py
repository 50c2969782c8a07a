"""Log-likelihoods of texts, computed in batches of few shapes.

Shape letters: B rows, T positions, C positions of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mtp_jax import sharding, targets
from mtp_jax.config import Architecture
from mtp_jax.decoding.generator import bucket
from mtp_jax.losses import token_scores
from mtp_jax.model import Tree, abstract_model
from mtp_jax.sharding import constrain

TOKENS_PER_BATCH = 16_384
LOGIT_BYTES = 1 << 28  # limit of the logits in memory at a time


def score(
    architecture: Architecture,
    params: Tree,
    biases: Tree,
    texts: Sequence[np.ndarray],
    starts: Sequence[int],
    progress: Callable[[int], None] = lambda num: None,
) -> list[tuple[float, bool]]:
    """Returns the sum of log p (nats) of each text's tokens from `start` on, and whether they are the greedy ones.

    Texts of similar length are batched together. Call under `jax.set_mesh`.

    Args:
      texts: token ids.
      starts: index >= 1 of the first scored token of each text.
      progress: called with the number of texts scored since the last call.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
    while order:
        size = bucket(len(texts[order[0]]) - 1)  # the last token is only predicted
        num = max(1, TOKENS_PER_BATCH // size)
        batch, order = order[:num], order[num:]
        scored = _batch(architecture, params, biases, [texts[i] for i in batch], [starts[i] for i in batch], size, num)
        for i, result in zip(batch, scored, strict=True):
            results[i] = result
        progress(len(batch))
    return results


def _batch(
    architecture: Architecture,
    params: Tree,
    biases: Tree,
    texts: list[np.ndarray],
    starts: list[int],
    size: int,
    num_rows: int,
) -> list[tuple[float, bool]]:
    num_rows = -(-min(num_rows, 1 << (len(texts) - 1).bit_length()) // sharding.num_shards("batch"))
    inputs_BT, targets_BT = np.zeros((2, num_rows * sharding.num_shards("batch"), size), np.int32)
    for inputs_T, targets_T, text in zip(inputs_BT, targets_BT, texts, strict=False):
        inputs_T[: len(text) - 1], targets_T[: len(text) - 1] = text[:-1], text[1:]
    log_p_BT, is_best_BT = jax.device_get(_log_probs(architecture, params, biases, inputs_BT, targets_BT))
    spans = [slice(start - 1, len(text) - 1) for text, start in zip(texts, starts, strict=True)]
    return [(float(log_p_BT[b, s].sum(dtype=np.float64)), bool(is_best_BT[b, s].all())) for b, s in enumerate(spans)]


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(
    architecture: Architecture, params: Tree, biases: Tree, inputs_BT: jax.Array, targets_BT: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns log p(target_i | inputs up to i), float32[B, T], and whether the target is the most likely token."""
    model = abstract_model(architecture).merge(params, biases)
    hidden_BTD = model.main(targets.one_document_rows(inputs_BT, depth=0))
    head_DV = model.main_head().astype(hidden_BTD.dtype)
    log_p, is_best = token_scores(hidden_BTD, head_DV, targets_BT, chunk_tokens(head_DV))
    return constrain(log_p, None, None), constrain(is_best, None, None)


def chunk_tokens(head_DV: jax.Array) -> int:
    """Returns the number of positions whose logits fit in LOGIT_BYTES."""
    return max(1, LOGIT_BYTES // (4 * head_DV.shape[1]))
