"""Depth-k inputs, targets, validity and weights of rows of data, each sliced once from the original tokens.

Shape letters: B rows, N tokens of a row, T positions, D extra depths, K = D + 1 depths with the main model as depth 0.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

PADDING = 0  # segment id of positions without a document


class Targets(NamedTuple):
    """Inputs, targets and validity of depths k = 0 .. D of rows of T + 1 + D tokens x with segment ids s.

    inputs[k, b, i] = x[b, i + k]; targets[k, b, i] = x[b, i + 1 + k];
    valid[k, b, i] = s[b, i] == s[b, i + 1 + k] and s[b, i] is not padding.
    int32[K, B, T], int32[K, B, T] and bool[K, B, T].
    """

    inputs: jax.Array
    targets: jax.Array
    valid: jax.Array


class Rows(NamedTuple):
    """Rows of tokens and the arrays derived from them for training, validation and scoring.

    Attributes:
      inputs_KBT: int, x[i + k].
      targets_KBT: int, x[i + 1 + k].
      segments_KBT: int, segment id of position i if depth k counts at i, else `PADDING`. Attention mask, router
        statistics and loss all use this array, so they cannot disagree. None: every row is one document and all
        positions count.
      weight_KBT: float32, weight of position i at depth k: that of its target token, or 0 where it does not count.
      positions_BT: int, for the rotary embedding.
      tokens_BN: the original rows, N = T + 1 + lookahead.
      segment_ids_BN: the original segment ids.
    """

    inputs_KBT: jax.Array
    targets_KBT: jax.Array
    segments_KBT: jax.Array | None
    weight_KBT: jax.Array
    positions_BT: jax.Array
    tokens_BN: jax.Array
    segment_ids_BN: jax.Array

    def micro_batches(self, num: int) -> "Rows":
        """Splits the rows into `num` equal parts along a new leading dim.

        Part m has the rows r with r % num == m of each device, so no row is moved between devices.
        """

        def split(x: jax.Array) -> jax.Array:
            axis = x.ndim - 2
            shape = (*x.shape[:axis], x.shape[axis] // num, num, *x.shape[axis + 1 :])
            return jnp.moveaxis(x.reshape(shape), axis + 1, 0)

        return jax.tree.map(split, self)


def rows(
    tokens_BN: jax.Array,
    segment_ids_BN: jax.Array,
    positions_BN: jax.Array,
    depth: int,
    lookahead: int | None = None,
    loss_mask_BN: jax.Array | None = None,
) -> Rows:
    """Returns the `Rows` of a batch, with each array sliced from the original tokens.

    Args:
      tokens_BN, segment_ids_BN, positions_BN: int[B, N], N = T + 1 + lookahead.
      depth: D, number of extra depths.
      lookahead: number of tokens beyond the next one, at least D; None: D.
      loss_mask_BN: float, weight of each token as a target; None: 1.

    Raises:
      ValueError: see `build`.
    """
    spare = 0 if lookahead is None else lookahead - depth
    end = tokens_BN.shape[1] - spare
    built = build(tokens_BN[:, :end], segment_ids_BN[:, :end], depth)
    usable_KBT = input_segments(segment_ids_BN[:, : end - 1], depth)
    segments_KBT = jnp.where(built.valid, usable_KBT, PADDING)
    weight_KBT = (segments_KBT != PADDING).astype(jnp.float32)
    length = built.inputs.shape[2]
    if loss_mask_BN is not None:
        weight_KBT *= jnp.stack([loss_mask_BN[:, k + 1 : k + 1 + length] for k in range(depth + 1)])
    return Rows(
        built.inputs,
        built.targets,
        segments_KBT,
        weight_KBT,
        positions_BN[:, :length],
        jnp.asarray(tokens_BN),
        jnp.asarray(segment_ids_BN),
    )


def one_document_rows(tokens_BN: jax.Array, depth: int) -> Rows:
    """Returns `Rows` that each hold one document from its start, with T = N - D positions.

    The last target of each depth, which is outside the row, is set to 0; only a loss would read it.
    """
    padded_BN = jnp.pad(tokens_BN, ((0, 0), (0, 1)))
    positions_BN = jnp.broadcast_to(jnp.arange(padded_BN.shape[1]), padded_BN.shape)
    return rows(padded_BN, jnp.full_like(padded_BN, PADDING + 1), positions_BN, depth)


def build(tokens: jax.Array, segment_ids: jax.Array, depth: int) -> Targets:
    """Returns depth-k inputs, targets and validity, each sliced at its absolute offset from the original rows.

    Arrays are neither rolled nor padded, and a shifted array is never shifted again: at depths >= 2 that would compare
    a token with the segment id of its neighbor, and packed documents would leak into each other.

    Args:
      tokens: int[B, T + 1 + D].
      segment_ids: int[B, T + 1 + D]; 0 is padding, equal ids are the same document.
      depth: D >= 0.

    Returns:
      `Targets`, each field [D + 1, B, T].

    Raises:
      ValueError: the shapes differ, or the rows are too short to leave a position.
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
    """Returns the segment ids of the depth-k inputs: s[i] if x[i + k] is in the same document, else `PADDING`.

    Args:
      segment_ids: int[B, T + D], rows without their last target.
      depth: D.

    Returns:
      int[D + 1, B, T].
    """
    length = segment_ids.shape[1] - depth
    here_BT = segment_ids[:, :length]
    return jnp.stack([jnp.where(here_BT == segment_ids[:, k : k + length], here_BT, PADDING) for k in range(depth + 1)])
