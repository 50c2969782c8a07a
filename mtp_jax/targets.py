"""Rows of data as the model and the losses read them: depth-k inputs, targets, validity and weights, sliced once.

Shape letters: B rows, N tokens of a row, T positions, D extra depths, K = D + 1 depths with the main model as depth 0.
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


class Rows(NamedTuple):
    """Rows of tokens with everything that training, validation and scoring read of them.

    inputs_KBT, targets_KBT: int, x[i + k] and x[i + 1 + k].
    segments_KBT: int, the segment id of position i where depth k counts at i, else `PADDING`: one array tells the
      attention mask, the router's statistics and the loss, so the three cannot disagree. None: every row is one
      document, and all of it counts.
    weight_KBT: float32, the weight of position i at depth k: 0 where it does not count, else its target token's own
      weight.
    positions_BT: int, for the rotary embedding.
    tokens_BN, segment_ids_BN: the rows themselves, N = T + 1 + lookahead.
    """

    inputs_KBT: jax.Array
    targets_KBT: jax.Array
    segments_KBT: jax.Array | None
    weight_KBT: jax.Array
    positions_BT: jax.Array
    tokens_BN: jax.Array
    segment_ids_BN: jax.Array

    def micro_batches(self, num: int) -> "Rows":
        """The rows in `num` equal parts, along a new leading dim. Part m takes rows r with r % num == m from each
        device, so no row moves."""

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
    """The rows of a batch, each array sliced from the original tokens.

    Args:
      tokens_BN, segment_ids_BN, positions_BN: int[B, N], N = T + 1 + lookahead.
      depth: D, extra depths.
      lookahead: tokens beyond the next one, at least D; D by default.
      loss_mask_BN: float, the weight of each token as a target; None: 1.

    Raises:
      ValueError: as `build`.
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
    """Rows that each hold one document from its start: T = N - D positions, the last target of each depth unknown.

    The target that would lie behind the row is 0; nothing but a loss reads it.
    """
    padded_BN = jnp.pad(tokens_BN, ((0, 0), (0, 1)))
    positions_BN = jnp.broadcast_to(jnp.arange(padded_BN.shape[1]), padded_BN.shape)
    return rows(padded_BN, jnp.full_like(padded_BN, PADDING + 1), positions_BN, depth)


def build(tokens: jax.Array, segment_ids: jax.Array, depth: int) -> Targets:
    """Depth-k inputs, targets and validity, each sliced at its absolute offset from the original row.

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
