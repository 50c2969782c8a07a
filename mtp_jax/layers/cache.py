"""KV cache: one entry per token and layer.

Without a window the entry of position p is in slot p. A layer with a window keeps a ring buffer: the entry is in slot
p modulo the number of slots, and overwrites one that is outside the window of all later queries. The entry of a
rejected draft remains until the entry of the next token at its position overwrites it; no query reads it before then.

Shape letters: B rows, T new tokens, S slots.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from mtp_jax.typing import Cache

NOWHERE = 1 << 30  # out of bounds of every cache: writes to this slot are dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Positions and cache slots of T new tokens of each row.

    positions_BT: int, for the rotary embedding; a token attends to the entries of positions 0 .. its own.
    slots_BT: int, position under which the token's entry is written, strictly ascending within a row; values >= NOWHERE
      write no entry.
    num_visible: an upper bound of the positions of these tokens, exclusive; later slots are not read.
    """

    positions_BT: jax.Array
    slots_BT: jax.Array
    num_visible: int = field(metadata={"static": True})

    def padded(self, num_more: int) -> "Slots":
        """Returns slots with `num_more` tokens appended to each row that write no entry."""
        last = NOWHERE + self.slots_BT.shape[1] + jnp.arange(num_more)
        more = jnp.broadcast_to(last, (len(self.slots_BT), num_more)).astype(self.slots_BT.dtype)
        positions_BT = jnp.pad(self.positions_BT, ((0, 0), (0, num_more)))
        return Slots(positions_BT, jnp.concatenate([self.slots_BT, more], axis=1), self.num_visible)

    @property
    def is_written_BT(self) -> jax.Array:
        """Returns whether each token writes an entry; bool[B, T]."""
        return self.slots_BT < NOWHERE


def slots_at(positions_BT: jax.Array, num_visible: int, length_B: jax.Array | None = None) -> Slots:
    """Returns the slots of tokens at the given positions; negative positions write no entry.

    Args:
      num_visible: as in `Slots`.
      length_B: positions >= length write no entry either; None: no limit.
    """
    nowhere_T = NOWHERE + jnp.arange(positions_BT.shape[1])
    is_written_BT = positions_BT >= 0
    if length_B is not None:
        is_written_BT &= positions_BT < length_B[:, None]
    slots_BT = jnp.where(is_written_BT, positions_BT, nowhere_T)
    return Slots(jnp.maximum(positions_BT, 0), slots_BT, num_visible)


def num_slots(window: int, num_positions: int, num_new: int) -> int:
    """Returns the number of cache slots of a row.

    Args:
      window: attention window of the layer; 0: none.
      num_positions: length of the longest row.
      num_new: tokens per decode step. A ring has 2 * num_new additional slots: the queries of one step have different
        positions, and entries of drafts rejected in the previous step may follow them.
    """
    return min(window, num_positions) + 2 * num_new if window else num_positions


def read_and_write(cache: Cache, entries: Cache, slots: Slots, window: int) -> tuple[Cache, Cache, jax.Array]:
    """Writes new entries to a cache.

    Args:
      cache, entries: trees of arrays [B, S, ...] and [B, T, ...].
      window: attention window of the layer; 0: none.

    Returns:
      the cache with the new entries; the entries that the new tokens attend to, [B, N, ...]; and the positions of these
      N entries, int[1 or B, N], negative for empty slots.
    """
    size = jax.tree.leaves(cache)[0].shape[1]
    if not window:
        cache = _each(write, cache, entries, slots.slots_BT)
        return cache, jax.tree.map(lambda x: x[:, : slots.num_visible], cache), jnp.arange(slots.num_visible)[None]
    num_new = slots.slots_BT.shape[1]
    newest_B = jnp.where(slots.is_written_BT, slots.slots_BT, -1).max(axis=1)
    # In a prompt chunk longer than the ring several tokens map to the same slot: only the last ones are written.
    stays_BT = slots.is_written_BT & (slots.slots_BT > newest_B[:, None] - size)
    ring_BT = jnp.where(stays_BT, slots.slots_BT % size, NOWHERE + jnp.arange(num_new))
    written = _each(write, cache, entries, ring_BT)
    if min(window, slots.num_visible) + num_new - 1 <= size:
        return written, written, _positions(newest_B, size)
    # The first tokens of a long chunk see entries that its last ones overwrite: read all before writing any.
    before_BS = _positions(slots.positions_BT[:, 0] - 1, size)
    new_BT = jnp.where(slots.is_written_BT, slots.slots_BT, -1)
    both = _each(lambda old, new: jnp.concatenate([old, new.astype(old.dtype)], axis=1), cache, entries)
    return written, both, jnp.concatenate([before_BS, new_BT], axis=1)


def _positions(newest_B: jax.Array, size: int) -> jax.Array:
    """Returns the position of each entry of a ring whose newest entry has position `newest_B`; int[B, S]."""
    return newest_B[:, None] - (newest_B[:, None] - jnp.arange(size)) % size


def _each(change: Callable[..., jax.Array], cache: Cache, entries: Cache, *more: jax.Array) -> Cache:
    return jax.tree.map(lambda old, new: change(old, new, *more), cache, entries)


def write(cache: jax.Array, entries: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """Returns the cache [B, S, ...] with entries [B, T, ...] written to their slots."""

    def row(cache, entries, slots_T):
        return cache.at[slots_T].set(entries.astype(cache.dtype), mode="drop", unique_indices=True)

    return jax.vmap(row)(cache, entries, slots_BT)
