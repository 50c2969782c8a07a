"""Data types of the training loss: terms, losses, and the sums that `evaluate` returns.

Shape letters: K depths of a term, B rows, T positions, D model, V vocabulary, C positions of a chunk, W words of a
list. `...` stands for [B, C], or for [K, B, C] if a loss is joint over the depths.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Logits(NamedTuple):
    """Inputs of a loss for one chunk.

    logits: float32[..., V]. log_z: float32[...], log normalizer. target_logit: float32[...], logit of the target.
    targets: int[...]. teacher: float32[..., V], logits of the term's teacher, detached; None without a teacher.
    words, probs: int and float32[..., W], target distribution of a listwise loss; None for other losses.
    """

    logits: jax.Array
    log_z: jax.Array
    target_logit: jax.Array
    targets: jax.Array
    teacher: jax.Array | None
    words: jax.Array | None
    probs: jax.Array | None


class Loss:
    """Loss of a position, given its logits. Subclasses are frozen dataclasses, so that equal losses compile once.

    Attributes:
      is_joint: whether the loss of a depth depends on the logits of other depths; chunks then hold all depths of the
        term.
    """

    is_joint = False

    def softmax_factor(self, log_z: jax.Array) -> jax.Array | float | None:
        """Returns f, float32[...], if the gradient of `value` is softmax * f - one_hot(target); else None.

        `value` must then read no logits but log_z and target_logit, and `kernels.log_z.softmax_gradient` may compute
        the gradient.
        """
        return None

    def value(self, chunk: Logits) -> jax.Array:
        """Returns the loss at each position, float32[...]; must be differentiable in logits, log_z and target_logit."""
        raise NotImplementedError

    def gradient(self, chunk: Logits, cotangent: jax.Array) -> jax.Array:
        """Returns the gradient of sum(cotangent * value) with respect to the logits, float32[..., V].

        Derived from `value` by default; performance-critical losses override it.
        """

        def value(logits: jax.Array) -> jax.Array:
            log_z = jax.nn.logsumexp(logits, axis=-1)
            target_logit = jnp.take_along_axis(logits, chunk.targets[..., None], axis=-1)[..., 0]
            return self.value(chunk._replace(logits=logits, log_z=log_z, target_logit=target_logit))

        return jax.vjp(value, chunk.logits)[1](cotangent)[0]


@dataclass(frozen=True)
class Term:
    """One term of the loss over a vocabulary: sum_k scale_k sum_bt weight_kbt loss(hidden_kbt @ head).

    Attributes:
      loss: loss of a position.
      hidden_KBTD: normed hidden states, in the compute dtype.
      head_DV: output head, in its own dtype.
      targets_KBT: int, target tokens; used for accuracies also if the loss does not read them.
      weight_KBT: float32 >= 0, weight of each position: validity times the weight of the target token. Differentiable.
      scale_K: float32, factor of each depth's sum: lambda and the depth's weight over the divisor.
      name: name of the metric `loss_<name>`; empty for a term that reports token depths only.
      first_depth: depth of index 0 (0 is the main model) if the leading dim runs over depths of token prediction; else
        None.
      teacher_KBTD: hidden states of the teacher; the loss compares with their logits through the same head, detached.
      words_KBTW: tokens of the target distribution of a listwise loss.
      probs_KBTW: their probabilities.
      head_share_K: float32 in [0, 1], share of each depth's gradient that the head receives; None: 1.
    """

    loss: Loss
    hidden_KBTD: jax.Array
    head_DV: jax.Array
    targets_KBT: jax.Array
    weight_KBT: jax.Array
    scale_K: jax.Array
    name: str = ""
    first_depth: int | None = None
    teacher_KBTD: jax.Array | None = None
    words_KBTW: jax.Array | None = None
    probs_KBTW: jax.Array | None = None
    head_share_K: jax.Array | None = None


@dataclass(frozen=True)
class HiddenTerm:
    """Term without a head: values that an MTP kind computes from hidden states.

    Attributes:
      name: name of the metric `loss_<name>`.
      value_KBT: float32, loss of each position; differentiable.
      weight_KBT: as in `Term`.
      scale_K: as in `Term`.
    """

    name: str
    value_KBT: jax.Array
    weight_KBT: jax.Array
    scale_K: jax.Array


class TermSums(NamedTuple):
    """Sums over the positions of a term, per depth; not differentiated.

    value: sum of weight * loss. num: sum of weights. Both float32[K].
    nll: sum of weight * negative log-likelihood of the target, nats. correct: sum of weights where the argmax is the
      target. Both float32[K]; None for a `HiddenTerm`.
    picks: argmax, int32[K, B, T]; None for a `HiddenTerm`.
    """

    value: jax.Array
    num: jax.Array
    nll: jax.Array | None = None
    correct: jax.Array | None = None
    picks: jax.Array | None = None


def weight_sum(weight_KBT: jax.Array) -> jax.Array:
    """Returns the sum of weights per depth, float32[K].

    Sums each row first, then over rows: a single running float32 sum of ones would stop at 2^24.
    """
    per_row_KB = jax.lax.optimization_barrier(weight_KBT.sum(axis=2))
    return per_row_KB.sum(axis=1)
