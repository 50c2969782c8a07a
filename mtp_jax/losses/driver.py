"""Chunked pass over the logits of all terms.

Under differentiation the gradients are computed chunk by chunk in the forward pass. The loss is linear in the summed
values, so the gradient for any cotangent is that for a cotangent of 1, scaled, and no chunk's logits are recomputed.

Shape letters: K depths of a term, B rows, T positions, D model, V vocabulary, C positions per chunk, N chunks per row,
S = K * N chunks in total (S = N for a joint loss, whose chunks hold K depths). `...` stands for [B, C] or [K, B, C].
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax import sharding
from mtp_jax.kernels import fp8
from mtp_jax.kernels.device import device
from mtp_jax.kernels.log_z import SoftmaxGradient, argmax_and_log_z, softmax_gradient
from mtp_jax.losses.cross_entropy import CrossEntropy
from mtp_jax.losses.term import HiddenTerm, Logits, Loss, Term, TermSums, weight_sum
from mtp_jax.sharding import constrain

Precision = Literal["default", "bfloat16", "fp8"]  # see `evaluate`


def evaluate(
    terms: Sequence[Term | HiddenTerm], chunk_tokens: int = 4096, precision: Precision = "default"
) -> tuple[jax.Array, list[TermSums]]:
    """Returns the loss of all terms and the sums of each term.

    Args:
      chunk_tokens: number of positions, per device, whose float32 logits are in memory at a time; twice as many if they
        are stored in bfloat16.
      precision: "default": float32 logits. "bfloat16": logits are rounded to bfloat16 before they are stored, and the
        passes over them read half as much; losses and sums are float32. "fp8": as bfloat16, and both products of the
        gradient of the logits are in 8 bits (`kernels.fp8`).

    Returns:
      the loss, float32, differentiable in hidden states, heads, weights and scales; and the sums of each term, which
      are not differentiated.
    """
    total, sums = jnp.float32(0.0), []
    for term in terms:
        value, found = _hidden(term) if isinstance(term, HiddenTerm) else _chunked_term(term, chunk_tokens, precision)
        total += value
        sums.append(found)
    return total, sums


def token_scores(
    hidden_BTD: jax.Array, head_DV: jax.Array, targets_BT: jax.Array, chunk_tokens: int
) -> tuple[jax.Array, jax.Array]:
    """Returns log p of each target, float32[B, T], and whether it is the most likely token, bool[B, T].

    Args:
      hidden_BTD: normed hidden states.
      head_DV: output head.
      targets_BT: int.
      chunk_tokens: as in `evaluate`.
    """
    ones = jnp.ones((1, *targets_BT.shape), jnp.float32)
    term = Term(CrossEntropy(), hidden_BTD[None], head_DV, targets_BT[None], ones, jnp.ones(1))
    positions = _positions(term, chunk_tokens, "default")[1]
    return -positions.nll[0], positions.picks[0] == targets_BT


class _Positions(NamedTuple):
    """Per position, [S, ...] or [K, B, T]: float32 loss and negative log-likelihood of the target, int32 argmax."""

    value: jax.Array
    nll: jax.Array
    picks: jax.Array


class _Chunks(NamedTuple):
    """Inputs of the scan; [S] or, per position, [S, ...]. head_share: share of the gradient that the head receives."""

    hidden: jax.Array
    targets: jax.Array
    weight: jax.Array
    scale: jax.Array
    head_share: jax.Array
    teacher: jax.Array | None
    words: jax.Array | None
    probs: jax.Array | None


def _hidden(term: HiddenTerm) -> tuple[jax.Array, TermSums]:
    value_K = (term.weight_KBT * term.value_KBT).sum((1, 2))
    sums = TermSums(value_K, weight_sum(term.weight_KBT))
    return (term.scale_K * value_K).sum(), jax.lax.stop_gradient(sums)


def _chunked_term(term: Term, chunk_tokens: int, precision: Precision) -> tuple[jax.Array, TermSums]:
    total, positions = _positions(term, chunk_tokens, precision)
    weight_KBT = jax.lax.stop_gradient(term.weight_KBT)
    value_K, nll_K = ((weight_KBT * x).sum((1, 2)) for x in (positions.value, positions.nll))
    correct_K = jnp.where(positions.picks == term.targets_KBT, weight_KBT, 0.0).sum((1, 2))
    return total, TermSums(value_K, weight_sum(weight_KBT), nll_K, correct_K, positions.picks)


def _positions(term: Term, chunk_tokens: int, precision: Precision) -> tuple[jax.Array, _Positions]:
    """Returns the term's part of the loss, and its values per position [K, B, T]."""
    depth, is_joint = term.hidden_KBTD.shape[0], term.loss.is_joint
    at_once = (depth if is_joint else 1) * (1 if term.teacher_KBTD is None else 2)
    chunk_tokens *= 1 if precision == "default" else 2
    num_chunks = _num_chunks(term.hidden_KBTD.shape, max(1, chunk_tokens // at_once))
    split = functools.partial(_split, num_chunks=num_chunks, is_joint=is_joint)
    share_K = jnp.ones(depth) if term.head_share_K is None else term.head_share_K
    scale, share = (
        jnp.broadcast_to(x_K, (num_chunks, depth)) if is_joint else jnp.repeat(x_K, num_chunks)
        for x_K in (term.scale_K, share_K)
    )
    chunks = _Chunks(
        hidden=split(term.hidden_KBTD),
        targets=split(term.targets_KBT),
        weight=split(term.weight_KBT),
        scale=scale,
        head_share=share,
        teacher=None if term.teacher_KBTD is None else split(term.teacher_KBTD),
        words=None if term.words_KBTW is None else split(term.words_KBTW),
        probs=None if term.probs_KBTW is None else split(term.probs_KBTW),
    )
    total, positions = _scan(term.loss, precision, chunks, term.head_DV)
    return total, jax.tree.map(lambda x: _joined(x, term.targets_KBT.shape, is_joint), positions)


def _num_chunks(shape: tuple[int, ...], chunk_tokens: int) -> int:
    """Returns the smallest number of equal chunks of a row with at most chunk_tokens positions per device."""
    _, batch, length, _ = shape
    rows = -(-batch // sharding.num_shards("batch"))
    local = length // sharding.num_shards("length") if length % sharding.num_shards("length") == 0 else length
    for num in range(1, local + 1):
        if local % num == 0 and rows * (local // num) <= chunk_tokens:
            return num
    return local


def _split(x_KBT: jax.Array, num_chunks: int, is_joint: bool) -> jax.Array:
    """[K, B, T, ...] -> [K * N, B, C, ...], or [N, K, B, C, ...] for a joint loss.

    Chunk j takes the positions c * N + j: an equal share of every device's positions if rows are sharded over the
    context axis.
    """
    depth, batch, length, *rest = x_KBT.shape
    x = jnp.moveaxis(x_KBT.reshape(depth, batch, length // num_chunks, num_chunks, *rest), 3, 0 if is_joint else 1)
    lead = (num_chunks, depth) if is_joint else (depth * num_chunks,)
    x = x.reshape(*lead, batch, length // num_chunks, *rest)
    return constrain(x, *(None for _ in lead), "batch", "length", *(None for _ in rest))


def _joined(x: jax.Array, shape: tuple[int, ...], is_joint: bool) -> jax.Array:
    """Inverse of `_split` for one number per position: -> [K, B, T]."""
    depth = shape[0]
    if is_joint:
        return jnp.moveaxis(x, 0, -1).reshape(shape)
    return jnp.moveaxis(x.reshape(depth, -1, *x.shape[1:]), 1, -1).reshape(shape)


def _head(head_DV: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Returns the head in the compute dtype, sharded by vocabulary only; the model dim is gathered before the scan."""
    return constrain(head_DV.astype(dtype), None, "vocab")


def _product(precision: Precision, hidden: jax.Array, head_DV: jax.Array) -> jax.Array:
    """Returns the logits as they are stored, [..., V]; not differentiated."""
    equation = "kbcd,dv->kbcv" if hidden.ndim == 4 else "bcd,dv->bcv"
    stored = jnp.float32 if precision == "default" else jnp.bfloat16
    logits = jnp.einsum(equation, hidden, head_DV, preferred_element_type=stored)
    return constrain(logits, *(None for _ in range(hidden.ndim - 3)), "batch", "length", "vocab")


def _logits(precision: Precision, chunk: _Chunks, head_DV: jax.Array) -> tuple[Logits, jax.Array]:
    """Returns the logits of a chunk and their argmax."""
    stored = _product(precision, chunk.hidden, head_DV)
    logits = stored.astype(jnp.float32)
    if device().gathers_are_fast and _has_whole_rows(stored.shape):
        # One pass over the logits instead of four; on a GPU they are in memory at this point.
        axes = (*(None for _ in range(stored.ndim - 3)), "batch", "length")
        picks, z, target_logit = sharding.local(_of_rows, ((*axes, None), axes), axes)(stored, chunk.targets)
    else:
        picks = jnp.argmax(logits, axis=-1).astype(jnp.int32)
        z = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum instead of a gather, which may gather sharded logits on every device.
        is_target = jnp.arange(logits.shape[-1]) == chunk.targets[..., None]
        target_logit = jnp.where(is_target, logits, 0.0).sum(axis=-1)
    teacher = None
    if chunk.teacher is not None:
        teacher = jax.lax.stop_gradient(_product(precision, chunk.teacher, head_DV).astype(jnp.float32))
    return Logits(logits, z, target_logit, chunk.targets, teacher, chunk.words, chunk.probs), picks


def _has_whole_rows(shape: tuple[int, ...]) -> bool:
    """Returns whether every device has the logits of the whole vocabulary for an equal part of the tokens."""
    is_divided = shape[-3] % sharding.num_shards("batch") == 0 and shape[-2] % sharding.num_shards("length") == 0
    return is_divided and sharding.num_shards("vocab") == 1


def _of_rows(stored: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the argmax, int32, and in float32 the logsumexp over the last dim and the target's logit."""
    picks, z = argmax_and_log_z(stored)
    return picks, z, jnp.take_along_axis(stored, targets[..., None], axis=-1)[..., 0].astype(jnp.float32)


def _values(
    loss: Loss, precision: Precision, chunk: _Chunks, head_DV: jax.Array
) -> tuple[Logits, jax.Array, _Positions]:
    """Returns the logits of a chunk, its part of the loss and its values per position."""
    seen, picks = _logits(precision, chunk, head_DV)
    value = loss.value(seen)
    positions = _Positions(value, seen.log_z - seen.target_logit, picks)
    return seen, (_cotangent(loss, chunk) * value).sum(), positions


def _cotangent(loss: Loss, chunk: _Chunks) -> jax.Array:
    """Returns the factor of each position's value in the loss, float32[...]."""
    return (chunk.scale[:, None, None] if loss.is_joint else chunk.scale) * chunk.weight


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scan(loss: Loss, precision: Precision, chunks: _Chunks, head_DV: jax.Array) -> tuple[jax.Array, _Positions]:
    """Returns the part of the loss and the values per position [S, ...], without gradients."""
    head = _head(head_DV, chunks.hidden.dtype)

    def body(total, chunk):
        _, part, positions = _values(loss, precision, chunk, head)
        return total + part, positions

    return jax.lax.scan(body, jnp.float32(0.0), chunks)


def _forward(loss: Loss, precision: Precision, chunks: _Chunks, head_DV: jax.Array):
    """Forward rule of `_scan`; the residuals hold the gradients for a cotangent of 1."""
    head = _head(head_DV, chunks.hidden.dtype)
    gradients = _gradients_in_8_bits(head) if precision == "fp8" else functools.partial(_gradients, head)

    def body(carry, chunk: _Chunks):
        total, grad_head_DV = carry
        part, positions, grad_logits, largest = _values_and_gradient(loss, precision, chunk, head)
        share = chunk.head_share[:, None, None] if loss.is_joint else chunk.head_share
        shared = chunk.hidden * (share[..., None] if loss.is_joint else share).astype(chunk.hidden.dtype)
        grad_hidden, grad_chunk_DV = gradients(shared, grad_logits, largest)
        grad_head_DV += constrain(grad_chunk_DV, "embed", "vocab")  # reduce-scattered per chunk, not gathered
        return (total + part, grad_head_DV), (positions, grad_hidden)

    zero_DV = constrain(jnp.zeros(head_DV.shape, jnp.float32), "embed", "vocab")
    (total, grad_head_DV), (positions, grad_hidden) = jax.lax.scan(body, (jnp.float32(0.0), zero_DV), chunks)
    residuals = grad_hidden, grad_head_DV.astype(head_DV.dtype), positions.value, chunks.weight, chunks.scale
    return (total, positions), residuals


def _values_and_gradient(
    loss: Loss, precision: Precision, chunk: _Chunks, head_DV: jax.Array
) -> tuple[jax.Array, _Positions, jax.Array, jax.Array | None]:
    """Returns the chunk's part of the loss, its values, and the gradient of its logits in the dtype of hidden states.

    The last result is the largest absolute value of each position's gradient where a kernel has computed it.
    """
    cotangent = _cotangent(loss, chunk)
    if not _has_gradient_kernel(loss, precision, chunk.hidden, head_DV):
        seen, part, positions = _values(loss, precision, chunk, head_DV)
        return part, positions, loss.gradient(seen, cotangent).astype(chunk.hidden.dtype), None
    stored = _product(precision, chunk.hidden, head_DV)
    axes = (*(None for _ in range(stored.ndim - 3)), "batch", "length")

    def of_rows(stored: jax.Array, targets: jax.Array, cotangent: jax.Array) -> SoftmaxGradient:
        flat = stored.reshape(-1, stored.shape[-1]), targets.reshape(-1), cotangent.reshape(-1)
        found = softmax_gradient(*flat, lambda log_z: jnp.float32(loss.softmax_factor(log_z)))
        return jax.tree.map(lambda x: x.reshape(*targets.shape, *x.shape[1:]), found)

    found = sharding.local(of_rows, ((*axes, None), axes, axes), axes)(stored, chunk.targets, cotangent)
    value = loss.value(Logits(stored, found.log_z, found.target_logit, chunk.targets, None, None, None))
    positions = _Positions(value, found.log_z - found.target_logit, found.picks)
    return (cotangent * value).sum(), positions, found.gradient, found.largest


def _has_gradient_kernel(loss: Loss, precision: Precision, hidden: jax.Array, head_DV: jax.Array) -> bool:
    """Returns whether `softmax_gradient` computes the gradient of the logits, which it takes in bfloat16."""
    is_bfloat16 = precision != "default" and hidden.dtype == jnp.bfloat16
    if not is_bfloat16 or loss.softmax_factor(jnp.float32(0.0)) is None or device().lacks_hopper():
        return False
    return _has_whole_rows((*hidden.shape[:-1], head_DV.shape[-1]))


def _gradients(
    head_DV: jax.Array, hidden: jax.Array, grad_logits: jax.Array, largest: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Returns the gradients of the hidden states of a chunk, in their dtype, and of the head, float32[D, V]."""
    del largest
    lead = "kbc" if hidden.ndim == 4 else "bc"
    grad_hidden = jnp.einsum(f"{lead}v,dv->{lead}d", grad_logits, head_DV)
    grad_DV = jnp.einsum(f"{lead}d,{lead}v->dv", hidden, grad_logits, preferred_element_type=jnp.float32)
    return grad_hidden, grad_DV


def _gradients_in_8_bits(head_DV: jax.Array) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """Returns (hidden, grad_logits, largest) -> the gradients as `_gradients`, of operands rounded to 8 bits.

    Gradients of logits are rounded to e5m2: of a token, most are 1e-5 of the largest and less.
    """
    fp8.warn_if_emulated("training.loss_precision")
    head = fp8.weight_residuals(fp8.rounded(head_DV, (0, 1)), (0,))

    def gradients(hidden: jax.Array, grad_logits: jax.Array, largest: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        kept = fp8.residuals(hidden, head, 1)[1]
        largest = None if largest is None else largest[..., None]
        return fp8.gradients(kept, grad_logits, 1, jnp.float8_e5m2, jnp.float32, largest)

    return gradients


def _backward(loss: Loss, precision: Precision, residuals, cotangents):
    del loss, precision
    grad_hidden, grad_head_DV, value, weight, scale = residuals
    by = cotangents[0]
    no_grads: Any = [None] * len(_Chunks._fields)
    grads = _Chunks(*no_grads)._replace(
        hidden=(grad_hidden * by).astype(grad_hidden.dtype),
        weight=scale[..., None, None] * value * by,
        scale=(weight * value).sum(axis=(-2, -1)) * by,
    )
    return grads, (grad_head_DV * by).astype(grad_head_DV.dtype)


_scan.defvjp(_forward, _backward)
