"""Attention mask.

Shape letters: B rows, S keys.
"""

from dataclasses import dataclass, field

import jax


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mask:
    """Causal attention mask within documents and a window, as a pytree.

    A query sees the keys at its own and earlier positions that are in its document and within the window.

    Attributes:
      segments_BS: int, the document id of each position. A document is a run of equal ids, and so is padding (0), whose
        positions see padding only. Every query sees itself, so no row of the softmax is empty. None: every row is one
        document.
      first: the T queries are the positions first .. first + T - 1 of the S keys; 0 unless the row is sharded.
      window: maximum number of keys that a query sees, its own included; 0: no limit.
    """

    segments_BS: jax.Array | None = None
    first: jax.Array | int = 0
    window: int = field(default=0, metadata={"static": True})
