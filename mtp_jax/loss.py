"""One chunked cross-entropy over the shared head for all depths, and what the predictions are worth.

The logits of one chunk are all that ever exists: neither the depth nor the length of a row adds to the peak. Where a
gradient is wanted it is formed chunk by chunk in the forward pass, so no chunk is multiplied with the head twice.

Shape letters: K depths (1 + extra), B rows, T positions, D model, V vocabulary, C positions of a chunk, N chunks.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax import sharding
from mtp_jax.sharding import constrain, platform


class DepthSums(NamedTuple):
    """Sums over the positions of the mask, per depth; float32[K] (counts too: exact below 2^24 a device batch).

    nll: negative log likelihood, nats. z: squared log normaliser. correct: argmax equals the target.
    num: positions. agree: argmax equals the main head's at i + k; num_compared: positions where that head has a say.
    """

    nll: jax.Array
    z: jax.Array
    correct: jax.Array
    num: jax.Array
    agree: jax.Array
    num_compared: jax.Array


def head_loss(
    hidden_KBTD: jax.Array,
    head_DV: jax.Array,
    targets_KBT: jax.Array,
    mask_KBT: jax.Array,
    weight_K: jax.Array,
    z_weight: float = 0.0,
    chunk_tokens: int = 4096,
    is_head_detached: bool = False,
) -> tuple[jax.Array, DepthSums]:
    """sum_k weight_k * (nll_k + z_weight * z_k), with the sums it is made of.

    Args:
      hidden_KBTD: normed hidden states of every depth, in the compute dtype.
      head_DV: the shared output head, in its own dtype.
      targets_KBT: int, x[i + 1 + k].
      mask_KBT: bool; False contributes nothing.
      weight_K: float32; holds lambda, the depth weights and the divisor. Not differentiated.
      z_weight: of the z-loss, mean log^2 Z (2204.02311, section 5.1).
      chunk_tokens: positions whose logits exist at one time, a device.
      is_head_detached: the head gets its gradient from depth 0 alone.

    Returns:
      the weighted loss (differentiable in hidden and head) and `DepthSums` (constants to differentiation).
    """
    num_chunks = _num_chunks(hidden_KBTD.shape, chunk_tokens)
    split = functools.partial(_split, num_chunks=num_chunks)
    cut = split(hidden_KBTD), split(targets_KBT), split(mask_KBT)
    depth = hidden_KBTD.shape[0]
    head_share_K = jnp.ones(depth).at[1:].set(0.0 if is_head_detached else 1.0)
    weights = jnp.repeat(jnp.stack([weight_K, head_share_K], axis=1), num_chunks, axis=0)
    total, (nll, z, correct, picks) = _chunked(*cut, head_DV, weights, z_weight)
    picks_KBT = jnp.moveaxis(picks.reshape(depth, num_chunks, *picks.shape[1:]), 1, -1).reshape(targets_KBT.shape)
    agree_K, num_compared_K = agreement(picks_KBT, mask_KBT)
    nll_K, z_K, correct_K = (x.reshape(depth, num_chunks).sum(1) for x in (nll, z, correct))
    num_K = mask_KBT.sum((1, 2), dtype=jnp.float32)
    return total, DepthSums(nll_K, z_K, correct_K, num_K, agree_K, num_compared_K)


def agreement(picks_KBT: jax.Array, mask_KBT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How often depth k says at i what the main head says at i + k, once it has seen the tokens between.

    Counted where i + k lies in the row and both predictions count.

    Returns:
      float32[K] agreements, and float32[K] positions compared (at depth 0 both are the number of positions).
    """
    length = picks_KBT.shape[-1]
    agree, count = [], []
    for k in range(picks_KBT.shape[0]):
        both = mask_KBT[k, :, : length - k] & mask_KBT[0, :, k:]
        same = picks_KBT[k, :, : length - k] == picks_KBT[0, :, k:]
        agree.append((same & both).sum(dtype=jnp.float32))
        count.append(both.sum(dtype=jnp.float32))
    return jnp.stack(agree), jnp.stack(count)


def expected_tokens_per_pass(agreement_rates: list[float]) -> float:
    """1 + sum_k prod_{j<=k} a_j: tokens a forward pass yields when depth k's draft is accepted at rate a_k."""
    expected, product = 1.0, 1.0
    for rate in agreement_rates:
        product *= rate
        expected += product
    return expected


def _num_chunks(shape: tuple[int, ...], chunk_tokens: int) -> int:
    """The fewest equal chunks of a row that keep a device's share of a chunk within chunk_tokens."""
    _, batch, length, _ = shape
    rows = -(-batch // sharding.num_shards("batch"))
    local = length // sharding.num_shards("length") if length % sharding.num_shards("length") == 0 else length
    for num in range(1, local + 1):
        if local % num == 0 and rows * (local // num) <= chunk_tokens:
            return num
    return local


def _split(x_KBT: jax.Array, num_chunks: int) -> jax.Array:
    """[K, B, T, ...] -> [K * N, B, C, ...]; chunk j takes the positions c * N + j, an equal share of every device's
    part of a row that is sharded over the context axis."""
    depth, batch, length, *rest = x_KBT.shape
    x = jnp.moveaxis(x_KBT.reshape(depth, batch, length // num_chunks, num_chunks, *rest), 3, 1)
    x = x.reshape(depth * num_chunks, batch, length // num_chunks, *rest)
    return constrain(x, None, "batch", "length", *(None for _ in rest))


def _chunk(hidden_BCD, targets_BC, mask_BC, head_DV):
    """One chunk's logits float32[B, C, V] and per-position nll, log normaliser and argmax."""
    logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)
    logits_BCV = constrain(logits_BCV, "batch", "length", "vocab")
    is_target_BCV = jnp.arange(logits_BCV.shape[-1]) == targets_BC[..., None]
    picks_BC = jnp.argmax(logits_BCV, axis=-1).astype(jnp.int32)
    num_devices = math.prod(sharding.num_shards(name) for name in ("batch", "length", "vocab"))
    if platform() in ("cpu", "tpu") or num_devices > 1:
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        # A masked sum and not a gather: of logits on several devices, a gather may collect them.
        nll_BC = log_z_BC - jnp.where(is_target_BCV, logits_BCV, 0.0).sum(axis=-1)
    else:
        # The same in two passes over the logits instead of four, which on a GPU are in memory by now.
        chosen_BC2 = jnp.take_along_axis(logits_BCV, jnp.stack([picks_BC, targets_BC], axis=-1), axis=-1)
        largest_BC, target_BC = chosen_BC2[..., 0], chosen_BC2[..., 1]
        log_z_BC = largest_BC + jnp.log(jnp.exp(logits_BCV - largest_BC[..., None]).sum(axis=-1))
        nll_BC = log_z_BC - target_BC
    sums = (
        jnp.where(mask_BC, nll_BC, 0.0).sum(),
        jnp.where(mask_BC, jnp.square(log_z_BC), 0.0).sum(),
        (mask_BC & (picks_BC == targets_BC)).sum(dtype=jnp.float32),
        picks_BC,
    )
    return logits_BCV, log_z_BC, is_target_BCV, sums


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _chunked(hidden, targets, mask, head_DV, weights, z_weight):
    """Weighted loss and stacked sums of [K * N] chunks, without gradients.

    weights: [K * N, 2], of the chunk's loss, and of its part in the head's gradient.
    """
    head = _gathered(head_DV, hidden.dtype)

    def body(total, chunk):
        hidden_BCD, targets_BC, mask_BC, (weight, _) = chunk
        *_, sums = _chunk(hidden_BCD, targets_BC, mask_BC, head)
        return total + weight * (sums[0] + z_weight * sums[1]), sums

    return jax.lax.scan(body, jnp.float32(0.0), (hidden, targets, mask, weights))


def _gathered(head_DV: jax.Array, dtype) -> jax.Array:
    """The head as the chunks use it: its vocabulary stays cut, its model dim is collected once, before the loop."""
    return constrain(head_DV.astype(dtype), None, "vocab")


def _forward(hidden, targets, mask, head_DV, weights, z_weight):
    """The same sums, and the gradients for a cotangent of 1: the loss is linear in them, so any other only scales."""
    head = _gathered(head_DV, hidden.dtype)

    def body(carry, chunk):
        total, grad_head_DV = carry
        hidden_BCD, targets_BC, mask_BC, (weight, head_share) = chunk
        logits_BCV, log_z_BC, is_target_BCV, sums = _chunk(hidden_BCD, targets_BC, mask_BC, head)
        probs_BCV = jnp.exp(logits_BCV - log_z_BC[..., None])
        grad_BCV = probs_BCV * (1.0 + 2.0 * z_weight * log_z_BC[..., None]) - is_target_BCV
        scale_BC1 = (weight * mask_BC)[..., None]
        grad_BCV = (grad_BCV * scale_BC1).astype(hidden_BCD.dtype)
        grad_hidden_BCD = jnp.einsum("bcv,dv->bcd", grad_BCV, head)
        shared_BCD = hidden_BCD * head_share.astype(hidden_BCD.dtype)
        grad_chunk_DV = jnp.einsum("bcd,bcv->dv", shared_BCD, grad_BCV, preferred_element_type=jnp.float32)
        grad_head_DV += constrain(grad_chunk_DV, "embed", "vocab")  # scattered, not collected, chunk by chunk
        return (total + weight * (sums[0] + z_weight * sums[1]), grad_head_DV), (sums, grad_hidden_BCD)

    zero_DV = constrain(jnp.zeros(head_DV.shape, jnp.float32), "embed", "vocab")
    (total, grad_head_DV), (sums, grad_hidden) = jax.lax.scan(
        body, (jnp.float32(0.0), zero_DV), (hidden, targets, mask, weights)
    )
    return (total, sums), (grad_hidden, grad_head_DV.astype(head_DV.dtype))


def _backward(z_weight, residuals, cotangents):
    del z_weight
    grad_hidden, grad_head_DV = residuals
    scale = cotangents[0]
    return (
        (grad_hidden * scale).astype(grad_hidden.dtype),
        None,
        None,
        (grad_head_DV * scale).astype(grad_head_DV.dtype),
        None,
    )


_chunked.defvjp(_forward, _backward)
