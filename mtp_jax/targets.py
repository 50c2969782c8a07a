"""What each depth reads and predicts: depth-k inputs, targets and their validity, gathered once.

Shape letters: B rows, T positions, D extra depths, K = D + 1 depths with the main model as depth 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PADDING = 0  # the segment id of positions that hold no document


class Targets(NamedTuple):
    """Per depth k = 0..D, from rows x, s of T + 1 + D tokens; all int32[K, B, T] or bool[K, B, T].

    inputs[k, b, i] = x[b, i + k]; targets[k, b, i] = x[b, i + 1 + k];
    valid[k, b, i] = s[b, i] == s[b, i + 1 + k] and s[b, i] is not padding.
    """

    inputs: jax.Array
    targets: jax.Array
    valid: jax.Array


def build(tokens: jax.Array, segment_ids: jax.Array, depth: int) -> Targets:
    """Depth-k inputs, targets and validity, each cut at its absolute offset from the original row.

    Nothing is rolled or padded, and no already shifted array is shifted again: at depth 2 and more that would
    compare a token with the segment of its neighbour and let packed documents leak into each other.

    Args:
      tokens: int[B, T + 1 + D].
      segment_ids: int[B, T + 1 + D]; 0 is padding, equal ids are one document.
      depth: D >= 0.

    Returns:
      `Targets`, each field [D + 1, B, T].

    Raises:
      ValueError: shapes that differ, or rows too short to leave a position.
    """
    if tokens.shape != segment_ids.shape or tokens.ndim != 2:
        raise ValueError(f"tokens {tokens.shape} and segment_ids {segment_ids.shape} must both be [B, T + 1 + D]")
    length = tokens.shape[1] - 1 - depth
    if depth < 0 or length < 1:
        raise ValueError(f"rows of {tokens.shape[1]} tokens leave no position at depth {depth}")
    tokens, segment_ids = jnp.asarray(tokens), jnp.asarray(segment_ids)
    here_BT = segment_ids[:, :length]
    inputs_KBT = jnp.stack([tokens[:, k : k + length] for k in range(depth + 1)])
    targets_KBT = jnp.stack([tokens[:, k + 1 : k + 1 + length] for k in range(depth + 1)])
    there_KBT = jnp.stack([segment_ids[:, k + 1 : k + 1 + length] for k in range(depth + 1)])
    valid_KBT = (here_BT == there_KBT) & (here_BT != PADDING)
    return Targets(inputs_KBT, targets_KBT, valid_KBT)


def input_segments(segment_ids: jax.Array, depth: int) -> jax.Array:
    """Segment ids of the depth-k inputs: s[i] where the input x[i + k] is of the same document, else padding.

    Args:
      segment_ids: int[B, T + D], a row without its last target.
      depth: D.

    Returns:
      int[D + 1, B, T].
    """
    length = segment_ids.shape[1] - depth
    here_BT = segment_ids[:, :length]
    return jnp.stack([jnp.where(here_BT == segment_ids[:, k : k + length], here_BT, PADDING) for k in range(depth + 1)])
