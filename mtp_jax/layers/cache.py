"""KV cache: one entry per token and layer.

Without a window the entry of the token at position p is in slot p. A layer with a window keeps a ring: the entry is in
slot p modulo the number of slots, and takes the place of one that no query can see any more. What was written for a
draft that was rejected stays until the token that takes its place is written; until then no query looks so far.

Shape letters: B rows, T new tokens, S slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from mtp_jax.typing import Cache

NOWHERE = 1 << 30  # a slot that no cache has: what is written there is dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Positions of T new tokens of each row.

    positions_BT: int, for the rotary embedding; the token sees the entries of positions 0 .. its own.
    slots_BT: int, the position whose entry is written; from NOWHERE on it is not. Different within a row, ascending.
    num_visible: no token of these stands beyond this many positions, so no more are read.
    """

    positions_BT: jax.Array
    slots_BT: jax.Array
    num_visible: int = field(metadata={"static": True})

    def padded(self, num_more: int) -> "Slots":
        """With tokens at the end of each row that are written nowhere."""
        last = NOWHERE + self.slots_BT.shape[1] + jnp.arange(num_more)
        more = jnp.broadcast_to(last, (len(self.slots_BT), num_more)).astype(self.slots_BT.dtype)
        positions_BT = jnp.pad(self.positions_BT, ((0, 0), (0, num_more)))
        return Slots(positions_BT, jnp.concatenate([self.slots_BT, more], axis=1), self.num_visible)

    @property
    def is_written_BT(self) -> jax.Array:
        """bool, whether the token has an entry."""
        return self.slots_BT < NOWHERE


def slots_at(positions_BT: jax.Array, num_visible: int, length_B: jax.Array | None = None) -> Slots:
    """The slots of tokens at these positions. Negative ones stand before the row: written nowhere, read by nobody.

    Args:
      length_B: positions from it on are written nowhere either.
    """
    nowhere_T = NOWHERE + jnp.arange(positions_BT.shape[1])
    is_written_BT = positions_BT >= 0
    if length_B is not None:
        is_written_BT &= positions_BT < length_B[:, None]
    slots_BT = jnp.where(is_written_BT, positions_BT, nowhere_T)
    return Slots(jnp.maximum(positions_BT, 0), slots_BT, num_visible)


def num_slots(window: int, num_positions: int, num_new: int) -> int:
    """Slots of one row's cache.

    Args:
      window: of the layer; 0: none.
      num_positions: the longest row.
      num_new: tokens run at a time in a decode step. A ring has as many slots more twice: queries of one step reach
        back from different positions, and rejected drafts of the step before may lie ahead of them.
    """
    return min(window, num_positions) + 2 * num_new if window else num_positions


def read_and_write(cache: Cache, entries: Cache, slots: Slots, window: int) -> tuple[Cache, Cache, jax.Array]:
    """New entries written to a cache.

    Args:
      cache, entries: trees of arrays [B, S, ...] and [B, T, ...].
      window: of the layer; 0: none.

    Returns:
      the cache with the new entries; what the new tokens attend to, [B, N, ...]; and the positions of those N entries,
      int[1 or B, N], negative where there is none.
    """
    size = jax.tree.leaves(cache)[0].shape[1]
    if not window:
        cache = _each(write, cache, entries, slots.slots_BT)
        return cache, jax.tree.map(lambda x: x[:, : slots.num_visible], cache), jnp.arange(slots.num_visible)[None]
    num_new = slots.slots_BT.shape[1]
    newest_B = jnp.where(slots.is_written_BT, slots.slots_BT, -1).max(axis=1)
    # A ring has no room for two tokens of the same slot: of a long piece of a prompt the last ones stay.
    stays_BT = slots.is_written_BT & (slots.slots_BT > newest_B[:, None] - size)
    ring_BT = jnp.where(stays_BT, slots.slots_BT % size, NOWHERE + jnp.arange(num_new))
    written = _each(write, cache, entries, ring_BT)
    if min(window, slots.num_visible) + num_new - 1 <= size:
        return written, written, _positions(newest_B, size)
    # The first tokens of a long piece see entries that its last ones replace: all are read before any is written.
    before_BS = _positions(slots.positions_BT[:, 0] - 1, size)
    new_BT = jnp.where(slots.is_written_BT, slots.slots_BT, -1)
    both = _each(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache, entries)
    return written, both, jnp.concatenate([before_BS, new_BT], axis=1)


def _positions(newest_B: jax.Array, size: int) -> jax.Array:
    """int[B, S], the position of each entry of a ring whose newest entry is of position `newest_B`."""
    return newest_B[:, None] - (newest_B[:, None] - jnp.arange(size)) % size


def _each(change: Callable[..., jax.Array], cache: Cache, entries: Cache, *more: jax.Array) -> Cache:
    return jax.tree.map(lambda old, new: change(old, new, *more), cache, entries)


def write(cache: jax.Array, entries: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """The cache [B, S, ...] with entries [B, T, ...] in their slots."""

    def row(cache, entries, slots_T):
        return cache.at[slots_T].set(entries.astype(cache.dtype), mode="drop", unique_indices=True)

    return jax.vmap(row)(cache, entries, slots_BT)
