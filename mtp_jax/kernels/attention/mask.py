"""The mask of attention as a value.

Shape letters: B rows, S keys.
"""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Which keys a query sees: itself and those before it, of its own document, within a window. A pytree.

    Attributes:
      segments_BS: int, a document's id at each of its positions. A document is a run of equal ids, and so is padding
        (0): its positions see only padding, and every query sees itself, so no row of the softmax is empty. None: every
        row is one document.
      first: the T queries are the positions first .. first + T - 1 of the S; 0 unless the row is sharded.
      window: number of keys that a query sees at most, itself included; 0: no limit.
    """

    segments_BS: jax.Array | None = None
    first: jax.Array | int = 0
    window: int = field(default=0, metadata={"static": True})
