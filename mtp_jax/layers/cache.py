"""What decoding keeps of the tokens it has read: one entry a token and layer, in as many slots as a row has room for.

The entry of the token at position p is in slot p. What was written for a token that was not kept stays there until the
token that takes its place is written; until then no query looks so far.

Shape letters: B rows, T new tokens, S slots.
"""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

NOWHERE = 1 << 30  # a slot that no cache has: what is written there is dropped


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """Where T new tokens of each row stand.

    positions_BT: int, for the rotary embedding; the token sees the entries in slots 0 .. position.
    slots_BT: int, where its entry is written; from NOWHERE on it is not. Different within a row.
    num_visible: no token of these stands beyond this many slots, so no more are read.
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


def slots_at(positions_BT: jax.Array, num_visible: int) -> Slots:
    """The slots of tokens at these positions. Negative ones stand before the row: written nowhere, read by nobody."""
    nowhere_T = NOWHERE + jnp.arange(positions_BT.shape[1])
    slots_BT = jnp.where(positions_BT >= 0, positions_BT, nowhere_T)
    return Slots(jnp.maximum(positions_BT, 0), slots_BT, num_visible)


def write(cache: jax.Array, entries: jax.Array, slots_BT: jax.Array) -> jax.Array:
    """The cache [B, S, ...] with entries [B, T, ...] in their slots."""

    def row(cache, entries, slots_T):
        return cache.at[slots_T].set(entries.astype(cache.dtype), mode="drop", unique_indices=True)

    return jax.vmap(row)(cache, entries, slots_BT)
