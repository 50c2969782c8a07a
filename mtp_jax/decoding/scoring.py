"""How likely given texts are: log-probabilities of a model's next tokens, in batches of few shapes.

Shape letters: B rows, T positions, C positions of a chunk, D model, V vocabulary.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mtp_jax import sharding
from mtp_jax.config import Config
from mtp_jax.decoding.decoder import bucket
from mtp_jax.model import Tree, skeleton
from mtp_jax.sharding import constrain

TOKENS_A_BATCH = 16_384
LOGIT_BYTES = 1 << 28  # of the logits that exist at one time


def score(
    config: Config,
    params: Tree,
    biases: Tree,
    texts: Sequence[np.ndarray],
    starts: Sequence[int],
    progress: Callable[[int], None] = lambda num: None,
) -> list[tuple[float, bool]]:
    """For each text the sum of log p (nats) of its tokens from `start` >= 1 on, and whether they are the greedy ones.

    Texts of about one length go together. Call under `jax.set_mesh`.

    Args:
      progress: called with the number of texts done since the last call.
    """
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    results: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
    while order:
        size = bucket(len(texts[order[0]]) - 1)  # the last token is only predicted
        num = max(1, TOKENS_A_BATCH // size)
        batch, order = order[:num], order[num:]
        scored = _batch(config, params, biases, [texts[i] for i in batch], [starts[i] for i in batch], size, num)
        for i, result in zip(batch, scored, strict=True):
            results[i] = result
        progress(len(batch))
    return results


def _batch(config, params, biases, texts, starts, size, num_rows) -> list[tuple[float, bool]]:
    num_rows = -(-min(num_rows, 1 << (len(texts) - 1).bit_length()) // sharding.num_shards("batch"))
    inputs_BT, targets_BT = np.zeros((2, num_rows * sharding.num_shards("batch"), size), np.int32)
    for inputs, targets, text in zip(inputs_BT, targets_BT, texts, strict=False):
        inputs[: len(text) - 1], targets[: len(text) - 1] = text[:-1], text[1:]
    log_p_BT, is_best_BT = jax.device_get(_log_probs(config, params, biases, inputs_BT, targets_BT))
    spans = [slice(start - 1, len(text) - 1) for text, start in zip(texts, starts, strict=True)]
    return [(float(log_p_BT[b, s].sum(dtype=np.float64)), bool(is_best_BT[b, s].all())) for b, s in enumerate(spans)]


@functools.partial(jax.jit, static_argnums=0)
def _log_probs(config: Config, params: Tree, biases: Tree, inputs_BT, targets_BT) -> tuple[jax.Array, jax.Array]:
    """log p(target_i | inputs up to i), float32[B, T], and whether the target is the likeliest."""
    model = skeleton(config).merge(params, biases)
    positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1]), inputs_BT.shape)
    hidden_BTD = model.main(inputs_BT, jnp.ones_like(inputs_BT), positions_BT)
    return token_scores(hidden_BTD, model.head().astype(hidden_BTD.dtype), targets_BT)


def token_scores(hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """log p of each target, float32[B, T], and whether it is the likeliest token; the logits of a piece at a time.

    Args:
      hidden_BTD: normed hidden states.
    """

    def chunk(args):
        hidden_BCD, targets_BC = args
        logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)
        at_BC = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return at_BC - jax.nn.logsumexp(logits_BCV, axis=-1), jnp.argmax(logits_BCV, axis=-1) == targets_BC

    num = 1
    while targets_BT.size * head_DV.shape[1] * 4 / num > LOGIT_BYTES and targets_BT.shape[1] % (2 * num) == 0:
        num *= 2
    cut = [jnp.moveaxis(x.reshape(len(x), num, -1, *x.shape[2:]), 1, 0) for x in (hidden_BTD, targets_BT)]
    parts = jax.lax.map(chunk, tuple(cut))
    log_p, best = (jnp.moveaxis(x, 0, 1).reshape(targets_BT.shape) for x in parts)
    return constrain(log_p, None, None), constrain(best, None, None)
