"""The data of the training loss: terms, the losses they name, and the sums that come back.

Shape letters: K depths of a term, B rows, T positions, D model, V vocabulary, C positions of a chunk, W words of a
list. `...` stands for [B, C], or for [K, B, C] where a loss is joint over the depths.
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp


class Logits(NamedTuple):
    """One chunk as a loss sees it.

    logits: float32[..., V]. log_z: float32[...], their log normaliser. target_logit: float32[...], of the target token.
    targets: int[...]. teacher: float32[..., V] of the term's teacher, detached; None without one.
    words, probs: int and float32[..., W], the target distribution of a listwise loss; None elsewhere.
    """

    logits: jax.Array
    log_z: jax.Array
    target_logit: jax.Array
    targets: jax.Array
    teacher: jax.Array | None
    words: jax.Array | None
    probs: jax.Array | None


class Loss:
    """What a position costs, given its logits. Subclasses are frozen dataclasses, so that equal losses compile once.

    Attributes:
      is_joint: the value of a depth depends on the logits of others, so a chunk holds all depths of the term.
    """

    is_joint = False

    def value(self, chunk: Logits) -> jax.Array:
        """Returns float32[...], the loss at each position. Must be differentiable in logits, log_z and target_logit."""
        raise NotImplementedError

    def gradient(self, chunk: Logits, cotangent: jax.Array) -> jax.Array:
        """Returns the gradient of sum(cotangent * value) in the logits, float32[..., V].

        Derived from `value` by default. A loss that matters for speed writes it by hand.
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
      loss: what a position costs.
      hidden_KBTD: normed hidden states, in the compute dtype.
      head_DV: an output head, in its own dtype.
      targets_KBT: int, the tokens predicted; of accuracies where the loss itself does not read them.
      weight_KBT: float32 >= 0, the weight of each position: 0 where it does not count (DESIGN: validity times the
        target token's own weight). Differentiable.
      scale_K: float32, what multiplies each depth's sum: lambda, depth weights and the divisor.
      name: of the metric `loss_<name>`; empty for a term that reports token depths only.
      first_depth: the depth of row 0, where rows are depths of token prediction (0 is the main model); None for others.
      teacher_KBTD: hidden states whose logits, through the same head and detached, the loss compares with.
      words_KBTW, probs_KBTW: the target distribution of a listwise loss.
      head_share_K: float32 in [0, 1], the share of each depth's gradient that the head receives; None: all of it.
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
    """A term that needs no head: values that an MTP kind computed from hidden states.

    Attributes:
      name: of the metric `loss_<name>`.
      value_KBT: float32, differentiable. weight_KBT, scale_K: as in `Term`.
    """

    name: str
    value_KBT: jax.Array
    weight_KBT: jax.Array
    scale_K: jax.Array


class TermSums(NamedTuple):
    """Sums over the positions of a term, per depth; constants to differentiation.

    value: sum of weight * loss. num: sum of weights. Both float32[K].
    nll: sum of weight * negative log likelihood of the target, nats. correct: sum of weight where the argmax is the
      target. Both float32[K]; None for a `HiddenTerm`.
    picks: int32[K, B, T], the argmax; None for a `HiddenTerm`.
    """

    value: jax.Array
    num: jax.Array
    nll: jax.Array | None = None
    correct: jax.Array | None = None
    picks: jax.Array | None = None


def weight_sum(weight_KBT: jax.Array) -> jax.Array:
    """The sum of weights per depth, float32[K].

    A row is summed before the rows are: one running float32 sum of ones would stop at 2^24.
    """
    per_row_KB = jax.lax.optimization_barrier(weight_KBT.sum(axis=2))
    return per_row_KB.sum(axis=1)
