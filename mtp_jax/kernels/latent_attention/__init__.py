"""Latent attention of a few new tokens over a cache, with absorbed up-projections, in three GPU kernels.

XLA compiles the same operations to twelve kernels, each of which waits for the one before (docs/log.md).

Shape letters: B rows, T new tokens, S slots, H heads, N nope dim, R rotary dim, Q = N + R, V value dim, X = N + V,
C key/value latent, W = C + R numbers per token in a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from mtp_jax.kernels.device import device
from mtp_jax.kernels.latent_attention import triton

MOST_NEW = 8  # T
MOST_TOKENS = 256  # B * T; XLA's matmuls are faster for more
MOST_HEADS = 64  # in the registers of one program


class Entries(NamedTuple):
    """New tokens before norm and rotation.

    q_BTF: first H * Q numbers: queries, the last R dims of each to be rotated.
    kv_BTF: last C + R numbers: the latent, to be normed, and the shared key, to be rotated.
    cos_BTr, sin_BTr: float32[B, T, R / 2], factors of the rotation (`layers.rope.rotation`).
    positions_BT: int; a token attends to the slots 0 .. its position.
    slots_BT: int, slots of the entries; out of bounds: no entry is written.
    """

    q_BTF: jax.Array
    kv_BTF: jax.Array
    cos_BTr: jax.Array
    sin_BTr: jax.Array
    positions_BT: jax.Array
    slots_BT: jax.Array


def decode(
    entries: Entries,
    kv_b_CHX: jax.Array,
    norm_C: jax.Array,
    eps: float,
    cache_BSW: jax.Array,
    nope: int,
    scale: float,
    is_interleaved: bool,
) -> tuple[jax.Array, jax.Array]:
    """Writes the entries of new tokens to a cache and attends from the tokens to it.

    Args:
      kv_b_CHX: up-projections of the nope keys and the values, in the dtype of the queries.
      norm_C, eps: scale and epsilon of the RMSNorm of latents.
      nope: N.
      scale: softmax scale.
      is_interleaved: as in `layers.rope.rotate`.

    Returns:
      [B, T, H, V] in the dtype of the queries, and the cache with the new entries.
    """
    return triton.decode(entries, kv_b_CHX, norm_C, eps, cache_BSW, nope, scale, is_interleaved)


def unsupported_reason(positions_BT: jax.Array, kv_b_CHX: jax.Array, cache_BSW: jax.Array, nope: int) -> str:
    """Returns why the kernels do not support the operands or the device; empty if they do."""
    num_rows, num_new = positions_BT.shape
    rank, num_heads = kv_b_CHX.shape[:2]
    rotary = cache_BSW.shape[2] - rank
    dims = {"rank": rank, "rotary": rotary, "nope": nope, "value": kv_b_CHX.shape[2] - nope}
    if reason := device().lacks_hopper():
        return reason
    if any(dim & (dim - 1) or dim < 16 for dim in dims.values()):
        return f"dims are powers of two of at least 16, and these are {dims}"
    if kv_b_CHX.dtype not in (jnp.bfloat16, jnp.float32) or cache_BSW.dtype != kv_b_CHX.dtype:
        return f"weights and cache are bfloat16 or float32 alike, and these are {kv_b_CHX.dtype} and {cache_BSW.dtype}"
    if num_new > MOST_NEW or num_rows * num_new > MOST_TOKENS or num_heads > MOST_HEADS:
        return f"it is for few tokens and heads, and these are {num_rows} x {num_new} of {num_heads} heads"
    return ""
